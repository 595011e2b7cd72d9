"""Copies of models and optimizers, and what happens to parameters after construction."""

import copy
import gc
import io
import pickle
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
    of_layer,
    snapshot,
    statistics_names,
    train,
    trained,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]

VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "middle_of_T": {"T": 3},
    "sparse": {"structures": ("hierarchical:1,1", "diagonal"), "alpha1": 0.0, "momentum": 0.0},
}


# ---------------------------------------------------------------- copies of optimizer and model


def _deepcopied(pair: Any) -> Any:
    return copy.deepcopy(pair)


def _pickled(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def _saved(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [_deepcopied, _pickled, _saved])
@pytest.mark.parametrize("variant", VARIANTS)
def test_model_and_optimizer_copied_together_train_on_like_the_original(
    variant: str, duplicate: Any
) -> None:
    model, optimizer = trained([0, 1], **VARIANTS[variant])
    before = snapshot(model, optimizer)
    twin, twin_optimizer = duplicate((model, optimizer))
    assert twin[0].weight is twin_optimizer.param_groups[0]["params"][0]
    train(twin, twin_optimizer, range(2, 6))
    assert_bitwise(snapshot(model, optimizer), before)  # they share nothing
    train(model, optimizer, range(2, 6))
    assert_bitwise(snapshot(twin, twin_optimizer), snapshot(model, optimizer))
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained(range(6), **VARIANTS[variant])))


def test_copy_of_the_optimizer_alone_has_a_model_of_its_own() -> None:
    model, optimizer = trained([0])
    before = snapshot(model, optimizer)
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["params"][0] is not model[0].weight
    assert repr(twin) == repr(optimizer)
    train(twin._model, twin, [1])
    assert_bitwise(snapshot(model, optimizer), before)
    backward(model, optimizer, inputs(seed=9))
    assert not statistics_names(twin)


def test_copies_between_backward_and_step_begin_with_the_next_pass() -> None:
    model, optimizer = trained([0])
    backward(model, optimizer, inputs(seed=9))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))  # torch copies no gradients
    loss_of(twin, inputs(seed=1)).backward()
    twin_optimizer.step()
    assert_bitwise(snapshot(twin, twin_optimizer), snapshot(*trained([0, 1])))


def test_copy_keeps_that_hooks_were_removed_and_frozen_parameters() -> None:
    model, optimizer = trained([0])
    optimizer.remove_hooks()
    model[0].weight.requires_grad_(False)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        train(m, o, [1])
    assert not statistics_names(twin_optimizer)
    assert_bitwise(snapshot(twin, twin_optimizer), snapshot(model, optimizer))


