"""The operators' mathematics in plain PyTorch, as one would write it without singd_ext.

It is what the operators are checked against (in float64) and timed against (in the dtype of the
operands, as PyTorch's own operations take them). Every structure gets the algorithm that suits it:
no d × d matrix for a sparse one. Results own their memory. Factors are the flat storages that
docs/structures.md describes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _C


class Plain(ABC):
    """A structure at a dimension; R below is what is stored, K or its transpose."""

    keeps_statistic_of_u = True  # else the statistic is one of KᵀUK

    def __init__(self, spec: str, dim: int) -> None:
        self.spec, self.dim = spec, dim
        self.name, _, sizes = spec.partition(":")
        self.sizes = tuple(int(size) for size in sizes.split(",") if size)
        self.sections = _C.storage_sections(spec, dim)

    def parts(self, storage: Tensor) -> list[Tensor]:
        """Return the storage's parts as views."""
        return [
            storage[offset : offset + torch.Size(shape).numel()].view(shape)
            for _, offset, shape in self.sections
        ]

    @abstractmethod
    def extract(self, dense: Tensor) -> Tensor:
        """Return the entries of a matrix [d, d] on the pattern."""

    def project(self, symmetric: Tensor) -> Tensor:
        """Return Π(S)."""
        return self.weighted(self.extract(symmetric))

    def weighted(self, storage: Tensor) -> Tensor:
        """Return the storage times Table 1's weights."""
        return storage

    @abstractmethod
    def to_dense(self, storage: Tensor) -> Tensor:
        """Return the matrix [d, d]."""

    @abstractmethod
    def left(self, storage: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        """Return op(K) X for X [d, n]."""

    def right(self, storage: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        """Return X op(K) for X [n, d]."""
        return self.left(storage, x.mT, not transpose).mT

    @abstractmethod
    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the storage of A B."""

    @abstractmethod
    def gram_of_rows(self, rows: Tensor) -> Tensor:
        """Return the entries of XᵀX on the pattern, of X [m, d]."""

    def statistic(self, rows: Tensor, factor: Tensor) -> Tensor:
        """Return what `accumulate_statistic_` adds for X [m, d]."""
        return self.gram_of_rows(rows)

    @abstractmethod
    def curvature(self, statistic: Tensor, factor: Tensor) -> Tensor:
        """Return Π(KᵀUK) from the statistic."""

    def project_gram(self, rows: Tensor) -> Tensor:
        """Return Π(XᵀX) for X [m, d]."""
        return self.weighted(self.gram_of_rows(rows))

    def factor_gram(self, factor: Tensor) -> Tensor:
        """Return Π(KᵀK)."""
        eye = self.extract(torch.eye(self.dim, dtype=factor.dtype, device=factor.device))
        return self.curvature(eye, factor)

    @abstractmethod
    def trace(self, storage: Tensor) -> Tensor:
        """Return the trace."""


class Diagonal(Plain):
    """`diagonal`."""

    def extract(self, dense: Tensor) -> Tensor:
        return dense.diagonal().clone()

    def to_dense(self, storage: Tensor) -> Tensor:
        return storage.diag()

    def left(self, storage: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        return storage[:, None] * x

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def gram_of_rows(self, rows: Tensor) -> Tensor:
        return rows.square().sum(0, dtype=_sum_dtype(rows))

    def curvature(self, statistic: Tensor, factor: Tensor) -> Tensor:
        return statistic * factor.square()

    def trace(self, storage: Tensor) -> Tensor:
        return storage.sum()


class BlockDiagonal(Plain):
    """`block_diagonal:k`: batched products, and one of the remainder."""

    def _blocks(self, matrix: Tensor) -> list[Tensor]:
        """Rows [d, n] as [blocks, k, n] and the remainder's [1, r, n]."""
        k = self.sizes[0]
        whole = self.dim // k * k
        blocks = [matrix[:whole].unflatten(0, (-1, k))]
        return [*blocks, matrix[whole:].unsqueeze(0)] if whole < self.dim else blocks

    def _factors(self, storage: Tensor) -> list[Tensor]:
        return [part.view(-1, *part.shape[-2:]) for part in self.parts(storage)]

    def extract(self, dense: Tensor) -> Tensor:
        k = self.sizes[0]
        starts = range(0, self.dim, k)
        return torch.cat([dense[i : i + k, i : i + k].flatten() for i in starts])

    def to_dense(self, storage: Tensor) -> Tensor:
        return torch.block_diag(*(block for part in self._factors(storage) for block in part))

    def left(self, storage: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        pairs = zip(self._factors(storage), self._blocks(x), strict=True)
        return torch.cat([((k.mT if transpose else k) @ v).flatten(0, 1) for k, v in pairs])

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self._factors(a), self._factors(b), strict=True)
        return torch.cat([(left @ right).flatten() for left, right in pairs])

    def gram_of_rows(self, rows: Tensor) -> Tensor:
        grams = [(v @ v.mT).flatten() for v in self._blocks(rows.mT)]
        return torch.cat(grams).to(_sum_dtype(rows))

    def curvature(self, statistic: Tensor, factor: Tensor) -> Tensor:
        pairs = zip(self._factors(statistic), self._factors(factor), strict=True)
        return torch.cat([(k.mT @ u @ k).flatten() for u, k in pairs])

    def trace(self, storage: Tensor) -> Tensor:
        return torch.stack([x.diagonal(0, -2, -1).sum() for x in self._factors(storage)]).sum()


class Dense(Plain):
    """`dense`, `tril`, `triu`, and every structure whose block or border fills the factor."""

    keeps_statistic_of_u = False

    def _masked(self, dense: Tensor) -> Tensor:
        cut = {"tril": torch.tril, "triu": torch.triu}.get(self.name)
        return cut(dense) if cut else dense

    def extract(self, dense: Tensor) -> Tensor:
        return self._masked(dense).clone().flatten()

    def weighted(self, storage: Tensor) -> Tensor:
        if self.name not in ("tril", "triu"):
            return storage
        dense = self._masked(self._view(storage))
        return (2 * dense - dense.diagonal().diag()).flatten()

    def _view(self, storage: Tensor) -> Tensor:
        return storage.view(self.dim, self.dim)

    def to_dense(self, storage: Tensor) -> Tensor:
        return self._view(storage).clone()

    def left(self, storage: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        dense = self._view(storage)
        return (dense.mT if transpose else dense) @ x

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return (self._view(a) @ self._view(b)).flatten()

    def gram_of_rows(self, rows: Tensor) -> Tensor:
        return (rows.mT @ rows).flatten().to(_sum_dtype(rows))

    def statistic(self, rows: Tensor, factor: Tensor) -> Tensor:
        k = self._view(factor)
        if rows.shape[0] > 2 * self.dim:
            return (k.mT @ (rows.mT @ rows) @ k).flatten().to(_sum_dtype(rows))
        return self.gram_of_rows(rows @ k)

    def curvature(self, statistic: Tensor, factor: Tensor) -> Tensor:
        return self.weighted(statistic)

    def factor_gram(self, factor: Tensor) -> Tensor:
        k = self._view(factor)
        return self.weighted((k.mT @ k).flatten())

    def trace(self, storage: Tensor) -> Tensor:
        return self._view(storage).trace()


class Bordered(Plain):
    """Rank-k triangular and hierarchical: R is dense in the rows `border`, diagonal elsewhere."""

    def __init__(self, spec: str, dim: int) -> None:
        super().__init__(spec, dim)
        at_end = self.name.endswith("_topleft")
        head, tail = (*self.sizes, 0)[:2] if not at_end else (0, self.sizes[0])
        self.head, self.end = head, dim - min(tail, dim - head)
        self.transposed = self.name in ("rank_tril", "rank_triu_topleft")
        self.keeps_statistic_of_u = not self.transposed

    def _border(self, matrix: Tensor) -> Tensor:
        """The rows of the border."""
        return torch.cat((matrix[: self.head], matrix[self.end :]))

    def _inside(self, matrix: Tensor) -> Tensor:
        return matrix[self.head : self.end]

    def weighted(self, storage: Tensor) -> Tensor:
        border, diagonal = self.parts(storage)
        border = 2 * border
        border[: self.head, : self.head] /= 2
        border[self.head :, self.end :] /= 2
        border[self.head :, : self.head] = 0
        return torch.cat((border.flatten(), diagonal))

    def extract(self, dense: Tensor) -> Tensor:
        stored = dense.mT if self.transposed else dense
        border = self._border(stored)
        border[self.head :, : self.head] = 0
        return torch.cat((border.flatten(), self._inside(dense.diagonal())))

    def to_dense(self, storage: Tensor) -> Tensor:
        border, diagonal = self.parts(storage)
        dense = storage.new_zeros(self.dim, self.dim)
        self._inside(dense.diagonal()).copy_(diagonal)
        dense[: self.head], dense[self.end :] = border[: self.head], border[self.head :]
        return dense.mT if self.transposed else dense

    def left(self, storage: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        border, diagonal = self.parts(storage)
        inside = diagonal[:, None] * self._inside(x)
        if transpose == self.transposed:  # R X
            ends = border @ x
            return torch.cat((ends[: self.head], inside, ends[self.head :]))
        y = border.mT @ self._border(x)
        self._inside(y).add_(inside)
        return y

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.transposed:
            a, b = b, a
        (border, diagonal), (_, other) = self.parts(a), self.parts(b)
        rows = self.right(b, border, transpose=self.transposed)
        return torch.cat((rows.flatten(), diagonal * other))

    def gram_of_rows(self, rows: Tensor) -> Tensor:
        x = rows.mT
        inside = self._inside(x).square().sum(1, dtype=_sum_dtype(rows))
        return torch.cat(((self._border(x) @ rows).flatten().to(inside.dtype), inside))

    def statistic(self, rows: Tensor, factor: Tensor) -> Tensor:
        return self.gram_of_rows(self.right(factor, rows) if self.transposed else rows)

    def curvature(self, statistic: Tensor, factor: Tensor) -> Tensor:
        if self.transposed:
            return self.weighted(statistic)
        (e, diagonal), (u, u_diagonal) = self.parts(factor), self.parts(statistic)
        core, u_core = self._border(e.mT).mT, self._border(u.mT).mT
        border = core.mT @ self.right(factor, u)
        e_in, u_in = self._inside(e.mT).mT, self._inside(u.mT).mT
        cross = (e_in * (u_core @ e_in + 2 * diagonal * u_in)).sum(0)
        return self.weighted(torch.cat((border.flatten(), diagonal.square() * u_diagonal + cross)))

    def factor_gram(self, factor: Tensor) -> Tensor:
        if not self.transposed:
            return super().factor_gram(factor)
        border, diagonal = self.parts(factor)
        rows = self.right(factor, border)
        return self.weighted(torch.cat((rows.flatten(), diagonal.square())))

    def trace(self, storage: Tensor) -> Tensor:
        border, diagonal = self.parts(storage)
        return self._border(border.mT).trace() + diagonal.sum()


class Toeplitz(Plain):
    """`triu_toeplitz`, `tril_toeplitz`: FFTs, of 16-bit types in float32."""

    keeps_statistic_of_u = False

    def _counts(self, like: Tensor) -> Tensor:
        """Entries on each diagonal."""
        return torch.arange(self.dim, 0, -1, dtype=like.dtype, device=like.device)

    def weighted(self, storage: Tensor) -> Tensor:
        weight = torch.full_like(storage, 2)
        weight[0] = 1
        return weight * storage

    def extract(self, dense: Tensor) -> Tensor:
        return (dense[:, -1] if self.name == "triu_toeplitz" else dense[-1]).flip(0)

    def project(self, symmetric: Tensor) -> Tensor:
        offset = self._offsets(symmetric.device)
        upper = symmetric.to(_sum_dtype(symmetric)).triu().flatten()
        sums = upper.new_zeros(self.dim).index_add_(0, offset.abs().flatten(), upper)
        return self.weighted(sums / self._counts(sums)).to(symmetric.dtype)

    def _offsets(self, device: torch.device) -> Tensor:
        index = torch.arange(self.dim, device=device)
        return index - index[:, None]

    def to_dense(self, storage: Tensor) -> Tensor:
        offset = self._offsets(storage.device)
        upper = storage[offset.abs()].triu()
        return upper if self.name == "triu_toeplitz" else upper.mT

    def left(self, storage: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        return self.right(storage, x.mT, not transpose).mT

    def right(self, storage: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        length, wide = 2 * self.dim, _sum_dtype(x)
        spectrum = torch.fft.rfft(storage.to(wide), length)
        if transpose == (self.name == "triu_toeplitz"):  # an anticausal convolution
            spectrum = spectrum.conj()
        y = torch.fft.irfft(torch.fft.rfft(x.to(wide), length) * spectrum, length)
        return y[..., : self.dim].to(torch.promote_types(storage.dtype, x.dtype))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        length, wide = 2 * self.dim, _sum_dtype(a)
        spectra = (torch.fft.rfft(x.to(wide), length) for x in (a, b))
        return torch.fft.irfft(next(spectra) * next(spectra), length)[: self.dim].to(a.dtype)

    def gram_of_rows(self, rows: Tensor) -> Tensor:
        length = 2 * self.dim
        spectrum = torch.fft.rfft(rows.to(_sum_dtype(rows)), length)
        power = torch.view_as_real(spectrum).square().sum((0, 2))
        return torch.fft.irfft(power, length)[: self.dim]

    def statistic(self, rows: Tensor, factor: Tensor) -> Tensor:
        return self.gram_of_rows(self.right(factor, rows))

    def project_gram(self, rows: Tensor) -> Tensor:
        sums = self.gram_of_rows(rows)
        return self.weighted(sums / self._counts(sums))

    def curvature(self, statistic: Tensor, factor: Tensor) -> Tensor:
        return self.weighted(statistic / self._counts(statistic))

    def factor_gram(self, factor: Tensor) -> Tensor:
        length = 2 * self.dim
        a = factor.double()  # two terms that nearly cancel on the outer diagonals
        ramp = torch.arange(self.dim, dtype=a.dtype, device=a.device)
        spectrum = torch.fft.rfft(a, length)
        spectra = torch.stack((spectrum, torch.fft.rfft(ramp * a, length))).conj() * spectrum
        plain, weighted = torch.fft.irfft(spectra, length)[:, : self.dim]
        counts = self._counts(plain)
        return self.weighted((counts * plain - weighted) / counts).to(factor.dtype)

    def trace(self, storage: Tensor) -> Tensor:
        return self.dim * storage[0]


_FAMILIES: dict[str, Callable[[str, int], Plain]] = {
    "dense": Dense,
    "diagonal": Diagonal,
    "blocks": BlockDiagonal,
    "border": Bordered,
    "coefficients": Toeplitz,
}


def structure(spec: str, dim: int) -> Plain:
    """Return the plain PyTorch form of a structure at a dimension."""
    spec = _C.canonical_spec(spec)
    first_section = _C.storage_sections(spec, dim)[0][0]
    return _FAMILIES[first_section](spec, dim)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
