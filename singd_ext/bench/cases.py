"""Every operator on operands of one shape: how to call it, and the same in plain PyTorch.

Factors are near the identity and rows are correlated, so that a wrong weight or a missing entry
shows in the results. Least bytes count what an operator must read and write, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import StructuredMatrix, ops
from . import plain, work
from .plain import Plain, Toeplitz

Operands = Mapping[str, Any]  # a tensor, or a list of one tensor a layer
Function = Callable[[Operands], list[Tensor]]

LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 0.01
LR_COV, DAMPING, ALPHA1 = 1e-3, 0.1, 0.5


@dataclass(frozen=True)
class Shape:
    """Sizes of the operands.

    Attributes:
        rows: Rows of X, m.
        d_o, d_i: Dimensions of C and K; operators on one factor take K.
        layers: Layers in a call of the operators that take lists.
    """

    rows: int
    d_o: int
    d_i: int
    layers: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read "1024x768x768x4": rows x d_o x d_i x layers."""
        sizes = text.split("x")
        if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ValueError(f"a shape is ROWSxD_OxD_IxLAYERS such as 1024x768x768x4, not '{text}'")
        return cls(*map(int, sizes))


@dataclass(frozen=True)
class Case:
    """One operator on one structure, shape and dtype.

    Attributes:
        shape: In words.
        operands: Tensors, some of which the calls change.
        ours, plain: Take operands and return the results, changed operands included.
        nbytes: Least bytes.
        flop: Operations, 0 where there are none to speak of.
    """

    shape: str
    operands: Operands
    ours: Function
    plain: Function
    nbytes: int
    flop: float


class Setting:
    """What the cases of one structure, shape and dtype are made from."""

    def __init__(self, spec: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.shape, self.dtype, self.device = spec, shape, dtype, device
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.K, self.C = plain.structure(spec, shape.d_i), plain.structure(spec, shape.d_o)
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *sizes: int) -> Tensor:
        """Normal numbers."""
        numbers = torch.randn(*sizes, generator=self._generator, device=self.device)
        return numbers.to(self.dtype)

    def correlated_rows(self, features: int) -> Tensor:
        """X [m, features], whose features have a part in common."""
        rows = self.normal(self.shape.rows, features)
        return rows + 0.5 * self.normal(self.shape.rows, 1)

    def factor(self, p: Plain) -> Tensor:
        """The storage of a factor I + N / √d."""
        noise = p.extract(self.normal(p.dim, p.dim)) / (2 * math.sqrt(p.dim))
        eye = StructuredMatrix.eye(p.spec, p.dim, self.dtype, self.device)
        return eye.data + noise

    def statistic(self, p: Plain, factor: Tensor) -> Tensor:
        """The statistic of correlated rows."""
        return p.statistic(self.correlated_rows(p.dim), factor).to(self.wide)


def project(s: Setting) -> Case:
    """Π of a symmetric matrix: only the entries on the pattern are read."""
    d = s.K.dim
    square = s.normal(d, d)
    symmetric = (square + square.mT).contiguous()
    pattern = d * (d + 1) // 2 if isinstance(s.K, Toeplitz) else work.stored(s.K)
    return Case(
        f"{d} x {d}",
        {"S": symmetric},
        lambda x: [ops.project(x["S"], s.spec)],
        lambda x: [s.K.project(x["S"])],
        (pattern + work.stored(s.K)) * s.dtype.itemsize,
        0,
    )


def extract(s: Setting) -> Case:
    """The entries on the pattern."""
    d = s.K.dim
    return Case(
        f"{d} x {d}",
        {"S": s.normal(d, d)},
        lambda x: [ops.extract(x["S"], s.spec)],
        lambda x: [s.K.extract(x["S"])],
        2 * work.stored(s.K) * s.dtype.itemsize,
        0,
    )


def to_dense(s: Setting) -> Case:
    """A factor as a matrix."""
    d = s.K.dim
    return Case(
        f"{d} x {d}",
        {"K": s.factor(s.K)},
        lambda x: [ops.to_dense(x["K"], d, s.spec)],
        lambda x: [s.K.to_dense(x["K"])],
        (work.stored(s.K) + d * d) * s.dtype.itemsize,
        0,
    )


def project_gram(s: Setting) -> Case:
    """Π(XᵀX)."""
    rows = s.correlated_rows(s.K.dim)
    return Case(
        f"{s.shape.rows} x {s.K.dim}",
        {"X": rows},
        lambda x: [ops.project_gram(x["X"], s.spec)],
        lambda x: [s.K.project_gram(x["X"])],
        work.nbytes_of(rows) + work.stored(s.K) * s.wide.itemsize,
        work.row_products(s.K, s.shape.rows, with_factor=False),
    )


def structured_matmul(s: Setting) -> Case:
    """X K."""
    d, rows, factor = s.K.dim, s.correlated_rows(s.K.dim), s.factor(s.K)
    return Case(
        f"{s.shape.rows} x {d}",
        {"K": factor, "X": rows},
        lambda x: [ops.structured_matmul(x["K"], d, s.spec, x["X"], side="right")],
        lambda x: [s.K.right(x["K"], x["X"])],
        2 * work.nbytes_of(rows) + work.nbytes_of(factor),
        work.apply_factor(s.K, s.shape.rows),
    )


