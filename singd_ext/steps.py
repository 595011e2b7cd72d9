"""What `SINGD.step` does for the layers of one parameter group, and the state that it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .curvature import drop_statistics
from .hyperparameters import Hyperparameters
from .layers import Gradients, Layer
from .memory import GroupCalls
from .moves import check_owned, follow
from .scaling import Scales
from .structured import StructuredMatrix
from .update import update_factors, update_layer_by_layer, update_parameters

if TYPE_CHECKING:
    from .optimizer import SINGD


class Plan(NamedTuple):
    """A group's step, checked before anything is changed."""

    layers: list[Layer]  # those that have a gradient
    options: Hyperparameters
    step: int
    lr_cov: float | None  # β₁; None if the factors are not due
    gradients: list[Gradients]  # of the layers


def plan_of(optimizer: SINGD, group: int) -> Plan:
    """Check everything about a group's step.

    Raises:
        ValueError: For a bad option.
        RuntimeError: For a lost gradient or a replaced parameter.
        TypeError: For a sparse gradient.
    """
    options, step = optimizer.options(group), optimizer.param_groups[group]["steps"]
    lr_cov = options.lr_cov_at(step) if optimizer.factors_due(group) else None
    layers, gradients = [], []
    for layer in optimizer._layers:
        if layer.group != group:
            continue
        own = [p.grad for p in layer.parameters]
        missing = [g for g in own if g is None]
        unused = len(missing) == len(own)
        if unused or lr_cov is not None:
            check_owned(layer)
        if unused:
            continue
        if missing:
            _check_frozen(layer, own)
        for g in own:
            if g is not None and g.is_sparse:
                raise TypeError(f"layer '{layer.name}' has a sparse gradient; use dense gradients")
        follow(optimizer, layer)
        layers.append(layer)
        gradients.append(own)
    return Plan(layers, options, step, lr_cov, gradients)


def _check_frozen(layer: Layer, gradients: Gradients) -> None:
    """Check that a parameter without gradient is one that was frozen after construction."""
    for p, g in zip(layer.parameters, gradients, strict=True):
        if g is None and p.requires_grad:
            raise RuntimeError(
                f"only one of weight and bias of layer '{layer.name}' has a gradient; K "
                "belongs to both: freeze the other one with requires_grad_(False)"
            )


def step_factors(optimizer: SINGD, plan: Plan, scales: Scales, calls: GroupCalls) -> None:
    """Update the factors of the layers whose modules were called, from their statistics."""
    assert plan.lr_cov is not None
    states = {layer: layer.entries(optimizer.state) for layer in plan.layers}
    observed = [layer for layer, state in states.items() if state.get("rows", 0) > 0]
    unseen = [layer.name for layer, state in states.items() if "rows" not in state]
    if unseen and optimizer._handles:
        optimizer._warn_once(
            f"layers {unseen} have gradients, but their modules were not called: their factors "
            "stay as they are"
        )
    outcomes = update_factors(
        observed,
        [states[layer] for layer in observed],
        plan.options,
        plan.step,
        plan.lr_cov,
        scales,
        calls,
    )
    calls.factor_incidents.read(outcomes, observed)
    for state in states.values():
        drop_statistics(state)


def step_parameters(
    optimizer: SINGD,
    plan: Plan,
    scales: Scales,
    calls: GroupCalls,
    divisor: list[Tensor] | None,
) -> None:
    """Update the parameters; gradients are divided by `divisor`, one or one a layer, if given."""
    arguments = (plan.layers, plan.gradients, optimizer.state, plan.options, plan.step)
    if divisor is not None and plan.options.max_update_norm is not None:
        outcomes = update_layer_by_layer(*arguments, scales, calls, divisor)
    else:
        if divisor:
            scales = scales._replace(gradient=divisor[0])
        outcomes = update_parameters(*arguments, scales, calls)
    calls.parameter_incidents.read(outcomes, plan.layers)


def complete_state(
    states: dict[Tensor, dict[str, Any]], layer: Layer, options: Hyperparameters
) -> None:
    """Create what these options need and the layer's state does not have yet."""
    parameter = layer.parameters[0]
    state = layer.entries(states)
    for factor, dim, spec, dtype in zip(
        ("K", "C"),
        (layer.dim_K, layer.dim_C),
        options.structures,
        options.preconditioner_dtype,
        strict=True,
    ):
        if factor not in state:
            dtype = parameter.dtype if dtype is None else dtype
            state[factor] = StructuredMatrix.eye(spec, dim, dtype, parameter.device).data
        if options.alpha1 != 0 and f"m_{factor}" not in state:
            state[f"m_{factor}"] = torch.zeros_like(state[factor])
    for counter in ("rejected", "skipped"):
        if counter not in state:
            state[counter] = torch.zeros((), dtype=torch.int64, device=parameter.device)
    for p in layer.parameters:
        if options.momentum != 0 and "momentum_buffer" not in states[p]:
            states[p]["momentum_buffer"] = torch.zeros_like(p)
