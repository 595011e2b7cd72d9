"""The bench of training in a small form: rivals, samples and checks; no times."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch
from bench_runs import CPU, contender, quick, run, setting
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from singd_ext import SINGD
from singd_ext.bench import memory, presets, rivals, training
from singd_ext.bench.clock import Clock
from singd_ext.bench.contender import DTYPES, StepMarks
from singd_ext.bench.results import PEAK_MEMORY, RATIO_TO_ADAMW, STATE, TIME, measured
from singd_ext.bench.training import Plan

# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", presets.PRESETS)
def test_every_preset_runs_in_every_dtype(preset: str, dtype: str) -> None:
    rows, notes = run(preset=preset, dtypes=(dtype,), structures=("diagonal", "dense/diagonal"))
    names = {rivals.NONE, rivals.ADAMW, rivals.SGD, rivals.OURS, rivals.PYPI}
    names |= {rivals.MUON} if preset != "resnet50" else set()
    training_rows = [row for row in rows if row.group == training.TRAINING_STEP]
    step_rows = [row for row in rows if row.group == training.OPTIMIZER_STEP]
    assert {row.name for row in training_rows} == names
    assert {row.name for row in step_rows} == names - {rivals.NONE}
    for row in rows:
        assert row.labels["dtype"] == dtype
        assert row.figures[TIME].value > 0 and row.figures[TIME].unit == "s"
        assert set(row.spread) == {TIME, RATIO_TO_ADAMW}
        assert (STATE in row.figures) == (row.name != rivals.NONE)
        assert (PEAK_MEMORY in row.figures) == (row.group == training.TRAINING_STEP)
    adamw = [row for row in rows if row.name == rivals.ADAMW]
    assert [row.figures[RATIO_TO_ADAMW].value for row in adamw] == [1, 1]
    assert any("Muon is absent" in note for note in notes) == (preset == "resnet50")
    ours = {(r.labels["structure"], r.labels["T"]) for r in step_rows if r.name == rivals.OURS}
    assert ours == {(s, T) for s in ("diagonal", "dense/diagonal") for T in ("1", "2")}
    keys = [row.key for row in rows]
    assert len(keys) == len(set(keys))


def test_every_structure_runs() -> None:
    rows, notes = run(structures=rivals.STRUCTURES, periods=(1,))
    of = {name: {r.labels["structure"] for r in rows if r.name == name} for name in
          (rivals.OURS, rivals.PYPI)}  # fmt: skip
    assert of[rivals.OURS] == set(rivals.STRUCTURES)
    assert of[rivals.PYPI] == {
        "dense", "diagonal", "block_diagonal:30", "hierarchical:15,15", "triu_toeplitz",
        "tril_toeplitz",
    }  # fmt: skip
    assert any("does not have rank_triu:1" in note for note in notes)


def test_rivals_can_be_left_out() -> None:
    rows, _ = run(rivals=())
    assert {row.name for row in rows} == {rivals.NONE, rivals.ADAMW, rivals.OURS}
    with pytest.raises(ValueError, match=r"unknown rivals \['adam'\]"):
        run(rivals=("adam",))


def test_a_rival_that_is_not_installed_is_absent_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    monkeypatch.delattr(torch.optim, "Muon")
    rows, notes = run()
    assert not {rivals.PYPI, rivals.MUON} & {row.name for row in rows}
    assert any("singd (PyPI) is absent: not installed" in note for note in notes)
    assert any("Muon is absent: torch" in note for note in notes)


def test_a_rival_that_fails_is_absent_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(structures):
        def build(*args):
            raise RuntimeError("no kernel")

        return build

    monkeypatch.setattr(rivals, "_pypi", fails)
    rows, notes = run()
    assert rivals.PYPI not in {row.name for row in rows}
    assert "singd (PyPI) diagonal, fp32, is absent: RuntimeError: no kernel" in notes
    monkeypatch.setattr(rivals, "_ours", fails)
    with pytest.raises(RuntimeError, match="no kernel"):
        run()


def test_pypi_does_not_take_every_convolution() -> None:
    parameters = list(nn.Conv1d(2, 3, 2).parameters())
    chosen, notes = rivals.rivals(("muon", "singd"), ["diagonal"], parameters)
    assert [rival.name for rival in chosen] == [rivals.NONE, rivals.ADAMW, rivals.OURS]
    assert [note.split(":")[0] for note in notes] == ["Muon is absent", "singd (PyPI) is absent"]


def test_what_is_named_twice_is_timed_once() -> None:
    rows, _ = run(
        structures=("diagonal", "diagonal/diagonal"), periods=(2, 2), dtypes=("fp32", "fp32")
    )
    keys = [row.key for row in rows]
    assert len(keys) == len(set(keys))


def test_long_cycles_are_implied_by_fewer_steps() -> None:
    rows, _ = run(periods=(1, 50), seconds=1e-9, rivals=())
    kinds = {row.labels["T"]: row.figures[TIME].kind for row in rows if row.name == rivals.OURS}
    assert kinds == {"1": "measured", "50": "implied"}
    rows, _ = run(periods=(1, 3), seconds=10.0, rivals=())
    assert {row.figures[TIME].kind for row in rows} == {"measured"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 1}, "rounds is 1"),
        ({"steps": 0}, "steps is 0"),
        ({"seconds": 0.0}, "seconds is 0"),
        ({"periods": (0,)}, "T is"),
        ({"periods": ()}, "T is"),
        ({"dtypes": ("fp8",)}, "dtype is 'fp8'"),
        ({"structures": ("round",)}, "round"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"model": "a:b"}, "small and batch"),
    ],
)
def test_a_bad_option_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(**change)


# ---------------------------------------------------------------- what makes it honest


def test_a_parameter_that_stays_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_one(model, parameters, loss_average):
        return rivals.Steps(torch.optim.SGD(parameters[1:], lr=0.1))

    monkeypatch.setattr(rivals, "_sgd", forgets_one)
    message = r"SGD: the parameters \['blocks.0.qkv.weight'\] did not move"
    with pytest.raises(AssertionError, match=message):
        run()


def test_training_that_breaks_down_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def explodes(model, parameters, loss_average):
        return rivals.Steps(torch.optim.SGD(parameters, lr=1e30))

    monkeypatch.setattr(rivals, "_sgd", explodes)
    with pytest.raises(AssertionError, match=r"SGD: the loss is .* not finite"):
        run()


def test_layers_that_singd_leaves_out_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SINGD, "rejections", lambda self: {"a": (0, 0), "b": (1, 0)})
    with pytest.raises(AssertionError, match=r"singd_ext diagonal: .* layers \['b'\]"):
        run()


@pytest.mark.parametrize("name", [rivals.OURS, rivals.PYPI])
def test_factors_change_in_the_first_step_of_a_cycle_alone(name: str) -> None:
    one = contender(name, "diagonal")

    def factors() -> torch.Tensor:
        (optimizer,) = one.steps.optimizers
        if isinstance(optimizer, SINGD):
            return next(K.data for K, _ in optimizer.factors().values()).clone()
        return next(iter(optimizer.Ks.values())).to_dense().diagonal().clone()

    for T, steps in ((1, 2), (3, 6), (2, 3), (5, 5), (1, 1)):
        one.steps.begin_cycle(T)
        for step in range(steps):
            before = factors()
            one.train_step()
            assert torch.equal(before, factors()) == (step % T != 0), (T, step)


def test_every_contender_has_parameters_of_its_own_and_shares_the_frozen_ones() -> None:
    start = setting()
    models = [start.copy(), start.copy(), start.start]
    for name, p in models[0].named_parameters():
        others = [dict(model.named_parameters())[name] for model in models[1:]]
        same = {p.data_ptr() == q.data_ptr() for q in others}
        assert same == {name not in start.trained}
        assert p.requires_grad == (name in start.trained)
        assert all(torch.equal(p, q) for q in others)


def test_statistics_are_gathered_by_real_backward_passes() -> None:
    one, seen = contender(rivals.OURS), []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.singd_ext.accumulate_statistic_.default:
                seen.append(bool(args[1].any()))
            return func(*args, **(kwargs or {}))

    one.steps.begin_cycle(1)
    with Spy():
        one.train_step()
    assert seen == [True] * 2 * 4  # K and C of four layers


def test_state_is_counted_to_the_byte() -> None:
    numbers = sum(p.numel() for p in contender(rivals.ADAMW)._trained.values())
    expected = {rivals.ADAMW: 2 * 4 * numbers + 8 * 4, rivals.SGD: 4 * numbers, rivals.NONE: 0}
    for name, nbytes in expected.items():
        one = contender(name)
        one.train_step()
        assert one.steps.state_bytes() == nbytes, name
    ours = contender(rivals.OURS, "diagonal")
    ours.train_step()
    dims = sum(K.dim + C.dim for K, C in ours.steps.optimizers[0].factors().values())
    assert ours.steps.state_bytes() == 4 * (numbers + 2 * dims) + 4 * 2 * 8  # and two counters
    theirs = contender(rivals.PYPI, "diagonal")
    theirs.train_step()
    assert theirs.steps.state_bytes() == 4 * (numbers + 2 * dims)


def test_gradients_are_those_of_one_batch() -> None:
    one = contender(rivals.NONE)
    gradients = []
    for _ in range(5):  # four batches take turns
        one.train_step()
        gradients.append(one._trained["blocks.0.qkv.weight"].grad.clone())
    assert torch.equal(gradients[0], gradients[4])
    assert not torch.equal(gradients[0], gradients[1])


def test_the_first_turn_is_left_out() -> None:
    entry = SimpleNamespace(time=measured)
    figures, spread = training._times(entry, [100.0, 2.0, 2.0, 4.0], [100.0, 1.0, 1.0, 1.0])
    assert {name: figure.value for name, figure in figures.items()} == {TIME: 2, RATIO_TO_ADAMW: 2}
    assert spread == {TIME: 0.5, RATIO_TO_ADAMW: 0.5}


def test_peak_memory_is_that_of_the_allocator() -> None:
    with memory.measure(CPU) as found:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.ones(500)  # freed at once
    assert found.peak == 4 * 1500
    assert kept.numel() == 1000


def test_steps_of_a_cycle_have_their_share() -> None:
    """A cycle of 1 + 4 steps, of which an update and two others are timed, in two samples."""
    moments = count()

    class Scripted:
        rival = SimpleNamespace(label="x", has_period=True)
        steps = SimpleNamespace(begin_cycle=lambda T: next(moments))

        def __init__(self) -> None:
            self.lengths = iter([10.0, 2.0, 4.0, 11.0, 3.0, 3.0])

        def train_step(self) -> StepMarks:
            length = next(self.lengths)
            return StepMarks(0.0, 0.75 * length, length)

    entry = training.Entry(Scripted(), 5, Plan(1, 2), None, None)
    call = training._sample(entry, Clock(CPU), lambda text: None)
    call(), call()
    assert entry.training == [(10 + 4 * 3) / 5, (11 + 4 * 3) / 5]
    assert entry.optimizer == [entry.training[0] / 4, entry.training[1] / 4]
    assert entry.time(1.0, "s").kind == "implied"


@pytest.mark.parametrize(
    ("T", "update", "other", "plan"),
    [
        (1, 1.0, 1.0, Plan(3, 0)),  # three of ten steps fit into the time
        (1, 0.1, 0.1, Plan(10, 0)),
        (1, 9.0, 9.0, Plan(1, 0)),  # never less than one
        (10, 0.1, 0.1, Plan(1, 9)),
        (5, 0.1, 0.1, Plan(2, 4)),
        (50, 0.5, 0.1, Plan(1, 25)),  # a whole cycle does not fit
        (10, 9.0, 9.0, Plan(1, 1)),
        (2, 9.0, 9.0, Plan(1, 1)),  # a whole cycle, since nothing is left to leave out
    ],
)
def test_samples_are_planned(T: int, update: float, other: float, plan: Plan) -> None:
    assert Plan.of(T, update, other, steps=10, seconds=3.0 if other != 0.1 else 3.05) == plan
