"""The two halves of a step for the layers of one parameter group: factors, then parameters.

Each is one call of an operator over lists of all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from . import ops
from .hyperparameters import Hyperparameters
from .layers import Gradients, Layer, State
from .memory import NO_PRODUCT, FactorProduct, GroupCalls, keeps_product
from .scaling import Scales


def update_factors(
    layers: Sequence[Layer],
    states: Sequence[State],
    options: Hyperparameters,
    step: int,
    lr_cov: float,
    scales: Scales,
    calls: GroupCalls,
) -> Tensor:
    """Update K, C, m_K and m_C from the layers' statistics; see `ops.update_factors_`."""
    momenta = states if options.alpha1 != 0 else []
    for layer in layers:
        layer.product_K.drop()
        layer.product_C.drop()
    calls.products.drop()
    outcomes, workspace = calls.factors.of([s["K"] for s in states])
    return ops.update_factors_(
        [s["K"] for s in states],
        [s["C"] for s in states],
        [s["m_K"] for s in momenta],
        [s["m_C"] for s in momenta],
        [s["rejected"] for s in states],
        [s["statistic_K"] for s in states],
        [s["statistic_C"] for s in states],
        [1.0 / s["rows"] for s in states],
        [float(s["loss_terms"]) for s in states],
        [layer.dim_K for layer in layers],
        [layer.dim_C for layer in layers],
        *options.structures,
        lr_cov=torch.tensor(lr_cov, dtype=torch.float64),
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


def update_parameters(
    layers: Sequence[Layer],
    gradients: Sequence[Gradients],
    state: dict[Tensor, dict[str, Any]],
    options: Hyperparameters,
    step: int,
    scales: Scales,
    calls: GroupCalls,
) -> Tensor:
    """Update weights, biases and their momenta; see `ops.preconditioned_update_`."""
    has_momentum = options.momentum != 0
    rows = [
        _arguments(layer, own, state, has_momentum)
        for layer, own in zip(layers, gradients, strict=True)
    ]
    columns = map(list, zip(*rows, strict=True)) if rows else ([] for _ in range(9))
    weights, biases, grad_weights, grad_biases, K, C, skipped, momenta, bias_momenta = columns
    outcomes, workspace = calls.parameters.of(weights)
    dims = [x.dim_K for x in layers], [x.dim_C for x in layers]
    # With T = 1 none is of use in the next step, and a backward pass has other uses for memory.
    products = calls.products.of(K + C, workspace.device) if options.T > 1 else None
    ops.preconditioned_update_(
        weights,
        biases,
        momenta if has_momentum else [],
        bias_momenta if has_momentum else [],
        skipped,
        grad_weights,
        grad_biases,
        K,
        C,
        *options.structures,
        lr=options.lr_tensor,
        momentum=float(options.momentum),
        weight_decay=float(options.weight_decay),
        P_K=_products(options, 0, dims[0], dims[1], K, (x.product_K for x in layers)),
        P_C=_products(options, 1, dims[1], dims[0], C, (x.product_C for x in layers)),
        grad_scale=scales.gradient,
        found_inf=scales.found_inf,
        rounding_key=_rounding_key(options, step),
        outcomes=outcomes,
        workspace=workspace,
        products=products,
    )
    for i, layer in enumerate(layers):
        if layer.is_copied and gradients[i][0] is not None:
            owner = layer.parameters[0]
            layer.kind.write_back(layer.module, owner, weights[i])
            if has_momentum:
                layer.kind.write_back(layer.module, state[owner]["momentum_buffer"], momenta[i])
    return outcomes


def update_layer_by_layer(
    layers: Sequence[Layer],
    gradients: Sequence[Gradients],
    state: dict[Tensor, dict[str, Any]],
    options: Hyperparameters,
    step: int,
    scales: Scales,
    calls: GroupCalls,
    divisors: Sequence[Tensor],
) -> Tensor:
    """`update_parameters` with a scale of the gradients for each layer: one call a layer."""
    outcomes = [
        update_parameters(
            [layer], [grads], state, options, step, scales._replace(gradient=divisor), calls
        ).clone()
        for layer, grads, divisor in zip(layers, gradients, divisors, strict=True)
    ]
    return torch.cat(outcomes) if outcomes else torch.empty(0, dtype=torch.int64)


def _arguments(
    layer: Layer, gradients: Gradients, state: dict[Tensor, dict[str, Any]], has_momentum: bool
) -> tuple[Tensor, ...]:
    """Return a layer's entries of the operator's lists; without momentum the last two are any.

    W = [weight, bias]; of a layer of one parameter, that one takes the weight's place.
    """
    own = layer.entries(state)
    targets: Sequence[Tensor] = layer.parameters
    grads: Sequence[Any] = gradients
    momenta: Sequence[Tensor] = targets
    if has_momentum:
        momenta = [state[p]["momentum_buffer"] for p in targets]
    for i, g in enumerate(gradients):
        if g is None:
            # A parameter that was frozen after construction has no gradient. It is part of W, with
            # a gradient of zero, and is kept: the operator gets a copy.
            grads = _replaced(grads, i, torch.zeros_like(targets[i]))
            targets = _replaced(targets, i, targets[i].clone())
            momenta = _replaced(momenta, i, momenta[i].clone())
    return (
        *layer.parts(targets),
        *layer.parts(grads),
        own["K"],
        own["C"],
        own["skipped"],
        *layer.parts(momenta),
    )


def _replaced(tensors: Sequence[Tensor], index: int, tensor: Tensor) -> list[Tensor]:
    return [*tensors[:index], tensor, *tensors[index + 1 :]]


def _products(
    options: Hyperparameters,
    side: int,
    dims: list[int],
    others: list[int],
    factors: list[Tensor],
    products: Iterable[FactorProduct],
) -> list[Tensor]:
    """Return what is kept of every factor's K Kᵀ: nothing at all for sparse structures."""
    structure = options.structures[side]
    kept = list(map(keeps_product, repeat(structure), dims, others, repeat(options.T)))
    if True not in kept:
        return []
    return [
        product.of(factor, dim) if keep else NO_PRODUCT
        for product, factor, dim, keep in zip(products, factors, dims, kept, strict=True)
    ]


def _rounding_key(options: Hyperparameters, step: int) -> list[int] | None:
    return [int(options.seed), step] if options.stochastic_rounding else None
