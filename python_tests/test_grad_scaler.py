"""torch.amp.GradScaler: a scaled run equals an unscaled one, and a skipped step changes nothing."""

from typing import Any

import pytest
import torch
from nets import OPTIONS, assert_bitwise, differ, inputs, loss_of, mlp, snapshot, statistics_names
from torch import nn

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]

STEPS = 5


def _make(**options: Any) -> tuple[nn.Sequential, SINGD]:
    model = mlp(dtype=torch.float32)
    return model, SINGD(model, **{**OPTIONS, **options})


def _unscaled_run(max_norm: float | None = None, micro: int = 1, **options: Any) -> dict[str, Any]:
    model, optimizer = _make(**options)
    for seed in range(STEPS):
        optimizer.zero_grad()
        for x in inputs(seed=seed, dtype=torch.float32).chunk(micro):
            (loss_of(model, x) / micro).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return snapshot(model, optimizer)


def _scaled_backward(
    scaler: torch.amp.GradScaler, model: nn.Module, optimizer: SINGD, seed: int, micro: int = 1
) -> None:
    optimizer.zero_grad()
    for x in inputs(seed=seed, dtype=torch.float32).chunk(micro):
        scaler.scale(loss_of(model, x) / micro).backward()


def _assert_equal_run(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


SCALERS = {
    "constant": {"init_scale": 2.0**16, "growth_interval": 1000},
    "no_power_of_two": {"init_scale": 1000.0, "growth_interval": 1000},
    "growing": {"init_scale": 2.0**10, "growth_interval": 1},
}


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("scaling", SCALERS)
def test_scaled_run_equals_the_unscaled_run(scaling: str, micro: int, T: int) -> None:
    scaler = torch.amp.GradScaler("cpu", **SCALERS[scaling])
    model, optimizer = _make(T=T)
    scales = set()
    for seed in range(STEPS):
        _scaled_backward(scaler, model, optimizer, seed, micro)
        scaler.step(optimizer)
        scales.add(scaler.get_scale())
        scaler.update()
    assert len(scales) == (STEPS if scaling == "growing" else 1)
    _assert_equal_run(snapshot(model, optimizer), _unscaled_run(micro=micro, T=T))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("scaling", SCALERS)
def test_clipping_after_unscale_equals_clipping_the_unscaled_gradients(
    scaling: str, micro: int, told: bool
) -> None:
    max_norm = 0.3
    scaler = torch.amp.GradScaler("cpu", **SCALERS[scaling])
    model, optimizer = _make()
    for seed in range(STEPS):
        _scaled_backward(scaler, model, optimizer, seed, micro)
        scaler.unscale_(optimizer)
        assert nn.utils.clip_grad_norm_(model.parameters(), max_norm) > max_norm
        if told:
            optimizer.set_current_grad_scale(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    expected = _unscaled_run(max_norm, micro)
    _assert_equal_run(snapshot(model, optimizer), expected)
    assert differ(expected, _unscaled_run(micro=micro))


class Container:
    """An optimizer around another one, as frameworks have them; knows nothing of scales."""

    def __init__(self, inner: SINGD) -> None:
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self) -> None:
        self.inner.step()


class MyScaler(torch.amp.GradScaler):
    def step(self, optimizer: Any, *args: Any) -> Any:
        return super().step(optimizer, *args)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, MyScaler])
def test_scale_is_found_through_whoever_stands_between_scaler_and_optimizer(
    scaler_class: type[torch.amp.GradScaler], unscale: bool
) -> None:
    scaler = scaler_class("cpu", **SCALERS["growing"])
    model, optimizer = _make()
    container = Container(optimizer)
    for seed in range(STEPS):
        _scaled_backward(scaler, model, optimizer, seed)
        if unscale:
            scaler.unscale_(container)
        scaler.step(container)
        scaler.update()
    _assert_equal_run(snapshot(model, optimizer), _unscaled_run())


def test_scaler_that_unscales_by_itself_for_lightning() -> None:
    scaler = torch.amp.GradScaler("cpu", **SCALERS["growing"])
    model, optimizer = _make()
    optimizer._step_supports_amp_scaling = False
    for seed in range(STEPS):
        _scaled_backward(scaler, model, optimizer, seed)
        scaler.step(optimizer)
        scaler.update()
    _assert_equal_run(snapshot(model, optimizer), _unscaled_run())


def test_disabled_scaler_is_none() -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model, optimizer = _make()
    for seed in range(STEPS):
        _scaled_backward(scaler, model, optimizer, seed)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert_bitwise(snapshot(model, optimizer), _unscaled_run())