def structured_product(s: Setting) -> Case:
    """A B of two factors of one structure."""
    d, a, b = s.K.dim, s.factor(s.K), s.factor(s.K)
    return Case(
        f"{d} x {d}",
        {"A": a, "B": b},
        lambda x: [ops.structured_product(x["A"], x["B"], d, s.spec)],
        lambda x: [s.K.product(x["A"], x["B"])],
        3 * work.nbytes_of(a),
        work.apply_factor(s.K, work.thin_rows(s.K)),
    )


def factor_gram(s: Setting) -> Case:
    """Π(KᵀK)."""
    d, factor = s.K.dim, s.factor(s.K)
    return Case(
        f"{d} x {d}",
        {"K": factor},
        lambda x: [ops.factor_gram(x["K"], d, s.spec)],
        lambda x: [s.K.factor_gram(x["K"])],
        2 * work.nbytes_of(factor),
        work.apply_factor(s.K, work.thin_rows(s.K)),
    )


def accumulate_statistic(s: Setting) -> Case:
    """The statistic of a micro-batch, compared by the curvature that follows from it."""
    d, rows, factor = s.K.dim, s.correlated_rows(s.K.dim), s.factor(s.K)
    statistic = torch.zeros_like(factor, dtype=s.wide)

    def ours(x: Operands) -> list[Tensor]:
        ops.accumulate_statistic_(x["statistic"], x["X"].unsqueeze(1), x["K"], d, s.spec)
        return [x["statistic"]]

    def rival(x: Operands) -> list[Tensor]:
        x["statistic"].add_(s.K.statistic(x["X"], x["K"]))
        return [x["statistic"]]

    return Case(
        f"{s.shape.rows} x {d}",
        {"statistic": statistic, "X": rows, "K": factor},
        ours,
        rival,
        work.nbytes_of(rows)
        + 2 * work.nbytes_of(statistic)
        + (not s.K.keeps_statistic_of_u) * work.nbytes_of(factor),
        work.row_products(s.K, s.shape.rows, with_factor=True),
    )


def update_factors(s: Setting) -> Case:
    """Both factors and Riemannian momenta of all layers."""
    layers = range(s.shape.layers)
    m, n, d_i, d_o = s.shape.rows, s.shape.layers, s.K.dim, s.C.dim
    K, C = [s.factor(s.K) for _ in layers], [s.factor(s.C) for _ in layers]
    operands = {
        "K": K,
        "C": C,
        "m_K": [torch.zeros_like(k) for k in K],
        "m_C": [torch.zeros_like(c) for c in C],
        "s_K": [s.statistic(s.K, k) for k in K],
        "s_C": [s.statistic(s.C, c) for c in C],
        "rejected": [torch.zeros((), dtype=torch.int64, device=s.device) for _ in layers],
    }
    memory = _memory(n, s.device)

    def ours(x: Operands) -> list[Tensor]:
        ops.update_factors_(
            x["K"], x["C"], x["m_K"], x["m_C"], x["rejected"], x["s_K"], x["s_C"],
            [1 / m] * n, [1 / m] * n, [d_i] * n, [d_o] * n, s.spec, s.spec,
            lr_cov=torch.tensor(LR_COV, dtype=torch.float64), damping=DAMPING, alpha1=ALPHA1,
            kfac_like=False, normalize_lr_cov=False, expm_order=1, step_cap=math.inf, **memory,
        )  # fmt: skip
        return [*x["K"], *x["C"], *x["m_K"], *x["m_C"]]

    def rival(x: Operands) -> list[Tensor]:
        for layer in layers:
            _update_factors_of(x, layer, s.K, s.C, 1 / m)
        return [*x["K"], *x["C"], *x["m_K"], *x["m_C"]]

    # Factors and momenta are read and written, statistics read.
    changed = [t for name in ("K", "C", "m_K", "m_C") for t in operands[name]]
    nbytes = 2 * work.nbytes_of(*changed) + work.nbytes_of(*operands["s_K"], *operands["s_C"])
    flop = sum(n * 2 * work.apply_factor(p, work.thin_rows(p)) for p in (s.K, s.C))
    return Case(f"{d_o} x {d_i}, {n} layers", operands, ours, rival, nbytes, flop)


def _update_factors_of(x: Operands, layer: int, p_K: Plain, p_C: Plain, scale: float) -> None:
    """Figure 4 for one layer."""
    sides = ((p_K, "K", "s_K", "m_K"), (p_C, "C", "s_C", "m_C"))
    curvature, gram, traces = [], [], []
    for p, factor, statistic, _ in sides:
        k = x[factor][layer]
        wide = k.to(x[statistic][layer].dtype)
        curvature.append(p.curvature(scale * x[statistic][layer], wide))
        gram.append(p.factor_gram(wide))
        traces.append((p.trace(curvature[-1]) / p.dim, p.trace(gram[-1]) / p.dim))
    for side, (p, factor, _, momentum) in enumerate(sides):
        k, m = x[factor][layer], x[momentum][layer]
        trace_h, trace_gram = traces[1 - side]
        eye = StructuredMatrix.eye(p.spec, p.dim, gram[side].dtype, k.device).data
        step = trace_h * curvature[side] + DAMPING * trace_gram * gram[side] - eye
        new = ALPHA1 * m.to(step.dtype) + 0.5 * step
        m.copy_(new)
        k.copy_(k - LR_COV * p.product(k.to(new.dtype), new))


