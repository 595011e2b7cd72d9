"""The operators of singd_ext: typed wrappers and shape functions ("fakes").

The schemas are in `csrc/schemas.cpp`. A structured factor of dimension d travels as its flat
storage, a contiguous 1-D tensor whose parts `StructuredMatrix.named_tensors` names. `structure` is
a spec string such as `"block_diagonal:30"` (docs/structures.md). Every operator takes float64,
float32, bfloat16 and float16, computes in float64 for float64 and in float32 otherwise, and raises
ValueError or TypeError, naming what was given, before it changes anything. None is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C

_ops = torch.ops.singd_ext
# The choice among overloads, of which there is one, would cost a third of a small call: operators
# that every layer or every step calls are called by their overload.


def namespace() -> str:
    """Return the name of the operators that run: those of the emulator, in its tests."""
    return _ops.name


def project(symmetric: Tensor, structure: str) -> Tensor:
    """Return the storage of Π(S), the weighted extraction of Table 1, for a symmetric S [d, d]."""
    return _ops.project(symmetric, structure)


def project_gram(rows: Tensor, structure: str) -> Tensor:
    """Return the storage of Π(XᵀX) for X [m, d], in float32, or float64 for float64 rows.

    The sparse families read X once and never form the d × d Gram matrix (Table 2).
    """
    return _ops.project_gram(rows, structure)


def extract(dense: Tensor, structure: str) -> Tensor:
    """Return the entries of a matrix [d, d] on the structure's pattern, unweighted.

    Of a Toeplitz pattern, the last entry of each diagonal.
    """
    return _ops.extract(dense, structure)


def to_dense(factor: Tensor, dim: int, structure: str) -> Tensor:
    """Return the factor as a matrix [dim, dim]."""
    return _ops.to_dense(factor, dim, structure)


def structured_matmul(
    factor: Tensor,
    dim: int,
    structure: str,
    other: Tensor,
    *,
    side: str = "left",
    transpose: bool = False,
) -> Tensor:
    """Return `op(K) X` (side "left", X [dim, n]) or `X op(K)` (side "right", X [n, dim]).

    `op(K)` is K, or Kᵀ if `transpose`. The result has the promoted dtype of both.
    """
    return _ops.structured_matmul(factor, dim, structure, other, side=side, transpose=transpose)


def structured_product(a: Tensor, b: Tensor, dim: int, structure: str) -> Tensor:
    """Return the storage of the product A B of two factors of the same structure."""
    return _ops.structured_product(a, b, dim, structure)


def factor_gram(factor: Tensor, dim: int, structure: str) -> Tensor:
    """Return the storage of Π(KᵀK)."""
    return _ops.factor_gram(factor, dim, structure)


def accumulate_statistic_(
    statistic: Tensor,
    rows: Tensor,
    factor: Tensor,
    dim: int,
    structure: str,
    *,
    ones_column: bool = False,
    shared: str = "expand",
    overwrite: bool = False,
) -> None:
    """Add the rows of one micro-batch to the statistic of a factor, in place.

    What a statistic holds depends on the family (docs/structures.md): entries of U = Σ x xᵀ where
    Π(KᵀUK) needs only those, entries of KᵀUK otherwise. It is a sum: the mean over rows and the
    loss scaling are applied by `update_factors_`.

    Args:
        statistic: float32 or float64, the shape of the factor's storage.
        rows: [batch, shared, features], any dtype and strides.
        factor: Storage of K.
        dim: Dimension of K: features, plus 1 with `ones_column`.
        structure: Structure of K.
        ones_column: Whether every row is extended by a 1 (the bias).
        shared: "expand": every (batch, shared) position is a row (KFAC-expand). "mean", "sum": one
            row per batch entry, reduced over `shared` (KFAC-reduce: inputs take the mean, output
            gradients the sum).
        overwrite: Whether the statistic is new memory, whose numbers count for nothing.
    """
    _ops.accumulate_statistic_.default(
        statistic,
        rows,
        factor,
        dim,
        structure,
        ones_column=ones_column,
        shared=shared,
        overwrite=overwrite,
    )


def update_factors_(
    K: Sequence[Tensor],
    C: Sequence[Tensor],
    m_K: Sequence[Tensor],
    m_C: Sequence[Tensor],
    rejected: Sequence[Tensor],
    statistic_K: Sequence[Tensor],
    statistic_C: Sequence[Tensor],
    scale_K: Sequence[float],
    scale_C: Sequence[float],
    dim_K: Sequence[int],
    dim_C: Sequence[int],
    structure_K: str,
    structure_C: str,
    *,
    lr_cov: Tensor,
    damping: float,
    alpha1: float,
    kfac_like: bool,
    normalize_lr_cov: bool,
    expm_order: int,
    step_cap: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding_key: Sequence[int] | None = None,
    outcomes: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Update the Riemannian momenta and Kronecker factors of a list of layers (Figure 4), in place.

    Per layer, K, C, m_K and m_C are committed only if all four are finite; otherwise they stay bit
    for bit and the layer's `rejected` count (a 0-dimensional int64 tensor) goes up by one.

    Args:
        K, C, m_K, m_C: Storages; m_K and m_C are empty lists if `alpha1` is 0.
        rejected: One counter a layer.
        statistic_K, statistic_C: What `accumulate_statistic_` gathered.
        scale_K, scale_C: Factors that make them U (1 / rows) and G (loss terms).
        dim_K, dim_C: Dimensions d_i and d_o.
        structure_K, structure_C: Structures of all K and all C.
        lr_cov: β₁, a 0-dimensional tensor.
        damping: λ.
        alpha1: α₁, Riemannian momentum.
        kfac_like: IKFAC: the trace factors are 1.
        normalize_lr_cov: Divide β₁ by max(1, largest |entry| of the momentum).
        expm_order: Order after which the matrix exponential is cut, 1 or 2.
        step_cap: Bound of β₁‖m‖; larger steps are shortened to it.
        grad_scale: Loss scale of the backward passes; G is divided by its square.
        found_inf: If non-zero, nothing is done.
        rounding_key: [seed, step]: round bfloat16 stores stochastically.
        outcomes: int64 [layers], overwritten; without it a new tensor.
        workspace: uint8 memory of the call, enlarged where too small; kept from call to call, it
            saves allocations.

    Returns:
        `outcomes`: 0 committed, 1 rejected, 2 committed with a step shortened by the cap.
    """
    outcomes, workspace = _call_memory(statistic_K, outcomes, workspace)
    _ops.update_factors_.default(
        K,
        C,
        m_K,
        m_C,
        rejected,
        statistic_K,
        statistic_C,
        scale_K,
        scale_C,
        dim_K,
        dim_C,
        structure_K,
        structure_C,
        lr_cov=lr_cov,
        damping=damping,
        alpha1=alpha1,
        kfac_like=kfac_like,
        normalize_lr_cov=normalize_lr_cov,
        expm_order=expm_order,
        step_cap=step_cap,
        outcomes=outcomes,
        workspace=workspace,
        grad_scale=grad_scale,
        found_inf=found_inf,
        rounding_key=rounding_key,
    )
    return outcomes