def test_scaler_of_another_make_must_tell_its_scale() -> None:
    model, optimizer = _make()
    for seed in range(STEPS):
        optimizer.zero_grad()
        (8.0 * loss_of(model, inputs(seed=seed, dtype=torch.float32))).backward()
        for p in model.parameters():
            p.grad /= 8.0
        optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
        before = snapshot(model, optimizer)
        with pytest.raises(RuntimeError, match="set_current_grad_scale"):
            optimizer.step()
        assert_bitwise(snapshot(model, optimizer), before)
        optimizer.set_current_grad_scale(8.0)
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
    _assert_equal_run(snapshot(model, optimizer), _unscaled_run())


def test_told_scale_holds_for_one_step_only() -> None:
    model, optimizer = _make()
    optimizer.set_current_grad_scale(8.0)
    loss_of(model, inputs(dtype=torch.float32)).backward()
    optimizer.step()
    before = snapshot(model, optimizer)
    reference_model, reference = _make()
    for p, q in zip(model.parameters(), reference_model.parameters(), strict=True):
        q.data.copy_(p.data)
        reference.state[q].update({k: v.clone() for k, v in optimizer.state[p].items()})
    assert_bitwise(snapshot(reference_model, reference), before)
    for m, o in ((model, optimizer), (reference_model, reference)):
        o.zero_grad()
        loss_of(m, inputs(seed=1, dtype=torch.float32)).backward()
        o.step()
    assert_bitwise(snapshot(model, optimizer), snapshot(reference_model, reference))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_bad_scale_is_refused(value: Any) -> None:
    _, optimizer = _make()
    with pytest.raises(ValueError, match=r"grad_scale.*must be"):
        optimizer.set_current_grad_scale(value)


@pytest.mark.parametrize("unscale", [False, True])
def test_step_with_infinite_gradients_changes_nothing(unscale: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    model, optimizer = _make()
    for seed in range(STEPS):
        if seed == 2:
            before = snapshot(model, optimizer)
            optimizer.zero_grad()
            scaler.scale(float("inf") * loss_of(model, inputs(dtype=torch.float32))).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert scaler.get_scale() == 2.0**9
            assert_bitwise(snapshot(model, optimizer), before)
        _scaled_backward(scaler, model, optimizer, seed)
        scaler.step(optimizer)
        scaler.update()
    _assert_equal_run(snapshot(model, optimizer), _unscaled_run())


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_void_step_does_not_count(unscale: bool, at: int) -> None:
    """T = 3: a void step where factors are due is made up for at the next, not T later."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    model, optimizer = _make(T=3)
    for seed in range(STEPS):
        if seed == at:
            optimizer.zero_grad()
            scaler.scale(float("inf") * loss_of(model, inputs(dtype=torch.float32))).backward()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert not statistics_names(optimizer)
        before = snapshot(model, optimizer)
        _scaled_backward(scaler, model, optimizer, seed)
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(snapshot(model, optimizer)["0.weight: K"], before["0.weight: K"])
        assert moved == (seed % 3 == 0)
    assert optimizer.param_groups[0]["steps"] == STEPS
    _assert_equal_run(snapshot(model, optimizer), _unscaled_run(T=3))


@pytest.mark.parametrize("cleared_by", ["optimizer", "model"])
@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize("void", [{0}, {1}, {2, 3}, {0, 1, 5}])
def test_step_that_is_void_on_a_device_does_not_count_either(
    void: set[int], T: int, cleared_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host learns afterwards what a flag on a GPU says; here a CPU's is treated as one."""
    monkeypatch.setattr("singd_ext.optimizer.is_set_on_host", lambda _: False)
    monkeypatch.setattr("singd_ext.optimizer.is_on_host", lambda flag: flag is None, raising=True)
    model, optimizer = _make(T=T)
    seeds = iter(range(STEPS))
    for step in range(STEPS + len(void)):
        (optimizer if cleared_by == "optimizer" else model).zero_grad()
        x = inputs(seed=9 if step in void else next(seeds), dtype=torch.float32)
        loss_of(model, x).backward()
        optimizer.found_inf = torch.tensor(float(step in void))
        optimizer.grad_scale = torch.ones(())
        optimizer.step()
        optimizer.found_inf.zero_()  # as a scaler that reuses its memory
    del optimizer.found_inf, optimizer.grad_scale
    expected_model, expected = _make(T=T)
    for seed in range(STEPS):
        expected.zero_grad()
        loss_of(expected_model, inputs(seed=seed, dtype=torch.float32)).backward()
        expected.step()
    assert_bitwise(snapshot(model, optimizer), snapshot(expected_model, expected))
