"""Hooks: when they observe, what they keep alive, and copies of a model that has them."""

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nets import (
    OPTIONS,
    assert_bitwise,
    backward,
    inputs,
    loss_of,
    mlp,
    snapshot,
    statistics_names,
    train,
    trained,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from singd_ext import SINGD, curvature

pytestmark = [pytest.mark.filterwarnings("error")]


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), nn.Conv1d(5, 3, 2)], ids=["linear", "conv"])
def test_activations_are_freed_with_the_graph(layer: nn.Module) -> None:
    optimizer = SINGD(layer, T=1)
    for ends in ("backward", "dropped", "step"):
        x = inputs(2, 5, 5, dtype=torch.float32)
        storage = StorageWeakRef(x.untyped_storage())
        y = layer(x)
        if ends != "dropped":
            y.square().mean().backward()
        if ends == "step":
            optimizer.step()
        del x, y
        gc.collect()
        assert storage.expired(), ends


def test_activations_are_freed_by_the_backward_pass_though_the_loss_is_held() -> None:
    """As autograd's own are; a pass that keeps the graph keeps them."""
    layer = nn.Linear(5, 3)
    optimizer = SINGD(layer, T=1)
    x = inputs(2, 5, 5, dtype=torch.float32)
    storage = StorageWeakRef(x.untyped_storage())
    loss = layer(x).square().mean()
    del x
    loss.backward(retain_graph=True)
    gc.collect()
    assert not storage.expired()
    loss.backward()
    gc.collect()
    assert storage.expired()
    assert optimizer.state[layer.weight]["rows"] == 2 * 10
    assert loss.grad_fn is not None


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All that is observed from now on."""
    seen: list[Tensor] = []
    observe = curvature.observe

    def noted(output: Tensor, *rest: Any, **options: Any) -> None:
        seen.append(output)
        observe(output, *rest, **options)

    monkeypatch.setattr(curvature, "observe", noted)
    return seen


def test_output_is_observed_only_on_steps_that_update_the_factors(outputs: list[Tensor]) -> None:
    model, optimizer = trained([], T=3)
    observed = []
    for seed in range(7):
        optimizer.zero_grad()
        y = model[2](model[1](model[0](inputs(seed=seed))))
        observed.append(any(output is y for output in outputs))
        y.square().mean().backward()
        assert bool(statistics_names(optimizer)) == observed[-1]
        optimizer.step()
    assert observed == [True, False, False, True, False, False, True]


def test_remove_hooks_ends_observation_and_keeps_the_factors(outputs: list[Tensor]) -> None:
    model, optimizer = trained([0])
    backward(model, optimizer, inputs(seed=9))
    before = snapshot(model, optimizer)
    optimizer.remove_hooks()
    assert not statistics_names(optimizer)
    outputs.clear()
    model(inputs())
    assert not outputs
    train(model, optimizer, [1])
    after = snapshot(model, optimizer)
    assert torch.equal(after["0.weight: K"], before["0.weight: K"])
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert not model[0]._forward_hooks and not model[2]._forward_hooks


def test_optimizer_is_freed_when_dropped_and_the_model_goes_on() -> None:
    model, optimizer = trained([0])
    reference = weakref.ref(optimizer)
    y = model(inputs())  # a graph that carries its hooks
    del optimizer
    gc.collect()
    assert reference() is None
    y.sum().backward()
    loss_of(model, inputs()).backward()
    assert model[0].weight.grad is not None


def _copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _twice(model: nn.Module) -> nn.Module:
    return _pickled(_copied(model))


@pytest.fixture(params=[_copied, _pickled, _twice])
def duplicate(request: pytest.FixtureRequest) -> Iterator[Callable[[nn.Module], nn.Module]]:
    yield request.param


def test_copy_of_the_model_works_and_does_not_feed_the_optimizer(duplicate: Callable) -> None:
    model, optimizer = trained([0])
    twin = duplicate(model)
    loss_of(twin, inputs(seed=9)).backward()
    assert not statistics_names(optimizer)
    assert twin[0].weight.grad is not None and model[0].weight.grad is not twin[0].weight.grad
    train(model, optimizer, [1, 2])
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained(range(3))))


def test_copy_of_the_model_can_have_its_own_optimizer(duplicate: Callable) -> None:
    model, _ = trained([])
    twin = duplicate(model)
    optimizer = SINGD(twin, **OPTIONS)
    train(twin, optimizer, range(3))
    assert_bitwise(snapshot(twin, optimizer), snapshot(*trained(range(3))))


def test_model_zero_grad_discards_the_statistics_of_the_pass_with_its_gradients() -> None:
    model = mlp()
    optimizer = SINGD(model, **OPTIONS)
    backward(model, optimizer, inputs(seed=1))
    model.zero_grad()
    torch.autograd.grad(loss_of(model, inputs(seed=2)), list(model.parameters()))
    loss_of(model, inputs(seed=3)).backward()
    optimizer.step()
    reference_model = mlp()
    reference = SINGD(reference_model, **OPTIONS)
    loss_of(reference_model, inputs(seed=3)).backward()
    reference.step()
    assert_bitwise(snapshot(model, optimizer), snapshot(reference_model, reference))


def test_layer_that_returns_no_tensor_is_named() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return super().forward(x), None

    model = nn.Sequential(Pair(3, 2))
    optimizer = SINGD(model)
    with pytest.raises(TypeError, match="layer '0' returns tuple"):
        model(torch.ones(1, 3))
    optimizer.remove_hooks()
    model(torch.ones(1, 3))