def preconditioned_update_(
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    momentum_weight: Sequence[Tensor],
    momentum_bias: Sequence[Tensor],
    skipped: Sequence[Tensor],
    grad_weight: Sequence[Tensor],
    grad_bias: Sequence[Tensor],
    K: Sequence[Tensor],
    C: Sequence[Tensor],
    structure_K: str,
    structure_C: str,
    *,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    P_K: Sequence[Tensor] = (),
    P_C: Sequence[Tensor] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding_key: Sequence[int] | None = None,
    outcomes: Tensor | None = None,
    workspace: Tensor | None = None,
    products: Tensor | None = None,
) -> Tensor:
    """Update the parameters of a list of layers, in place (Figure 4, steps 2 and 3).

    M ← α₂ M + C Cᵀ (∂ℓ/∂W) K Kᵀ + γ W and W ← W − β₂ M, with W = [weight, bias] as a d_o × d_i
    matrix. A layer whose preconditioned gradient is not finite keeps W and M bit for bit, and its
    `skipped` count goes up by one.

    Args:
        weight: [d_o, ...] each; the other dimensions are flattened.
        bias: [d_o] each; an empty tensor holds the place of a layer without bias.
        momentum_weight, momentum_bias: M, like `weight` and `bias`; empty lists if `momentum` is 0.
        skipped: One 0-dimensional int64 counter a layer.
        grad_weight, grad_bias: Gradients, like `weight` and `bias`.
        K, C: Storages of the factors.
        structure_K, structure_C: Structures of all K and all C.
        lr: β₂, a 0-dimensional tensor.
        momentum: α₂.
        weight_decay: γ.
        P_K, P_C: K Kᵀ and C Cᵀ [d, d] of dense and triangular factors, where they are kept from
            step to step: one product a side instead of two. One tensor a layer, empty where there
            is none, or no tensors at all. In 16 bits they need not be positive definite.
        grad_scale: The gradients are divided by it.
        found_inf: If non-zero, nothing is done.
        rounding_key: [seed, step]: round bfloat16 stores stochastically.
        outcomes: int64 [layers], overwritten; without it a new tensor.
        workspace: uint8 memory of the call, enlarged where too small; kept from call to call, it
            saves allocations.
        products: uint8 memory that the CPU fills with K Kᵀ and C Cᵀ of sparse factors. Given to
            the next call as it is, it saves computing them again; give an empty tensor if a factor
            was changed or the layers are others. Without it they are not kept, and the workspace
            has those of few layers at a time.

    Returns:
        `outcomes`: 0 updated, 1 skipped.
    """
    outcomes, workspace = _call_memory(weight, outcomes, workspace)
    _ops.preconditioned_update_.default(
        weight,
        bias,
        momentum_weight,
        momentum_bias,
        skipped,
        grad_weight,
        grad_bias,
        K,
        C,
        P_K,
        P_C,
        structure_K,
        structure_C,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        outcomes=outcomes,
        workspace=workspace,
        products=products,
        grad_scale=grad_scale,
        found_inf=found_inf,
        rounding_key=rounding_key,
    )
    return outcomes


