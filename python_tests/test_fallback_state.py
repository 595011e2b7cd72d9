"""Checkpoints and gradient scalers of a whole model in one optimizer."""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from nets import OPTIONS, assert_bitwise, differ, snapshot
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from whole import Whole, one, others, singd_alone, train_whole, whole_loss

from singd_ext import SINGD
from singd_ext.fallback import Fallback
from singd_ext.update import Scales

pytestmark = [pytest.mark.filterwarnings("error")]

FALLBACKS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw_not_fused": {"fallback_options": {"fused": False, "amsgrad": True}},
    "sgd": {"fallback": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
    "adafactor": {"fallback": torch.optim.Adafactor},  # state of other shapes
}


def _through_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _same(actual: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(
            _same(actual[key], value) for key, value in expected.items()
        )
    if isinstance(expected, Tensor):
        return actual.dtype == expected.dtype and torch.equal(actual, expected)
    if isinstance(expected, list):
        return all(map(_same, actual, expected)) and len(actual) == len(expected)
    return actual == expected


# -------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fallback", FALLBACKS)
def test_resumed_run_equals_the_uninterrupted_one(fallback: str, dtype: torch.dtype) -> None:
    def make() -> tuple[nn.Module, SINGD]:
        model = Whole().to(dtype)
        options = {**OPTIONS, "T": 2, "fallback": "adamw", **FALLBACKS[fallback]}
        return model, SINGD(model, **options)

    model, optimizer = make()
    train_whole(model, [optimizer], range(3))
    optimizer.param_groups[1]["lr"] = 0.03
    saved = _through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    untouched = copy.deepcopy(saved)
    resumed, resumed_optimizer = make()
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    assert_bitwise(snapshot(resumed, resumed_optimizer), snapshot(model, optimizer))
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        train_whole(m, [o], range(3, 6))
    assert_bitwise(snapshot(resumed, resumed_optimizer), snapshot(model, optimizer))
    assert _same(saved["optimizer"], untouched["optimizer"])


def test_state_has_the_fallback_beside_singd_per_parameter() -> None:
    model, optimizer = one()
    train_whole(model, [optimizer], [0])
    saved = optimizer.state_dict()
    index = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    of_norm = saved["state"][index[id(model.norm.weight)]]
    assert set(of_norm) == {"step", "exp_avg", "exp_avg_sq"}
    assert "K" in saved["state"][index[id(model.layers[0].weight)]]
    assert [g["optimizer"] for g in saved["param_groups"]] == ["SINGD", "AdamW"]


def test_groups_after_loading_are_those_that_the_fallback_reads() -> None:
    model, optimizer = one()
    train_whole(model, [optimizer], [0])
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.0, total_iters=9)
    before = snapshot(model, optimizer)
    train_whole(model, [optimizer], [1])
    after = snapshot(model, optimizer)
    assert scheduler.get_last_lr() == [0.0, 0.0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not torch.equal(after["norm.weight: exp_avg"], before["norm.weight: exp_avg"])


def test_state_saved_before_the_first_step_starts_afresh() -> None:
    model, optimizer = one()
    fresh = copy.deepcopy(optimizer.state_dict())
    start = snapshot(model, optimizer)
    train_whole(model, [optimizer], [0])
    first = snapshot(model, optimizer)
    optimizer.load_state_dict(fresh)
    model.load_state_dict({n: start[n] for n, _ in model.named_parameters()})
    train_whole(model, [optimizer], [0])
    assert_bitwise(snapshot(model, optimizer), first)


def test_distributed_checkpoint_state_dict_round_trip() -> None:
    model, optimizer = one()
    train_whole(model, [optimizer], range(2))
    saved = get_optimizer_state_dict(model, optimizer)
    resumed, resumed_optimizer = one()
    resumed.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed, resumed_optimizer, saved)
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        train_whole(m, [o], [2, 3])
    assert_bitwise(snapshot(resumed, resumed_optimizer), snapshot(model, optimizer))


