"""The two halves of a step for the layers of one parameter group: factors, then parameters.

Each is one call of an operator over lists of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ops
from .hyperparameters import Hyperparameters
from .layers import Layer, State
from .memory import CallMemory
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
    memory: CallMemory,
) -> Tensor:
    """Update K, C, m_K and m_C from the layers' statistics; see `ops.update_factors_`."""
    momenta = states if options.alpha1 != 0 else []
    for layer in layers:
        layer.product_K.drop()
        layer.product_C.drop()
    outcomes, workspace = memory.of([s["K"] for s in states])
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
    state: dict[Tensor, dict[str, Any]],
    options: Hyperparameters,
    step: int,
    scales: Scales,
    memory: CallMemory,
) -> Tensor:
    """Update weights, biases and their momenta; see `ops.preconditioned_update_`."""
    # W = [weight, bias]; of a layer of one parameter, that one takes the weight's place.
    states = [layer.entries(state) for layer in layers]
    weights, biases = _views(layers, 0, _target), _views(layers, 1, _target)
    has_momentum, momentum_of = options.momentum != 0, partial(_momentum_buffer, state)
    lr = options.lr
    momenta = _views(layers, 0, momentum_of) if has_momentum else []
    outcomes, workspace = memory.of(weights)
    ops.preconditioned_update_(
        weights,
        biases,
        momenta,
        _views(layers, 1, momentum_of) if has_momentum else [],
        [s["skipped"] for s in states],
        _views(layers, 0, _gradient),
        _views(layers, 1, _gradient),
        [s["K"] for s in states],
        [s["C"] for s in states],
        *options.structures,
        lr=lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64),
        momentum=float(options.momentum),
        weight_decay=float(options.weight_decay),
        P_K=[
            layer.product_K.of(s["K"], layer.dim_K, options.structures[0])
            for layer, s in zip(layers, states, strict=True)
        ],
        P_C=[
            layer.product_C.of(s["C"], layer.dim_C, options.structures[1])
            for layer, s in zip(layers, states, strict=True)
        ],
        grad_scale=scales.gradient,
        found_inf=scales.found_inf,
        rounding_key=_rounding_key(options, step),
        outcomes=outcomes,
        workspace=workspace,
    )
    for i, layer in enumerate(layers):
        if layer.is_copied and not _is_frozen(owner := layer.parameters[0]):
            layer.kind.write_back(layer.module, owner, weights[i])
            if has_momentum:
                layer.kind.write_back(layer.module, momentum_of(owner), momenta[i])
    return outcomes


def update_layer_by_layer(
    layers: Sequence[Layer],
    state: dict[Tensor, dict[str, Any]],
    options: Hyperparameters,
    step: int,
    scales: Scales,
    memory: CallMemory,
    divisors: Sequence[Tensor],
) -> Tensor:
    """`update_parameters` with a scale of the gradients for each layer: one call a layer."""
    outcomes = [
        update_parameters(
            [layer], state, options, step, scales._replace(gradient=divisor), memory
        ).clone()
        for layer, divisor in zip(layers, divisors, strict=True)
    ]
    return torch.cat(outcomes) if outcomes else torch.empty(0, dtype=torch.int64)


def _views(
    layers: Sequence[Layer], index: int, tensor_of: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return every layer's part of what `tensor_of` gives for its parameter number `index`."""
    return [
        layer.view(index, tensor_of(layer.parameters[index]))
        if index < len(layer.parameters)
        else _NO_BIAS
        for layer in layers
    ]


def _is_frozen(parameter: Tensor) -> bool:
    """Whether it was frozen after construction: part of W, with a gradient of zero, and kept."""
    return parameter.grad is None


def _target(parameter: Tensor) -> Tensor:
    return parameter.clone() if _is_frozen(parameter) else parameter


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _momentum_buffer(state: dict[Tensor, dict[str, Any]], parameter: Tensor) -> Tensor:
    buffer = state[parameter]["momentum_buffer"]
    return buffer.clone() if _is_frozen(parameter) else buffer


def _rounding_key(options: Hyperparameters, step: int) -> list[int] | None:
    return [int(options.seed), step] if options.stochastic_rounding else None
