"""Operators of the bench: all are checked, a wrong one is found before it is timed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from singd_ext import ops
from singd_ext.bench import cases, kernels, timing
from singd_ext.bench.cases import OPERATORS, Setting, Shape
from singd_ext.bench.kernels import KernelOptions, WrongOperator
from singd_ext.bench.rivals import STRUCTURES

CPU = torch.device("cpu")
# Wide and narrow against the default blocks and borders, rows more and fewer than twice the width.
SHAPES = [Shape(64, 40, 70, 2), Shape(300, 33, 130, 3), Shape(5, 1, 2, 1)]


@pytest.mark.parametrize("spec", [*STRUCTURES, "block_diagonal:3", "hierarchical:20,30"])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_every_operator_agrees_with_plain_pytorch(spec: str, dtype: str) -> None:
    for shape in SHAPES:
        setting = Setting(spec, shape, kernels.DTYPES[dtype], CPU)
        for name, make in OPERATORS.items():
            kernels.check(name, make(setting), setting)


def twice_the_first_number(result: Tensor) -> Tensor:
    result.view(-1)[0] *= 2
    return result


# A defect of each operator: one wrong number, or a part of the work left out.
DEFECTS: dict[str, Callable[..., Any]] = {
    "project": lambda right, *a, **k: twice_the_first_number(right(*a, **k)),
    "project_gram": lambda right, rows, spec: right(rows[1:], spec),
    "extract": lambda right, *a, **k: right(*a, **k).flip(0),
    "to_dense": lambda right, *a, **k: right(*a, **k).T,
    "structured_matmul": lambda right, *a, **k: right(*a, **(k | {"transpose": True})),
    "structured_product": lambda right, a, b, *c: right(b, a, *c),
    "factor_gram": lambda right, factor, *a: factor.clone(),
    "accumulate_statistic_": lambda right, statistic, rows, *a: right(statistic, rows[::2], *a),
    "update_factors_": lambda right, *a, **k: right(*a, **(k | {"kfac_like": True})),
    "preconditioned_update_": lambda right, *a, **k: right(*a, **(k | {"weight_decay": 0.5})),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_operator_is_found_before_it_is_timed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, defect, timed = getattr(ops, name), DEFECTS[name], []

    def time(calls: dict[str, Any], *a: Any) -> dict[str, list[float]]:
        timed.extend(calls)
        return {call: [1.0, 1.0] for call in calls}

    monkeypatch.setattr(timing, "kernels", time)
    monkeypatch.setattr(ops, name, lambda *a, **k: defect(right, *a, **k))
    options = KernelOptions([name], ["hierarchical:5,3"], dtypes=["fp32"], small=True)
    with pytest.raises(WrongOperator, match=f"{name} for structure 'hierarchical:5,3'"):
        kernels.run(options)
    assert "ours" not in timed


def test_an_operator_that_returns_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "extract", lambda s, spec: torch.full((70,), torch.nan))
    with pytest.raises(WrongOperator, match="extract for structure 'diagonal'"):
        kernels.run(KernelOptions(["extract"], ["diagonal"], dtypes=["fp32"], small=True))


def test_rows_of_a_run() -> None:
    notes: list[str] = []
    said: list[str] = []
    options = KernelOptions(structures=["diagonal", "tril"], dtypes=["bf16"], rounds=2, small=True)
    rows = kernels.run(options, said.append, notes.append)
    assert [row.name for row in rows] == ["copy", "matrix product", *OPERATORS, *OPERATORS]
    assert len({row.key for row in rows}) == len(rows)
    assert len(said) == 1 + 2 * len(OPERATORS) and len(notes) == 2
    by_name = {row.name: row for row in rows if row.labels.get("structure") == "diagonal"}
    statistic = by_name["accumulate_statistic_"]
    assert statistic.labels["shape"] == "64 x 70" and statistic.labels["dtype"] == "bfloat16"
    # X in bfloat16, and the float32 statistic read and written.
    assert statistic.figures["least bytes"].value == 64 * 70 * 2 + 2 * 70 * 4
    step = by_name["preconditioned_update_"].figures
    assert step["least bytes"].value == 2 * (5 * 40 * 70 + 40 + 70) * 2  # five passes of two layers
    kinds = {name: figure.kind for name, figure in step.items()}
    assert kinds == {
        "time": "measured", "PyTorch": "measured", "ratio to PyTorch": "measured",
        "least bytes": "counted", "rate": "implied", "of copy": "implied", "products": "implied",
        "of product": "implied",
    }  # fmt: skip
    assert step["rate"].value == pytest.approx(step["least bytes"].value / step["time"].value)
    assert "products" not in by_name["extract"].figures  # no operations: absent, not 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operators": ["invert"]}, "'invert' is no operator"),
        ({"structures": ["wide"]}, "structure 'wide'"),
        ({"dtypes": ["int8"]}, "'int8'"),
        ({"rounds": 1}, "at least 2"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelOptions(**options)


def test_shapes_are_read() -> None:
    assert Shape.parse("64x40x70x2") == Shape(64, 40, 70, 2)
    for text in ("64x40x70", "64x40x70x0", "64x40x70xa", ""):
        with pytest.raises(ValueError, match="ROWSxD_OxD_IxLAYERS"):
            Shape.parse(text)


def test_rivals_take_turns_in_an_order_of_their_own_each_round() -> None:
    calls: list[str] = []
    rivals = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = timing.interleaved(rivals, 20, CPU)
    assert {name: len(times) for name, times in samples.items()} == {"a": 20, "b": 20, "c": 20}
    assert calls[:3] == ["a", "b", "c"]  # untimed
    rounds = [tuple(calls[i : i + 3]) for i in range(3, 63, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6


def test_buffers_of_a_kernel_take_turns() -> None:
    seen: list[int] = []
    samples = timing.kernels({"a": [lambda i=i: seen.append(i) for i in range(3)]}, 2, CPU)
    assert len(samples["a"]) == 2 and all(seconds > 0 for seconds in samples["a"])
    assert seen[:6] == [0, 1, 2, 0, 1, 2]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the clock asks of CUDA, in order, on a device with an L2 cache of 1,000 bytes."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: "Event") -> float:
            return 2.0  # milliseconds

    properties = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return log


def test_cuda_is_timed_by_events_behind_a_cold_cache(cuda: list[str]) -> None:
    calls = {name: lambda name=name: cuda.append(name) for name in "ab"}
    samples = timing.interleaved(calls, 1, "cuda", before=lambda: cuda.append("cold"))
    assert samples == {"a": [0.002], "b": [0.002]}
    one = ["cold", "event", "a", "event"]
    other = ["cold", "event", "b", "event"]
    assert cuda[:3] == ["a", "b", "synchronize"] and cuda[-1] == "synchronize"
    assert cuda[3:-1] in (one + other, other + one)


def test_buffers_on_cuda_exceed_the_cache(cuda: list[str]) -> None:
    assert timing.copies(10**6, "cuda") == 2
    assert timing.copies(500, "cuda") == 6
    assert timing.copies(1, "cuda") == timing.MOST_COPIES


def test_median_and_spread() -> None:
    assert timing.median([3.0, 1.0, 2.0]) == 2.0
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    # The machine was twice as slow in the second round: both were.
    assert timing.ratio_spread([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == 0.0
    assert timing.copies(1000, CPU) == 1


def test_operands_are_copied_before_they_are_changed() -> None:
    setting = Setting("diagonal", SHAPES[0], torch.float32, CPU)
    case = OPERATORS["preconditioned_update_"](setting)
    before = cases.clone(case.operands)
    kernels.check("preconditioned_update_", case, setting)
    for old, new in zip(cases.tensors(before), cases.tensors(case.operands), strict=True):
        assert torch.equal(old, new)