class Counting(torch.optim.SGD):
    """Keeps an integer tensor of each parameter, which torch would load as a floating-point one."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["codes"] = (
                self.state[p].get("codes", p.new_zeros(2, dtype=torch.uint8)) + 1
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["codes"] = state["codes"].to(torch.uint8)


def test_fallback_loads_its_state_as_it_would_alone() -> None:
    model, optimizer = one(fallback=Counting)
    train_whole(model, [optimizer], range(2))
    resumed, resumed_optimizer = one(fallback=Counting)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    codes = resumed_optimizer.state[resumed.position]["codes"]
    assert codes.dtype == torch.uint8 and codes.tolist() == [2, 2]
    assert_bitwise(snapshot(resumed, resumed_optimizer), snapshot(model, optimizer))


def test_fallback_adds_options_that_an_older_state_does_not_have() -> None:
    model, optimizer = one()
    train_whole(model, [optimizer], [0])
    saved = optimizer.state_dict()
    del saved["param_groups"][1]["maximize"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["maximize"] is False
    train_whole(model, [optimizer], [1])


def _sgd_state(saved: dict[str, Any]) -> None:
    other = one(**FALLBACKS["sgd"])
    train_whole(other[0], [other[1]], [0])
    saved.update(other[1].state_dict())


def _no_fallback(saved: dict[str, Any]) -> None:
    saved["param_groups"].pop()


def _shape(saved: dict[str, Any]) -> None:
    saved["state"][saved["param_groups"][1]["params"][2]]["exp_avg"] = torch.zeros(3)


def _missing(saved: dict[str, Any]) -> None:
    del saved["state"][saved["param_groups"][1]["params"][2]]["exp_avg_sq"]


def _parameters(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["params"].pop()


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "other_fallback": (_sgd_state, "group 1 was trained by SGD.*AdamW"),
    "no_fallback": (_no_fallback, "1 parameter groups.* 2"),
    "shape": (_shape, r"'norm\.weight'.*'exp_avg' has shape \(3,\), expected \(4,\)"),
    "missing_entry": (_missing, r"'norm\.weight'.*no 'exp_avg_sq'"),
    "fewer_parameters": (_parameters, "group 1 has 3 parameters in the saved state, 4"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_state_that_does_not_fit_is_refused_and_nothing_changes(damage: str) -> None:
    model, optimizer = one()
    train_whole(model, [optimizer], range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    change, message = REFUSED[damage]
    change(saved)
    train_whole(model, [optimizer], [2])
    before, groups = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert _same(optimizer.state_dict(), before)
    assert optimizer.param_groups is groups


def test_shape_is_checked_before_the_first_step_too() -> None:
    model, optimizer = one()
    train_whole(model, [optimizer], [0])
    saved = copy.deepcopy(optimizer.state_dict())
    _shape(saved)
    with pytest.raises(ValueError, match=r"'exp_avg' has shape \(3,\)"):
        one()[1].load_state_dict(saved)


# -------------------------------------------------------------------- gradient scalers


def _scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=2, **options)


def _train_scaled(
    model: nn.Module, optimizers: list[Any], unscale: bool = False, faults: tuple[int, ...] = ()
) -> None:
    scaler = _scaler()
    for seed in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        factor = float("inf") if seed in faults else 1.0
        scaler.scale(factor * whole_loss(model, seed)).backward()
        for optimizer in optimizers:
            if unscale:
                scaler.unscale_(optimizer)
                if isinstance(optimizer, SINGD):
                    optimizer.set_current_grad_scale(scaler.get_scale())
        if unscale and seed not in faults:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()


MAKE: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw_not_fused": lambda p: torch.optim.AdamW(p, fused=False, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fallback", MAKE)
def test_scaled_run_equals_two_optimizers_with_a_scaler(fallback: str, unscale: bool) -> None:
    model, optimizer = one(**FALLBACKS[fallback])
    reference = Whole()
    pair = [singd_alone(reference), MAKE[fallback](others(reference))]
    _train_scaled(model, [optimizer], unscale, faults=(1,))
    _train_scaled(reference, pair, unscale, faults=(1,))
    expected = {k: v for o in pair for k, v in snapshot(reference, o).items()}
    assert_bitwise(snapshot(model, optimizer), expected)
    unscaled_model, unscaled = one(**FALLBACKS[fallback])
    train_whole(unscaled_model, [unscaled], range(4))
    assert differ(snapshot(model, optimizer), snapshot(unscaled_model, unscaled))


@pytest.mark.parametrize("fallback", MAKE)
def test_scaled_run_equals_the_unscaled_one(fallback: str) -> None:
    model, optimizer = one(**FALLBACKS[fallback])
    reference, plain = one(**FALLBACKS[fallback])
    _train_scaled(model, [optimizer])
    train_whole(reference, [plain], range(4))
    torch.testing.assert_close(
        snapshot(model, optimizer), snapshot(reference, plain), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("fallback", MAKE)
def test_step_with_infinite_gradients_changes_nothing(fallback: str) -> None:
    model, optimizer = one(**FALLBACKS[fallback])
    train_whole(model, [optimizer], range(2))
    before = snapshot(model, optimizer)
    scaler = _scaler()
    optimizer.zero_grad()
    whole_loss(model, 2).backward()
    model.norm.bias.grad[0] = float("inf")  # the fallback's gradient alone
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    optimizer.zero_grad()
    assert_bitwise(snapshot(model, optimizer), before)


@pytest.mark.parametrize("fallback", MAKE)
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_fallback_heeds_a_flag_that_only_the_device_knows(found: float, fallback: str) -> None:
    """What happens on a GPU, where SINGD's step does not read the flag."""
    fallbacks = {"adamw": "adamw", "sgd": MAKE["sgd"], "adamw_not_fused": MAKE["adamw_not_fused"]}
    wrapped, p = Fallback(fallbacks[fallback]), nn.Parameter(torch.ones(3))
    groups, state = wrapped.add_groups([{"params": [p]}], []), torch.optim.SGD([p]).state
    p.grad = torch.full((3,), 16.0)
    wrapped.step(groups, state, Scales(torch.tensor(found), torch.tensor(8.0), None))
    q = nn.Parameter(torch.ones(3))
    q.grad = torch.full((3,), 2.0)
    if not found:
        MAKE[fallback]([q]).step()
    assert torch.equal(p, q) and torch.equal(p, torch.ones(3)) == bool(found)


