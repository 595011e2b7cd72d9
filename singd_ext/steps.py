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

    arguments: _C.StepArguments  # of the layers that have a gradient
    options: Hyperparameters
    step: int
    lr_cov: float | None  # β₁; None if the factors are not due
    factors: _C.FactorArguments | None  # of those of the layers that have statistics, if due


def plan_of(optimizer: SINGD, group: int) -> Plan:
    """Check everything about a group's step.

    Raises:
        ValueError: For a bad option.
        RuntimeError: For a lost gradient or a replaced parameter.
        TypeError: For a sparse gradient.
        KeyError: For an entry that is missing in the state.
    """
    options, step = optimizer.options(group), optimizer.param_groups[group]["steps"]
    lr_cov = options.lr_cov_at(step) if optimizer.factors_due(group) else None
    arguments = optimizer._gatherer.step_arguments(
        group, has_momenta=options.momentum != 0, factors_are_due=lr_cov is not None
    )
    factors = None if lr_cov is None else arguments.factors(has_momenta=options.alpha1 != 0)
    return Plan(arguments, options, step, lr_cov, factors)


def step_factors(optimizer: SINGD, plan: Plan, scales: Scales, calls: GroupCalls) -> None:
    """Update the factors of the layers whose modules were called, from their statistics."""
    arguments = plan.factors
    assert plan.lr_cov is not None and arguments is not None
    if arguments.unseen and optimizer._handles:
        optimizer._warn_once(
            f"layers {arguments.unseen} have gradients, but their modules were not called: their "
            "factors stay as they are"
        )
    outcomes = update_factors(arguments, plan.options, plan.step, plan.lr_cov, scales, calls)
    calls.factor_incidents.read(outcomes, arguments)
    arguments.forget_statistics()


def step_parameters(
    plan: Plan, scales: Scales, calls: GroupCalls, divisor: list[Tensor] | None
) -> None:
    """Update the parameters; gradients are divided by `divisor`, one or one a layer, if given."""
    arguments = plan.arguments
    if divisor is not None and plan.options.max_update_norm is not None:
        outcomes = update_layer_by_layer(arguments, plan.options, plan.step, scales, calls, divisor)
    else:
        if divisor:
            scales = scales._replace(gradient=divisor[0])
        outcomes = update_parameters(arguments, plan.options, plan.step, scales, calls)
    calls.parameter_incidents.read(outcomes, arguments)


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
