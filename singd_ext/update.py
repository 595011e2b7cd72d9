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
    from .steps import Plan

NO_INCIDENT = torch.zeros(1, dtype=torch.int64, device="cpu")  # the outcome of one layer


def update_factors(plan: Plan, scales: Scales) -> tuple[Tensor, list[str]] | None:
    """Update K, C, m_K and m_C from the layers' statistics, which are forgotten.

    See `ops.update_factors_`. Returns its outcomes, and names of layers without statistics.
    """
    options = plan.options
    assert plan.lr_cov is not None
    return plan.arguments.update_factors_(
        plan.calls.memory,
        plan.lr_cov,
        options.damping,
        options.alpha1,
        options.kfac_like,
        options.normalize_lr_cov,
        options.expm_order,
        options.step_cap,
        scales.statistic,
        scales.found_inf,
        _rounding_key(plan),
    )


def update_parameters(plan: Plan, arguments: _C.StepArguments, scales: Scales) -> Tensor | None:
    """Update weights, biases and their momenta; see `ops.preconditioned_update_`."""
    options, calls = plan.options, plan.calls
    P_K, P_C = _kept_products(plan, arguments)
    outcomes = arguments.preconditioned_update_(
        calls.memory,
        options.lr,
        options.momentum,
        options.weight_decay,
        P_K,
        P_C,
        scales.gradient,
        scales.found_inf,
        _rounding_key(plan),
        # With T = 1 none is of use in the next step, and a backward pass has other uses for memory.
        options.T > 1,
    )
    if calls.writes_back:
        _write_back(arguments, has_momenta=options.momentum != 0)
    return outcomes


def update_layer_by_layer(plan: Plan, scales: Scales, divisors: Sequence[Tensor]) -> Tensor:
    """`update_parameters` with a scale of the gradients for each layer: one call a layer."""
    outcomes = []
    for i, divisor in enumerate(divisors):
        layer = plan.arguments.of_layer(i)
        outcome = update_parameters(plan, layer, scales._replace(gradient=divisor))
        outcomes.append(NO_INCIDENT if outcome is None else outcome.clone())
    return torch.cat(outcomes)


def _kept_products(plan: Plan, arguments: _C.StepArguments) -> tuple[list[Tensor], list[Tensor]]:
    if not plan.calls.has_dense_factors:  # in most steps: their layers are not asked
        return [], []
    return _products(arguments, plan.options.T, 0), _products(arguments, plan.options.T, 1)


def _products(arguments: _C.StepArguments, T: int, side: int) -> list[Tensor]:
    """Return what is kept of K Kᵀ (side 0) or C Cᵀ (1) of every layer: nothing of sparse ones."""
    dense = (arguments.dense_K, arguments.dense_C)[side]
    if not dense:
        return []
    layers, factors = arguments.layers, (arguments.K, arguments.C)[side]
    result = [NO_PRODUCT] * len(arguments)
    for i in dense:
        dims = (layers[i].dim_K, layers[i].dim_C)
        factor = factors[i]
        if keeps_product(dims[side], dims[1 - side], T, factor.dtype):
            product = (layers[i].product_K, layers[i].product_C)[side]
            result[i] = product.of(factor, dims[side])
    return result


@torch.no_grad()
def _write_back(arguments: _C.StepArguments, has_momenta: bool) -> None:
    """Write W and its momentum back to weights of which W holds a copy."""
    layers = arguments.layers
    for i in arguments.copied:
        layer = layers[i]
        write = partial(layer.kind.write_back, layer.module)
        write(layer.parameters[0], arguments.weight[i])
        if has_momenta:
            write(arguments.momentum_buffer(i), arguments.momentum_weight[i])


def _rounding_key(plan: Plan) -> list[int] | None:
    options = plan.options
    return [options.seed, plan.step] if options.stochastic_rounding else None