def preconditioned_update(s: Setting) -> Case:
    """The fused step of all layers, with bias-free weights of the dtype and factors alike."""
    layers = range(s.shape.layers)
    d_i, d_o, n = s.K.dim, s.C.dim, s.shape.layers
    empty = [torch.empty(0, dtype=s.dtype, device=s.device) for _ in layers]
    K, C = [s.factor(s.K) for _ in layers], [s.factor(s.C) for _ in layers]
    operands = {
        "W": [s.normal(d_o, d_i) for _ in layers],
        "M": [torch.zeros(d_o, d_i, dtype=s.dtype, device=s.device) for _ in layers],
        "G": [s.normal(d_o, d_i) for _ in layers],
        "K": K,
        "C": C,
        "P_K": _products(s.K, K),
        "P_C": _products(s.C, C),
        "skipped": [torch.zeros((), dtype=torch.int64, device=s.device) for _ in layers],
    }
    memory = _memory(n, s.device)

    def ours(x: Operands) -> list[Tensor]:
        ops.preconditioned_update_(
            x["W"], empty, x["M"], empty, x["skipped"], x["G"], empty, x["K"], x["C"],
            s.spec, s.spec, lr=torch.tensor(LR, dtype=torch.float64), momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY, P_K=x["P_K"], P_C=x["P_C"], **memory,
        )  # fmt: skip
        return [*x["W"], *x["M"]]

    def rival(x: Operands) -> list[Tensor]:
        for layer in layers:
            step = _precondition(x, layer, s.K, s.C)
            x["M"][layer].mul_(MOMENTUM).add_(step).add_(x["W"][layer], alpha=WEIGHT_DECAY)
            x["W"][layer].add_(x["M"][layer], alpha=-LR)
        return [*x["W"], *x["M"]]

    # W and M are read and written, G is read; of a dense factor the cached product is.
    factors = [p if p.numel() else k for p, k in zip(operands["P_K"], K, strict=True)]
    factors += [p if p.numel() else c for p, c in zip(operands["P_C"], C, strict=True)]
    nbytes = 5 * work.nbytes_of(*operands["G"]) + work.nbytes_of(*factors)
    flop = n * (work.step_products(s.K, d_o) + work.step_products(s.C, d_i))
    return Case(f"{d_o} x {d_i}, {n} layers", operands, ours, rival, nbytes, flop)


def _precondition(x: Operands, layer: int, p_K: Plain, p_C: Plain) -> Tensor:
    """C Cᵀ G K Kᵀ."""
    step = x["G"][layer]
    if x["P_K"][layer].numel():
        step = step @ x["P_K"][layer]
    else:
        k = x["K"][layer]
        step = p_K.right(k, p_K.right(k, step), transpose=True)
    if x["P_C"][layer].numel():
        return x["P_C"][layer] @ step
    c = x["C"][layer]
    return p_C.left(c, p_C.left(c, step, transpose=True))


def _products(p: Plain, factors: list[Tensor]) -> list[Tensor]:
    """K Kᵀ of dense factors, which the optimizer keeps between updates of the factors."""
    if not isinstance(p, plain.Dense):
        return [k.new_empty(0) for k in factors]
    return [p.to_dense(k) @ p.to_dense(k).mT for k in factors]


def _memory(layers: int, device: torch.device) -> dict[str, Any]:
    """What the optimizer keeps from call to call, so that a call allocates nothing."""
    return {
        "outcomes": torch.empty(layers, dtype=torch.int64, device=device),
        "workspace": torch.empty(0, dtype=torch.uint8, device=device),
    }


OPERATORS: dict[str, Callable[[Setting], Case]] = {
    "project": project,
    "project_gram": project_gram,
    "extract": extract,
    "to_dense": to_dense,
    "structured_matmul": structured_matmul,
    "structured_product": structured_product,
    "factor_gram": factor_gram,
    "accumulate_statistic_": accumulate_statistic,
    "update_factors_": update_factors,
    "preconditioned_update_": preconditioned_update,
}


def clone(operands: Operands, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return copies, floating-point ones in another dtype if one is given."""

    def copy(tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.is_floating_point() else None
        return tensor.to(wanted or tensor.dtype, copy=True)

    return {
        name: [copy(t) for t in value] if isinstance(value, list) else copy(value)
        for name, value in operands.items()
    }


def tensors(operands: Operands) -> Iterable[Tensor]:
    """Yield all tensors."""
    for value in operands.values():
        yield from value if isinstance(value, list) else [value]
