"""What `SINGD.step` does for the layers of one parameter group, and the state that it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _C
from .hyperparameters import Hyperparameters
from .layers import Layer
from .memory import GroupCalls
from .scaling import Scales
from .structured import StructuredMatrix
from .update import update_factors, update_layer_by_layer, update_parameters

if TYPE_CHECKING:
    from .optimizer import SINGD


class Plan(NamedTuple):
    """A group's step, checked before anything is changed."""

    group: int
    arguments: _C.StepArguments  # of the layers that have a gradient
    options: Hyperparameters
    step: int
    lr_cov: float | None  # β₁; None if the factors are not due
    calls: GroupCalls


def plans_of(optimizer: SINGD) -> list[Plan]:
    """Check everything about a step of all groups that SINGD trains itself.

    Raises:
        ValueError: For a bad option.
        RuntimeError: For a lost gradient or a replaced parameter.
        TypeError: For a sparse gradient.
        KeyError: For an entry that is missing in the state.
    """
    plans = []
    for group, arguments, step, factors_are_due in optimizer._gatherer.step_arguments():
        options = optimizer._checked[group]  # which have just been looked at
        lr_cov = options.lr_cov_at(step) if factors_are_due else None
        plans.append(Plan(group, arguments, options, step, lr_cov, optimizer._calls[group]))
    return plans


def step_factors(optimizer: SINGD, plan: Plan, scales: Scales) -> None:
    """Update the factors of the layers whose modules were called, from their statistics."""
    report = update_factors(plan, scales)
    if report is None:
        return
    outcomes, unseen = report
    if unseen and optimizer._handles:
        optimizer._warn_once(
            f"layers {unseen} have gradients, but their modules were not called: their factors "
            "stay as they are"
        )
    plan.calls.factor_incidents.read(outcomes, plan.arguments.factors)


def step_parameters(plan: Plan, scales: Scales, divisors: list[Tensor] | None) -> None:
    """Update the parameters; gradients are divided by `divisors`, one a layer, if given."""
    outcomes: Tensor | None
    if divisors and plan.options.max_update_norm is not None:
        outcomes = update_layer_by_layer(plan, scales, divisors)
    else:
        if divisors:  # the same for all layers
            scales = scales._replace(gradient=divisors[0])
        outcomes = update_parameters(plan, plan.arguments, scales)
    if outcomes is not None:
        plan.calls.parameter_incidents.read(outcomes, plan.arguments)


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
