"""Hooks: when they observe, what they keep alive, and copies of a model that has them."""

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable, Iterator

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

from singd_ext import SINGD

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


def is_observed(model: nn.Sequential, x: Tensor) -> bool:
    """Whether a forward pass keeps x, which autograd does not need of a layer with W frozen."""
    model[0].weight.requires_grad_(False)
    h = x.clone()
    storage = StorageWeakRef(h.untyped_storage())
    y = model[0](h)
    model[0].weight.requires_grad_(True)
    del h
    gc.collect()
    assert y.requires_grad
    return not storage.expired()


def test_output_is_observed_only_on_steps_that_update_the_factors() -> None:
    model, optimizer = trained([], T=3)
    observed = []
    for seed in range(7):
        observed.append(is_observed(model, inputs(seed=seed)))
        train(model, optimizer, [seed])
    assert observed == [True, False, False, True, False, False, True]


def test_statistics_are_there_only_on_steps_that_update_the_factors() -> None:
    model, optimizer = trained([], T=3)
    gathered = []
    for seed in range(7):
        backward(model, optimizer, inputs(seed=seed))
        gathered.append(bool(statistics_names(optimizer)))
        optimizer.step()
    assert gathered == [True, False, False, True, False, False, True]


def test_a_changed_T_counts_from_the_next_forward_pass_on() -> None:
    model, optimizer = trained([0, 1], T=3)
    assert not is_observed(model, inputs())
    optimizer.param_groups[0]["T"] = 2
    assert is_observed(model, inputs())
    optimizer.param_groups[0]["T"] = 0
    with pytest.raises(ValueError, match="T"):
        model(inputs())


def test_remove_hooks_ends_observation_and_keeps_the_factors() -> None:
    model, optimizer = trained([0])
    assert is_observed(model, inputs())
    backward(model, optimizer, inputs(seed=9))
    before = snapshot(model, optimizer)
    y = model(inputs())  # a graph that carries its hooks
    optimizer.remove_hooks()
    assert not statistics_names(optimizer)
    y.sum().backward()
    assert not statistics_names(optimizer)
    assert not is_observed(model, inputs())
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
    assert not model[0]._forward_hooks and not model[2]._forward_hooks


def test_optimizer_that_could_not_be_constructed_leaves_no_hooks() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.raises(TypeError):
        SINGD(model, fallback=lambda params: "no optimizer")
    gc.collect()
    assert not model[0]._forward_hooks


def test_state_that_was_replaced_by_a_checkpoint_is_freed() -> None:
    model, optimizer = trained([0])
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, [1])
    replaced = weakref.ref(optimizer.state[model[0].weight]["momentum_buffer"])
    optimizer.load_state_dict(saved)
    gc.collect()
    assert replaced() is None


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


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](torch.relu(self.body(x)))


@pytest.mark.parametrize(("T", "warned"), [(2, True), (3, False), (1, False)])
def test_layer_that_every_update_misses_is_named(T: int, warned: bool) -> None:
    model = _TwoHeads()
    optimizer = SINGD(model, T=T, lr_cov=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(12):
            optimizer.zero_grad()
            model(inputs(4, 6, seed=step, dtype=torch.float32), step % 2).square().mean().backward()
            optimizer.step()
    texts = [str(w.message) for w in caught if "step_cap" not in str(w.message)]
    assert len(texts) == warned
    assert all(text.startswith("layers ['heads.1'] are used by steps between") for text in texts)
