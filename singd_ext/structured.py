"""`StructuredMatrix`: a square matrix of one of SINGD's structures, stored without its zeros."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _C, ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def canonical_spec(spec: str) -> str:
    """Return the spec with aliases resolved and default sizes written out.

    Raises:
        ValueError: If the spec is unknown or has bad sizes; the message lists what is allowed.
    """
    if not isinstance(spec, str):
        raise TypeError(f"a structure is a string such as 'diagonal', not {spec!r}")
    return _C.canonical_spec(spec)


class StructuredMatrix:
    """A d × d matrix of one structure (Table 1 and Figures 5 and 8 of the paper).

    Attributes:
        data: The flat storage, a contiguous 1-D tensor.
        dim: d.
        spec: The canonical spec string, such as "block_diagonal:30".
    """

    def __init__(self, spec: str, dim: int, data: Tensor) -> None:
        """Wrap a storage tensor (shared, not copied).

        Raises:
            ValueError: If spec, dimension or the storage's size or strides do not fit.
        """
        self.spec = canonical_spec(spec)
        self.dim = dim
        size = _C.storage_size(spec, dim)
        if data.shape != (size,) or not data.is_contiguous():
            raise ValueError(
                f"a '{spec}' matrix of dimension {dim} needs contiguous storage of {size} numbers, "
                f"but data has shape {tuple(data.shape)} and strides {data.stride()}"
            )
        if data.dtype not in DTYPES:
            raise TypeError(f"data has dtype {data.dtype}; supported are {DTYPES}")
        self.data = data

    @classmethod
    def zeros(
        cls,
        spec: str,
        dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StructuredMatrix:
        """Return the zero matrix."""
        size = _C.storage_size(canonical_spec(spec), dim)
        return cls(spec, dim, torch.zeros(size, dtype=dtype, device=device))

    @classmethod
    def eye(
        cls,
        spec: str,
        dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StructuredMatrix:
        """Return the identity."""
        matrix = cls.zeros(spec, dim, dtype, device)
        matrix.data[_C.diagonal_slots(spec, dim)] = 1
        return matrix

    @classmethod
    def project(cls, spec: str, symmetric: Tensor) -> StructuredMatrix:
        """Return Π(S) of a dense symmetric S [d, d], Table 1's weighted extraction.

        Raises:
            ValueError: If S is not square or not symmetric.
        """
        data = ops.project(_detached(symmetric), spec)
        if not torch.allclose(symmetric, symmetric.mT, equal_nan=True):
            raise ValueError(
                "project needs a symmetric matrix; for the entries of another one use extract"
            )
        return cls(spec, symmetric.shape[0], data)

    @classmethod
    def project_gram(cls, spec: str, rows: Tensor) -> StructuredMatrix:
        """Return Π(XᵀX) for X [m, d], in float32, or float64 for float64 rows.

        Sparse structures read X once and never form the Gram matrix.
        """
        data = ops.project_gram(_detached(rows), spec)
        return cls(spec, rows.shape[1], data)

    @classmethod
    def extract(cls, spec: str, dense: Tensor) -> StructuredMatrix:
        """Return a matrix [d, d] of this structure, given densely.

        Raises:
            ValueError: If it is not of this structure; the message names an entry that is not.
        """
        matrix = cls(spec, dense.shape[0], ops.extract(_detached(dense), spec))
        wrong = (matrix.to_dense() != dense).logical_and(~dense.isnan()).nonzero()
        if len(wrong) > 0:
            i, j = wrong[0].tolist()
            raise ValueError(
                f"the matrix is not of structure '{matrix.spec}': entry [{i}, {j}] is "
                f"{dense[i, j].item()}, where the structure has {matrix.to_dense()[i, j].item()}"
            )
        return matrix

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the stored numbers."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Device of the stored numbers."""
        return self.data.device

    @property
    def shape(self) -> torch.Size:
        """(d, d)."""
        return torch.Size((self.dim, self.dim))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored numbers."""
        return self.data.numel() * self.data.element_size()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the named parts of the storage as views (docs/structures.md lists them)."""
        for name, offset, shape in _C.storage_sections(self.spec, self.dim):
            size = torch.Size(shape).numel()
            yield name, self.data[offset : offset + size].view(shape)

    def to_dense(self) -> Tensor:
        """Return the matrix as a tensor [d, d]."""
        return ops.to_dense(self.data, self.dim, self.spec)

    def trace(self) -> Tensor:
        """Return the trace, a 0-dimensional tensor (float32 for the 16-bit types)."""
        slots = torch.tensor(_C.diagonal_slots(self.spec, self.dim), device=self.device)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        entries = self.data[slots].to(dtype)
        return entries.sum() * (self.dim // len(slots))

    def gram(self) -> StructuredMatrix:
        """Return Π(SᵀS)."""
        return StructuredMatrix(
            self.spec, self.dim, ops.factor_gram(self.data, self.dim, self.spec)
        )

    @property
    def T(self) -> Transposed:
        """The transpose, for products with tensors."""
        return Transposed(self)

    def __matmul__(self, other: Tensor | StructuredMatrix) -> Tensor | StructuredMatrix:
        """Return S X for a tensor, or S S₂ for a matrix of the same structure."""
        if not isinstance(other, StructuredMatrix):
            return _matmul(self, other, side="left", transpose=False)
        if (self.spec, self.dim) != (other.spec, other.dim):
            raise ValueError(
                f"the product of '{self.spec}' of dimension {self.dim} and '{other.spec}' of "
                f"dimension {other.dim} has no structure of its own; use S @ other.to_dense()"
            )
        data = ops.structured_product(self.data, other.data, self.dim, self.spec)
        return StructuredMatrix(self.spec, self.dim, data)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        """Return X S."""
        return _matmul(self, other, side="right", transpose=False)

    def __repr__(self) -> str:
        """Return structure, dimension, dtype and device."""
        return (
            f"StructuredMatrix('{self.spec}', dim={self.dim}, dtype={self.dtype}, "
            f"device='{self.device}')"
        )


class Transposed:
    """Sᵀ of a `StructuredMatrix`: a view that multiplies tensors."""

    def __init__(self, matrix: StructuredMatrix) -> None:
        self._matrix = matrix

    @property
    def T(self) -> StructuredMatrix:
        """S."""
        return self._matrix

    def to_dense(self) -> Tensor:
        """Return Sᵀ as a tensor [d, d]."""
        return self._matrix.to_dense().mT

    def __matmul__(self, other: Tensor) -> Tensor:
        """Return Sᵀ X."""
        return _matmul(self._matrix, other, side="left", transpose=True)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        """Return X Sᵀ."""
        return _matmul(self._matrix, other, side="right", transpose=True)


def _detached(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "products with structured matrices are not differentiable; use torch.no_grad() or "
            "detach() the tensor"
        )
    return tensor


def _matmul(matrix: StructuredMatrix, other: Tensor, side: str, transpose: bool) -> Tensor:
    """Product with a tensor of any leading dimensions, as torch.matmul shapes it."""
    other = _detached(other)
    if other.ndim == 0:
        raise ValueError("a structured matrix does not multiply a 0-dimensional tensor")
    vector = other.ndim == 1
    columns = other.unsqueeze(1) if vector and side == "left" else other
    if side == "left":  # [..., d, n] -> [d, (...) n]
        columns = columns.movedim(-2, 0)
    flat = columns.reshape(columns.shape[0], -1) if side == "left" else _rows(columns)
    product = ops.structured_matmul(
        matrix.data, matrix.dim, matrix.spec, flat, side=side, transpose=transpose
    ).view(columns.shape)
    if side == "left":
        product = product.movedim(0, -2)
    return product.squeeze(1) if vector and side == "left" else product


def _rows(tensor: Tensor) -> Tensor:
    """[..., d] as [rows, d], also without rows."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