class Owner(nn.Module):
    """A model that holds its optimizer, as some training classes do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.optimizer = SINGD(self, **OPTIONS)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("duplicate", [_deepcopied, _pickled])
def test_model_that_holds_its_optimizer_can_be_copied(duplicate: Any) -> None:
    owner = Owner()
    train(owner, owner.optimizer, [0])
    twin = duplicate(owner)
    for o in (owner, twin):
        train(o, o.optimizer, [1, 2])
    assert_bitwise(snapshot(twin, twin.optimizer), snapshot(owner, owner.optimizer))


def test_layer_that_holds_its_optimizer_is_refused_with_a_reason() -> None:
    layer = nn.Linear(2, 2)
    layer.optimizer = SINGD(layer)
    with pytest.raises(RuntimeError, match="layer '' holds the SINGD that trains it"):
        copy.deepcopy(layer)


def test_exponential_moving_average_follows_and_is_not_observed() -> None:
    model, optimizer = trained([])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = [p.detach().clone() for p in model.parameters()]
    for seed in range(3):
        train(model, optimizer, [seed])
        average.update_parameters(model)
        if seed > 0:
            expected = [
                0.5 * e + 0.5 * p.detach()
                for e, p in zip(expected, model.parameters(), strict=True)
            ]
        else:
            expected = [p.detach().clone() for p in model.parameters()]
        loss_of(average, inputs(seed=7)).backward()
        assert not statistics_names(optimizer)
    for p, e in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-12, atol=0, check_device=False)
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained(range(3))))


# ---------------------------------------------------------------- moved and cast


def _states(optimizer: SINGD) -> list[Tensor]:
    return [
        v for s in optimizer.state.values() for v in s.values()
        if isinstance(v, Tensor) and v.is_floating_point()
    ]  # fmt: skip


@pytest.mark.parametrize("T", [1, 2])
def test_cast_model_takes_its_state_along(T: int) -> None:
    """float32 to float64 loses nothing: the same as a float64 run from the same numbers."""
    model = mlp(dtype=torch.float32)
    optimizer = SINGD(model, **{**OPTIONS, "T": T})
    train(model, optimizer, range(3))
    saved, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    model.double()
    reference = mlp()
    reference.load_state_dict(weights)
    plain = SINGD(reference, **{**OPTIONS, "T": T})
    for entries in saved["state"].values():
        for key, value in entries.items():
            entries[key] = value.double() if value.is_floating_point() else value
    plain.load_state_dict(saved)
    for m, o in ((model, optimizer), (reference, plain)):
        train(m, o, range(3, 6))
    assert {v.dtype for v in _states(optimizer)} == {torch.float64}
    assert_bitwise(snapshot(model, optimizer), snapshot(reference, plain))


def test_cast_leaves_factors_of_a_chosen_dtype() -> None:
    model = mlp(dtype=torch.float32)
    optimizer = SINGD(model, **OPTIONS, preconditioner_dtype=(torch.float32, None))
    train(model, optimizer, [0])
    model.bfloat16()
    train(model, optimizer, [1])
    for K, C in optimizer.factors().values():
        assert (K.dtype, C.dtype) == (torch.float32, torch.bfloat16)
    state = optimizer.state[model[0].weight]
    assert state["momentum_buffer"].dtype == state["m_C"].dtype == torch.bfloat16


def test_cast_between_backward_and_step() -> None:
    model = mlp(dtype=torch.float32)
    optimizer = SINGD(model, **OPTIONS)
    backward(model, optimizer, inputs(dtype=torch.float32))
    model.double()  # torch casts the gradients too
    optimizer.step()
    assert all(p.isfinite().all() and p.dtype == torch.float64 for p in model.parameters())
    assert {v.dtype for v in _states(optimizer)} == {torch.float64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_moved_model_takes_its_state_along() -> None:
    model, optimizer = trained([0])
    model.cuda()
    for seed in (1, 2):
        backward(model, optimizer, inputs(seed=seed).cuda())
        optimizer.step()
    assert {v.device.type for v in _states(optimizer)} == {"cuda"}
    expected = snapshot(*trained(range(3)))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().cpu(), expected[name], rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- swapped, replaced


def test_swapped_data_is_trained() -> None:
    model, optimizer = trained([0])
    reference_model, reference = trained([0])
    new = [0.3 * torch.randn_like(p) for p in model.parameters()]
    for p, q, value in zip(model.parameters(), reference_model.parameters(), new, strict=True):
        p.data = value.clone()
        q.data.copy_(value)
    for m, o in ((model, optimizer), (reference_model, reference)):
        train(m, o, [1])
    assert_bitwise(snapshot(model, optimizer), snapshot(reference_model, reference))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("key", ["weight", "bias"])
def test_replaced_parameter_is_an_error_that_names_it(key: str, set_to_none: bool) -> None:
    model, optimizer = trained([0])
    setattr(model[2], key, nn.Parameter(getattr(model[2], key).detach().clone()))
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad(set_to_none)
    loss_of(model, inputs()).backward()
    with pytest.raises(RuntimeError, match=f"'{key}' of layer '2' was replaced"):
        optimizer.step()
    after = optimizer.state_dict()
    for index, entries in before["state"].items():
        for name in ("K", "C", "momentum_buffer"):
            if name in entries:
                assert torch.equal(after["state"][index][name], entries[name])


# ---------------------------------------------------------------- frozen and unfrozen


def test_layer_frozen_for_a_while_stays_and_comes_back() -> None:
    model, optimizer = trained([0, 1])
    before = snapshot(model, optimizer)
    model[0].requires_grad_(False)
    train(model, optimizer, [2])
    after = snapshot(model, optimizer)
    assert_bitwise(of_layer(after, "0"), of_layer(before, "0"))
    assert not torch.equal(after["2.weight"], before["2.weight"])
    model[0].requires_grad_(True)
    train(model, optimizer, [3])
    last = snapshot(model, optimizer)
    assert not torch.equal(last["0.weight"], before["0.weight"])
    assert not torch.equal(last["0.weight: K"], before["0.weight: K"])


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_half_of_a_layer_frozen_after_construction_stays(frozen: str) -> None:
    """The other half moves as if the frozen one's gradient were zero."""
    live = "bias" if frozen == "weight" else "weight"
    options = {"weight_decay": 0.1}
    model, optimizer = trained([0], **options)
    reference_model, reference = trained([0], **options)
    getattr(model[0], frozen).requires_grad_(False)
    for seed in (1, 2):
        kept = getattr(model[0], frozen).detach().clone()
        buffer = optimizer.state[getattr(model[0], frozen)]["momentum_buffer"].clone()
        backward(model, optimizer, inputs(seed=seed))
        optimizer.step()
        assert torch.equal(getattr(model[0], frozen), kept)
        assert torch.equal(optimizer.state[getattr(model[0], frozen)]["momentum_buffer"], buffer)
        backward(reference_model, reference, inputs(seed=seed))
        getattr(reference_model[0], frozen).grad.zero_()
        reference.step()
        getattr(reference_model[0], frozen).data.copy_(kept)
        torch.testing.assert_close(
            getattr(model[0], live), getattr(reference_model[0], live), rtol=1e-12, atol=1e-13
        )
    getattr(model[0], frozen).requires_grad_(True)
    train(model, optimizer, [3])
    assert not torch.equal(getattr(model[0], frozen), kept)


def test_group_added_later_is_part_of_copies() -> None:
    model = mlp()
    optimizer = SINGD(model, params=list(model[0].parameters()), **OPTIONS)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.01})
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        train(m, o, range(3))
    assert list(twin_optimizer.factors()) == ["0", "2"]
    assert_bitwise(snapshot(twin, twin_optimizer), snapshot(model, optimizer))
    del optimizer, model
    gc.collect()
    train(twin, twin_optimizer, [3])