def test_group_that_is_not_fused_is_unscaled_beside_one_that_is() -> None:
    def groups(model: Whole) -> list[dict[str, Any]]:
        return [{"params": [model.position]}, {"params": model.norm.weight, "fused": False}]

    model, reference = Whole(), Whole()
    marked = [{**group, "optimizer": "fallback"} for group in groups(model)]
    optimizer = SINGD(model, params=marked, fallback="adamw", fallback_options={"fused": True})
    adamw = torch.optim.AdamW(groups(reference), fused=True)
    _train_scaled(model, [optimizer])
    del adamw._step_supports_amp_scaling  # of torch it cannot be had: the scaler unscales
    _train_scaled(reference, [adamw])
    assert_bitwise(snapshot(model, optimizer), snapshot(reference, adamw))


def test_sparse_gradients_of_a_fallback_are_unscaled() -> None:
    def factory(params: list) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(params, lr=0.1)

    model, reference = Whole(sparse=True), Whole(sparse=True)
    for m in (model, reference):
        for p in others(m):
            p.requires_grad_(p is m.embedding.weight)
    optimizer = SINGD(model, fallback=factory, **OPTIONS)
    pair = [singd_alone(reference), factory([reference.embedding.weight])]
    _train_scaled(model, [optimizer])
    _train_scaled(reference, pair)
    expected = {k: v for o in pair for k, v in snapshot(reference, o).items()}
    assert_bitwise(snapshot(model, optimizer), expected)