def _call_memory(
    layers: Sequence[Tensor], outcomes: Tensor | None, workspace: Tensor | None
) -> tuple[Tensor, Tensor]:
    device = layers[0].device if layers else None
    if outcomes is None:
        outcomes = torch.empty(len(layers), dtype=torch.int64, device=device)
    if workspace is None:
        workspace = torch.empty(0, dtype=torch.uint8, device=device)
    return outcomes, workspace


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("singd_ext::project")
def _(symmetric: Tensor, structure: str) -> Tensor:
    return symmetric.new_empty(_C.storage_size(structure, int(symmetric.shape[0])))


@torch.library.register_fake("singd_ext::project_gram")
def _(rows: Tensor, structure: str) -> Tensor:
    size = _C.storage_size(structure, int(rows.shape[1]))
    return rows.new_empty(size, dtype=_sum_dtype(rows.dtype))


@torch.library.register_fake("singd_ext::extract")
def _(dense: Tensor, structure: str) -> Tensor:
    return dense.new_empty(_C.storage_size(structure, int(dense.shape[0])))


@torch.library.register_fake("singd_ext::to_dense")
def _(factor: Tensor, dim: int, structure: str) -> Tensor:
    return factor.new_empty(dim, dim)


@torch.library.register_fake("singd_ext::structured_matmul")
def _(
    factor: Tensor,
    dim: int,
    structure: str,
    other: Tensor,
    *,
    side: str = "left",
    transpose: bool = False,
) -> Tensor:
    return other.new_empty(other.shape, dtype=torch.promote_types(factor.dtype, other.dtype))


@torch.library.register_fake("singd_ext::structured_product")
def _(a: Tensor, b: Tensor, dim: int, structure: str) -> Tensor:
    return a.new_empty(a.shape, dtype=torch.promote_types(a.dtype, b.dtype))


@torch.library.register_fake("singd_ext::factor_gram")
def _(factor: Tensor, dim: int, structure: str) -> Tensor:
    return torch.empty_like(factor)


@torch.library.register_fake("singd_ext::accumulate_statistic_")
def _(
    statistic: Tensor,
    rows: Tensor,
    factor: Tensor,
    dim: int,
    structure: str,
    *,
    ones_column: bool = False,
    shared: str = "expand",
    overwrite: bool = False,
) -> None:
    return None


@torch.library.register_fake("singd_ext::update_factors_")
@torch.library.register_fake("singd_ext::preconditioned_update_")
def _(*args: object, **kwargs: object) -> None:
    return None
