"""Counted work of the operators: bytes, and operations of the leading terms in docs/structures.md.

A multiply-add is two operations; an FFT of n real numbers has 2.5 n log₂ n of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .plain import BlockDiagonal, Bordered, Dense, Plain, Toeplitz


def stored(p: Plain) -> int:
    """Return how many numbers a factor has."""
    return sum(torch.Size(shape).numel() for _, _, shape in p.sections)


def nbytes_of(*tensors: Tensor) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def thin_rows(p: Plain) -> int:
    """Return the rows of a factor that a product of two factors multiplies by the other one."""
    if isinstance(p, Bordered):
        return p.sections[0][2][0]
    if isinstance(p, BlockDiagonal):
        return p.sizes[0]
    return p.dim if isinstance(p, Dense) else 1


def _fft(p: Plain, count: float) -> float:
    length = 2 * p.dim
    return count * 2.5 * length * math.log2(length)


def apply_factor(p: Plain, rows: int) -> float:
    """Return the operations of K times so many rows, without those on a triangle's zeros."""
    if isinstance(p, Toeplitz):
        return _fft(p, 2 * rows)
    is_triangle = p.name in ("tril", "triu")
    return 2.0 * rows * (p.dim * (p.dim + 1) // 2 if is_triangle else stored(p))


def step_products(p: Plain, rows: int) -> float:
    """Return the operations of K Kᵀ on one side of a gradient; of dense factors one product."""
    if isinstance(p, Dense):
        return 2.0 * rows * p.dim**2
    return 2 * apply_factor(p, rows)


def row_products(p: Plain, rows: int, with_factor: bool) -> float:
    """Return the operations of a Gram matrix of rows on the pattern; a dense one is symmetric."""
    if isinstance(p, Dense):
        gram = 1.0 * rows * p.dim**2
        return gram + with_factor * min(4.0 * p.dim**3, 2.0 * rows * p.dim**2)
    gram = _fft(p, rows) if isinstance(p, Toeplitz) else 2.0 * rows * stored(p)
    return gram + (with_factor and not p.keeps_statistic_of_u) * apply_factor(p, rows)
