"""The structures of Table 1 as explicit dense matrices of projection weights.

Every structure is one function from the dimension (and its sizes) to the d x d matrix of Table 1's
weights: 0 off the pattern, 1 inside diagonal blocks, 2 where two triangles fold into one. A block
or a border at least as wide as the matrix leaves no room for anything else: the matrix is dense.
"""

import re

import torch
from torch import Tensor


def dense(d: int) -> Tensor:
    return torch.ones(d, d, dtype=torch.float64)


def diagonal(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def tril(d: int) -> Tensor:
    return 2 * torch.tril(dense(d)) - diagonal(d)


def triu(d: int) -> Tensor:
    return 2 * torch.triu(dense(d)) - diagonal(d)


def block_diagonal(d: int, k: int) -> Tensor:
    block = torch.arange(d) // k
    return (block[:, None] == block[None, :]).double()


def rank_triu(d: int, k: int) -> Tensor:
    """[[A, B], [0, D]] with a k x k block A and a diagonal D."""
    k = min(k, d)
    weight = diagonal(d)
    weight[:k, :k] = 1
    weight[:k, k:] = 2
    return weight


def rank_tril(d: int, k: int) -> Tensor:
    """[[A, 0], [B, D]]."""
    return rank_triu(d, k).T


def rank_triu_topleft(d: int, k: int) -> Tensor:
    """[[D, B], [0, A]]: the diagonal part is at the top left."""
    k = min(k, d)
    weight = diagonal(d)
    weight[: d - k, d - k :] = 2
    weight[d - k :, d - k :] = 1
    return weight


def rank_tril_topleft(d: int, k: int) -> Tensor:
    """[[D, 0], [B, A]]."""
    return rank_triu_topleft(d, k).T


def hierarchical(d: int, k1: int, k2: int) -> Tensor:
    """[[A, B, B'], [0, D, 0], [0, F, E]]: A is k1 x k1, E is k2 x k2, D diagonal; k1 goes first."""
    k1 = min(k1, d)
    k2 = min(k2, d - k1)
    end = d - k2
    weight = diagonal(d)
    weight[:k1, :k1] = 1
    weight[:k1, k1:] = 2
    weight[end:, k1:end] = 2
    weight[end:, end:] = 1
    return weight


def triu_toeplitz(d: int) -> Tensor:
    return triu(d)


def tril_toeplitz(d: int) -> Tensor:
    return tril(d)


STRUCTURES = {
    "dense": dense,
    "tril": tril,
    "triu": triu,
    "diagonal": diagonal,
    "block_diagonal": block_diagonal,
    "rank_triu": rank_triu,
    "rank_tril": rank_tril,
    "rank_triu_topleft": rank_triu_topleft,
    "rank_tril_topleft": rank_tril_topleft,
    "hierarchical": hierarchical,
    "triu_toeplitz": triu_toeplitz,
    "tril_toeplitz": tril_toeplitz,
}

DEFAULT_SIZES = {
    "block_diagonal": (32,),
    "rank_triu": (1,),
    "rank_tril": (1,),
    "rank_triu_topleft": (1,),
    "rank_tril_topleft": (1,),
    "hierarchical": (16, 16),
}

ALIASES = {
    "block30diagonal": "block_diagonal:30",
    "hierarchical15_15": "hierarchical:15,15",
    "triltoeplitz": "tril_toeplitz",
    "triutoeplitz": "triu_toeplitz",
}

# One spec of every family, with sizes small enough to matter in factors of dimension 5 to 12.
SPECS = [
    "dense",
    "tril",
    "triu",
    "diagonal",
    "block_diagonal:3",
    "rank_triu:2",
    "rank_tril:2",
    "rank_triu_topleft:2",
    "rank_tril_topleft:2",
    "hierarchical:2,1",
    "triu_toeplitz",
    "tril_toeplitz",
]


def parse(spec: str) -> tuple[str, tuple[int, ...]]:
    """Split 'hierarchical:2,3' into its family and its sizes."""
    family, *sizes = re.split("[:,]", ALIASES.get(spec, spec))
    return family, tuple(map(int, sizes)) or DEFAULT_SIZES.get(family, ())


def weights(spec: str, d: int) -> Tensor:
    """Table 1's weights of the structure as a dense d x d matrix."""
    family, sizes = parse(spec)
    return STRUCTURES[family](d, *sizes)


def mask(spec: str, d: int) -> Tensor:
    """The entries that may differ from zero."""
    return weights(spec, d) != 0


def is_toeplitz(spec: str) -> bool:
    return parse(spec)[0].endswith("toeplitz")


def average_diagonals(matrix: Tensor) -> Tensor:
    """Replace every entry by the mean of its diagonal (d - j entries on the j-th one)."""
    d = matrix.shape[0]
    averaged = torch.zeros_like(matrix)
    for offset in range(-(d - 1), d):
        mean = matrix.diagonal(offset).mean()
        averaged.diagonal(offset).fill_(mean)
    return averaged


def member(spec: str, matrix: Tensor) -> Tensor:
    """Keep of any dense matrix what the structure can hold, unweighted."""
    if is_toeplitz(spec):
        matrix = average_diagonals(matrix)
    return matrix * mask(spec, matrix.shape[0])


def project(spec: str, symmetric: Tensor) -> Tensor:
    """Pi of a dense symmetric matrix, as a dense matrix."""
    return member(spec, symmetric) * weights(spec, symmetric.shape[0])
