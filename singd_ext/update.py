"""The two halves of a step for the layers of one parameter group: factors, then parameters.

Each is one call of an operator over lists of all layers, which stay in C++.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import _C
from .hyperparameters import Hyperparameters
from .memory import NO_PRODUCT, GroupCalls, keeps_product
from .scaling import Scales


def update_factors(
    arguments: _C.FactorArguments,
    options: Hyperparameters,
    step: int,
    lr_cov: float,
    scales: Scales,
    calls: GroupCalls,
) -> Tensor:
    """Update K, C, m_K and m_C from the layers' statistics; see `ops.update_factors_`."""
    outcomes, workspace = calls.factors.of(arguments)
    arguments.update_factors_(
        lr_cov=lr_cov,
        damping=float(options.damping),
        alpha1=float(options.alpha1),
        kfac_like=options.kfac_like,
        normalize_lr_cov=options.normalize_lr_cov,
        expm_order=int(options.expm_order),
        step_cap=float(options.step_cap),
        grad_scale=scales.statistic,
        found_inf=scales.found_inf,
        rounding_key=_rounding_key(options, step),
        outcomes=outcomes,
        workspace=workspace,
    )
    return outcomes


def update_parameters(
    arguments: _C.StepArguments,
    options: Hyperparameters,
    step: int,
    scales: Scales,
    calls: GroupCalls,
) -> Tensor:
    """Update weights, biases and their momenta; see `ops.preconditioned_update_`."""
    outcomes, workspace = calls.parameters.of(arguments)
    # With T = 1 none is of use in the next step, and a backward pass has other uses for memory.
    products = calls.products.of(arguments, workspace.device) if options.T > 1 else None
    arguments.preconditioned_update_(
        lr=options.lr_tensor,
        momentum=float(options.momentum),
        weight_decay=float(options.weight_decay),
        P_K=_products(arguments, options.T, 0),
        P_C=_products(arguments, options.T, 1),
        grad_scale=scales.gradient,
        found_inf=scales.found_inf,
        rounding_key=_rounding_key(options, step),
        outcomes=outcomes,
        workspace=workspace,
        products=products,
    )
    if arguments.copied:
        _write_back(arguments, has_momenta=options.momentum != 0)
    return outcomes


def update_layer_by_layer(
    arguments: _C.StepArguments,
    options: Hyperparameters,
    step: int,
    scales: Scales,
    calls: GroupCalls,
    divisors: Sequence[Tensor],
) -> Tensor:
    """`update_parameters` with a scale of the gradients for each layer: one call a layer."""
    outcomes = [
        update_parameters(
            arguments.of_layer(i), options, step, scales._replace(gradient=divisor), calls
        ).clone()
        for i, divisor in enumerate(divisors)
    ]
    return torch.cat(outcomes) if outcomes else torch.empty(0, dtype=torch.int64)


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


def _rounding_key(options: Hyperparameters, step: int) -> list[int] | None:
    return [int(options.seed), step] if options.stochastic_rounding else None
