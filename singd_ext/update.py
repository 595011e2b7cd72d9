"""The two halves of a step for the layers of one parameter group: factors, then parameters.

Each is one call of an operator over lists of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .hyperparameters import Hyperparameters
from .layers import Gradients, Layer, State
from .memory import FactorProduct, GroupCalls, keeps_product
from .scaling import Scales

# Holds the place of the bias of a layer without one.
_NO_BIAS = torch.empty(0)


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
    # W = [weight, bias]; of a layer of one parameter, that one takes the weight's place.
    states = [layer.entries(state) for layer in layers]
    K, C = [s["K"] for s in states], [s["C"] for s in states]
    owned = [(layer.parameters, g) for layer, g in zip(layers, gradients, strict=True)]
    weights, biases = _parts(layers, [list(map(_target, ps, gs)) for ps, gs in owned])
    momenta: list[Tensor] = []
    bias_momenta: list[Tensor] = []
    if options.momentum != 0:
        buffers = [([state[p]["momentum_buffer"] for p in ps], gs) for ps, gs in owned]
        momenta, bias_momenta = _parts(layers, [list(map(_target, bs, gs)) for bs, gs in buffers])
    outcomes, workspace = calls.parameters.of(weights)
    ops.preconditioned_update_(
        weights,
        biases,
        momenta,
        bias_momenta,
        [s["skipped"] for s in states],
        *_parts(layers, [list(map(_gradient, ps, gs)) for ps, gs in owned]),
        K,
        C,
        *options.structures,
        lr=options.lr_tensor,
        momentum=float(options.momentum),
        weight_decay=float(options.weight_decay),
        P_K=_products([(x.product_K, x.dim_K) for x in layers], K, options.structures[0]),
        P_C=_products([(x.product_C, x.dim_C) for x in layers], C, options.structures[1]),
        grad_scale=scales.gradient,
        found_inf=scales.found_inf,
        rounding_key=_rounding_key(options, step),
        outcomes=outcomes,
        workspace=workspace,
        products=calls.products.of(K + C, workspace.device),
    )
    for i, layer in enumerate(layers):
        if layer.is_copied and gradients[i][0] is not None:
            owner = layer.parameters[0]
            layer.kind.write_back(layer.module, owner, weights[i])
            if momenta:
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


def _parts(
    layers: Sequence[Layer], tensors: Sequence[Sequence[Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return every layer's part of W of its first parameter, and of its second."""
    first = [layer.view(0, own[0]) for layer, own in zip(layers, tensors, strict=True)]
    second = [
        layer.view(1, own[1]) if len(own) > 1 else _NO_BIAS
        for layer, own in zip(layers, tensors, strict=True)
    ]
    return first, second


# A parameter that was frozen after construction has no gradient. It is part of W, with a gradient
# of zero, and is kept: the operator gets a copy.
def _target(tensor: Tensor, gradient: Tensor | None) -> Tensor:
    return tensor.clone() if gradient is None else tensor


def _gradient(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def _products(
    kept: Sequence[tuple[FactorProduct, int]], factors: Sequence[Tensor], structure: str
) -> list[Tensor]:
    """Return what is kept of every factor's K Kᵀ: nothing at all for sparse structures."""
    if not any(keeps_product(structure, dim) for _, dim in kept):
        return []
    return [
        product.of(factor, dim, structure)
        for (product, dim), factor in zip(kept, factors, strict=True)
    ]


def _rounding_key(options: Hyperparameters, step: int) -> list[int] | None:
    return [int(options.seed), step] if options.stochastic_rounding else None
