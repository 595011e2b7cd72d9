"""The two halves of a step for the layers of one parameter group: factors, then parameters.

Each is one call of an operator over lists of all layers, which stay in C++. It returns what there
may be to warn of: nothing, where outcomes are on the CPU and all is well.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _C
from .memory import NO_PRODUCT, keeps_product
from .scaling import Scales

if TYPE_CHECKING:
    from .optimizer import SINGD

NO_INCIDENT = torch.zeros(1, dtype=torch.int64, device="cpu")  # the outcome of one layer


def update_factors(optimizer: SINGD, step: _C.GroupStep, scales: Scales) -> None:
    """Update K, C, m_K and m_C from the statistics of the layers whose modules were called.

    See `ops.update_factors_`. The statistics are forgotten.
    """
    report = step.update_factors(scales.statistic, scales.found_inf)
    if report is None:
        return
    outcomes, unseen, missed = report
    if unseen and optimizer._handles:
        optimizer._warn_once(
            f"layers {unseen} have gradients, but their modules were not called, or a transposed "
            "view that they returned was changed in place: their factors stay as they are"
        )
    if missed:
        optimizer._warn_once(
            f"layers {missed} are used by steps between the updates of the factors, but not by the "
            "steps that update: their factors stay as they are; choose another T"
        )
    optimizer._incidents[step.group].factors.read(outcomes, step.factors)


def update_parameters(
    optimizer: SINGD, step: _C.GroupStep, scales: Scales, divisors: list[Tensor] | None
) -> None:
    """Update weights, biases and their momenta; see `ops.preconditioned_update_`.

    Gradients are divided by `divisors`, one a layer, if given.
    """
    options = optimizer._checked[step.group]
    if divisors and options.max_update_norm is not None:
        outcomes: Tensor | None = _update_one_by_one(step, options.T, scales, divisors)
    else:
        if divisors:  # the same for all layers
            scales = scales._replace(gradient=divisors[0])
        outcomes = _update(step, options.T, scales)
    if outcomes is not None:
        optimizer._incidents[step.group].parameters.read(outcomes, step)


def _update(step: _C.GroupStep, T: int, scales: Scales) -> Tensor | None:
    P_K: list[Tensor] = []
    P_C: list[Tensor] = []
    if step.has_dense_factors:
        P_K, P_C = _kept_products(step, T, 0), _kept_products(step, T, 1)
    outcomes = step.update_parameters(P_K, P_C, scales.gradient, scales.found_inf)
    if step.writes_back:
        _write_back(step)
    return outcomes


def _update_one_by_one(
    step: _C.GroupStep, T: int, scales: Scales, divisors: Sequence[Tensor]
) -> Tensor:
    """`_update` with a scale of the gradients for each layer: one call a layer."""
    outcomes = []
    for i, divisor in enumerate(divisors):
        outcome = _update(step.of_layer(i), T, scales._replace(gradient=divisor))
        outcomes.append(NO_INCIDENT if outcome is None else outcome.clone())
    return torch.cat(outcomes)


def _kept_products(step: _C.GroupStep, T: int, side: int) -> list[Tensor]:
    """Return what is kept of K Kᵀ (side 0) or C Cᵀ (1) of every layer: nothing of sparse ones."""
    dense = (step.dense_K, step.dense_C)[side]
    if not dense:
        return []
    layers, factors = step.layers, (step.K, step.C)[side]
    result = [NO_PRODUCT] * len(step)
    for i in dense:
        dims = (layers[i].dim_K, layers[i].dim_C)
        factor = factors[i]
        if keeps_product(dims[side], dims[1 - side], T, factor.dtype):
            product = (layers[i].product_K, layers[i].product_C)[side]
            result[i] = product.of(factor, dims[side])
    return result


@torch.no_grad()
def _write_back(step: _C.GroupStep) -> None:
    """Write W and its momentum back to weights of which W holds a copy."""
    layers, momenta = step.layers, step.momentum_weight
    for i in step.copied:
        layer = layers[i]
        write = partial(layer.kind.write_back, layer.module)
        write(layer.parameters[0], step.weight[i])
        if momenta:
            write(step.momentum_buffer(i), momenta[i])
