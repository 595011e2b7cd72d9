"""Passes that must not reach the factors: paused ones, autograd.grad, backward of other inputs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from nets import (
    OPTIONS,
    assert_bitwise,
    backward,
    differ,
    inputs,
    loss_of,
    mlp,
    snapshot,
    statistics_names,
    trained,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]


def _grad_of_parameters(model: nn.Module, optimizer: SINGD) -> None:
    torch.autograd.grad(loss_of(model, inputs(seed=9)), list(model.parameters()))


def _grad_of_one_parameter(model: nn.Module, optimizer: SINGD) -> None:
    torch.autograd.grad(loss_of(model, inputs(seed=9)), model[0].weight)


def _grad_of_inputs(model: nn.Module, optimizer: SINGD) -> None:
    x = inputs(seed=9, requires_grad=True)
    torch.autograd.grad(loss_of(model, x), x)


def _backward_of_inputs(model: nn.Module, optimizer: SINGD) -> None:
    x = inputs(seed=9, requires_grad=True)
    loss_of(model, x).backward(inputs=[x])


def _jacobian(model: nn.Module, optimizer: SINGD) -> None:
    torch.autograd.functional.jacobian(model, inputs(seed=9))


def _validation(model: nn.Module, optimizer: SINGD) -> None:
    with torch.no_grad():
        loss_of(model, inputs(seed=9))


STRAY = [
    _grad_of_parameters,
    _grad_of_one_parameter,
    _grad_of_inputs,
    _backward_of_inputs,
    _jacobian,
    _validation,
]


@pytest.mark.parametrize("where", ["before_backward", "before_step"])
@pytest.mark.parametrize("stray", STRAY)
def test_pass_that_adds_to_no_gradient_leaves_no_trace(stray: Callable, where: str) -> None:
    model, optimizer = trained([])
    for seed in range(3):
        optimizer.zero_grad(set_to_none=False)
        for _ in range(2):  # two micro-batches
            if where == "before_backward":
                stray(model, optimizer)
            loss_of(model, inputs(seed=seed)).backward()
        if where == "before_step":
            stray(model, optimizer)
        optimizer.step()
    reference_model, reference = trained([])
    for seed in range(3):
        reference.zero_grad(set_to_none=False)
        for _ in range(2):
            loss_of(reference_model, inputs(seed=seed)).backward()
        reference.step()
    assert_bitwise(snapshot(model, optimizer), snapshot(reference_model, reference))


def test_backward_of_some_parameters_is_observed_for_their_layers_only() -> None:
    model, optimizer = trained([])
    loss_of(model, inputs()).backward(inputs=[model[2].weight])
    assert optimizer.state[model[2].weight]["rows"] == 6
    assert "rows" not in optimizer.state[model[0].weight]


def test_gradient_penalty_counts_its_backward_pass_but_not_the_inner_one() -> None:
    model, optimizer = trained([])
    x = inputs(requires_grad=True)
    loss = loss_of(model, x)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    assert not statistics_names(optimizer)
    (loss + slope.square().sum()).backward()
    assert optimizer.state[model[0].weight]["rows"] > 0


# ---------------------------------------------------------------- the context


def _regularizer(model: nn.Module, x: Tensor) -> Tensor:
    return 0.01 * model(x).square().sum()


def _factors(
    context: Callable[[SINGD], AbstractContextManager[Any]], half: str | None
) -> dict[str, Any]:
    """Factors after steps on a loss and a regularizer, of which `half` runs in the context."""
    model, optimizer = trained([])
    for seed in range(3):
        backward(model, optimizer, inputs(seed=seed))
        if half is not None:
            with context(optimizer) if half != "backward" else nullcontext():
                penalty = _regularizer(model, inputs(seed=seed + 7))
            with context(optimizer) if half != "forward" else nullcontext():
                penalty.backward()
        for p in model.parameters():  # so that only the statistics can differ
            p.grad.fill_(1.0)
        optimizer.step()
    return {k: v for k, v in snapshot(model, optimizer).items() if k.endswith((": K", ": C"))}


@pytest.mark.parametrize("half", ["forward", "backward", "both"])
def test_paused_pass_contributes_nothing(half: str) -> None:
    alone = _factors(nullcontext, None)
    assert differ(_factors(lambda _: nullcontext(), half), alone)
    assert_bitwise(_factors(SINGD.paused, half), alone)


def test_gradients_of_a_paused_pass_count() -> None:
    model, optimizer = trained([])
    backward(model, optimizer, inputs())
    before = model[0].weight.grad.clone()
    with optimizer.paused():
        _regularizer(model, inputs(seed=7)).backward()
    assert not torch.equal(model[0].weight.grad, before)


def test_statistics_of_cleared_gradients_are_not_those_of_a_paused_pass() -> None:
    """A model's zero_grad is not the optimizer's, and what observes it is paused."""
    model, optimizer = trained([])
    backward(model, optimizer, inputs())
    with optimizer.paused():  # the gradients are still there
        assert statistics_names(optimizer)
    model.zero_grad()
    with optimizer.paused():
        _regularizer(model, inputs(seed=7)).backward()
    assert not statistics_names(optimizer)
    before = snapshot(model, optimizer)
    with pytest.warns(UserWarning, match="modules were not called"):
        optimizer.step()
    after = snapshot(model, optimizer)
    factors = [name for name in before if name.endswith((": K", ": C"))]
    assert_bitwise({n: before[n] for n in factors}, {n: after[n] for n in factors})


def test_pauses_nest_and_end_with_an_exception() -> None:
    model, optimizer = trained([])
    with pytest.raises(KeyError), optimizer.paused():
        with optimizer.paused():
            assert optimizer.is_paused
        assert optimizer.is_paused
        raise KeyError
    assert not optimizer.is_paused
    backward(model, optimizer, inputs())
    assert statistics_names(optimizer)


@pytest.mark.parametrize("half", ["forward", "backward"])
def test_pause_around_half_of_a_checkpointed_pass_is_safe(half: str) -> None:
    """The segment runs again outside of the pause, and must save the same tensors."""
    model = mlp()
    optimizer = SINGD(model, **OPTIONS)
    x = inputs(requires_grad=True)
    if half == "forward":
        with optimizer.paused():
            loss = checkpoint(model, x, use_reentrant=False).square().sum()
        loss.backward()
    else:
        loss = checkpoint(model, x, use_reentrant=False).square().sum()
        with optimizer.paused():
            loss.backward()
    assert not statistics_names(optimizer)
    expected = mlp()
    expected(x).square().sum().backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
