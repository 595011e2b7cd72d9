"""Bounds of the step, per layer and over the whole model, computed without waiting for a device.

With P = C Cᵀ (∂ℓ/∂W) K Kᵀ and the step size β₂, a layer's P is multiplied by

    ν_l = min(1, max_update_norm / ‖β₂ P‖)                    Frobenius norm

and then, in every group with `kl_clip`, by

    ν = min(1, √(kl_clip / Σ_l ν_l² β₂² ⟨P, ∂ℓ/∂W⟩))          over the layers of all such groups

The sum is K-FAC's estimate of twice the Kullback-Leibler divergence that a step along P causes.
Both bound what enters the momentum M; weight decay is not part of it. ⟨P, ∂ℓ/∂W⟩ is computed as
‖Cᵀ (∂ℓ/∂W) K‖².
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from .hyperparameters import Hyperparameters
from .layers import Layer

if TYPE_CHECKING:
    from . import _C
    from .optimizer import SINGD

State = dict[str, Any]


def divisors(
    optimizer: SINGD, steps: Sequence[_C.GroupStep], grad_scale: Tensor | None
) -> dict[int, list[Tensor]]:
    """Return by what each layer's gradient is to be divided, for steps that have bounds, by group.

    That is `grad_scale` / ν_l ν, a 0-dimensional tensor a layer; the same tensor for all layers of
    a group without `max_update_norm`. Bounds that are not finite do not bind: the operator skips
    layers whose gradient is not finite by itself.
    """
    shrinkings: list[list[Tensor]] = []
    total: Tensor | None = None
    for step in steps:
        options = optimizer._checked[step.group]
        measured = [_measure(x, optimizer.state, options, grad_scale) for x in step.layers]
        shrinkings.append([nu for nu, _ in measured])
        for nu, change in measured:
            if change is None:
                continue
            term = (nu * nu * change).nan_to_num(0.0, 0.0, 0.0)
            total = term if total is None else total + term.to(total.device)
    return {
        step.group: _divided(grad_scale, nus, optimizer._checked[step.group], total)
        for step, nus in zip(steps, shrinkings, strict=True)
    }


@torch.no_grad()
def _measure(
    layer: Layer, state: dict[Tensor, State], options: Hyperparameters, grad_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return ν_l of a layer and, for `kl_clip`, β₂² ⟨P, ∂ℓ/∂W⟩."""
    own, (structure_K, structure_C) = layer.entries(state), options.structures
    columns = [
        layer.view(i, torch.zeros_like(p) if p.grad is None else p.grad).reshape(layer.dim_C, -1)
        for i, p in enumerate(layer.parameters)  # one of two may be frozen
    ]
    dtype = torch.float64 if columns[0].dtype == torch.float64 else torch.float32
    half = (torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]).to(dtype)
    # Divided first: its square must not overflow.
    half = half if grad_scale is None else half / grad_scale.to(half.device)
    lr = options.lr.to(half.device) if isinstance(options.lr, Tensor) else options.lr

    def multiplied(matrix: Tensor, transpose: bool) -> Tensor:
        left = ops.structured_matmul(
            own["C"], layer.dim_C, structure_C, matrix, side="left", transpose=transpose
        )
        return ops.structured_matmul(
            own["K"], layer.dim_K, structure_K, left, side="right", transpose=not transpose
        )

    half = multiplied(half, transpose=True)  # Cᵀ (∂ℓ/∂W) K
    nu, change = torch.ones((), dtype=torch.float64, device=half.device), None
    if options.kl_clip is not None:
        change = (lr * lr * _norm(half).square()).reshape(())
    if options.max_update_norm is not None:
        norm = lr * _norm(multiplied(half, transpose=False))
        nu = _shrinking(options.max_update_norm, norm.reshape(()))
    return nu, change


def _norm(matrix: Tensor) -> Tensor:
    """Return the Frobenius norm in float64: squares of large float32 numbers overflow there."""
    return torch.linalg.vector_norm(matrix, dtype=torch.float64)


def _shrinking(bound: float, value: Tensor) -> Tensor:
    """Return min(1, bound / value), and 1 for values that are not finite."""
    return torch.where(value.isfinite(), (bound / value).clamp(max=1.0), 1.0)


def _divided(
    grad_scale: Tensor | None, nus: list[Tensor], options: Hyperparameters, total: Tensor | None
) -> list[Tensor]:
    if not nus:
        return []
    shared = torch.ones_like(nus[0]) if grad_scale is None else grad_scale.to(nus[0].device)
    if options.kl_clip is not None and total is not None:
        shared = shared / _shrinking(options.kl_clip, total.to(nus[0].device)).sqrt()
    if options.max_update_norm is None:
        return [shared] * len(nus)
    return [shared / nu for nu in nus]
