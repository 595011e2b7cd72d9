"""What the paper says about structures: Table 1's projections, closure, Figure 8, Table 3."""

import pytest
import torch
from cases import CASES, train
from reference.masks import SPECS, is_toeplitz, mask, member, parse, project
from tolerance import assert_close_to_truth
from torch import Tensor

from singd_ext import SINGD, StructuredMatrix

DIMS = [1, 2, 3, 4, 5, 8, 13]


def assert_equal(ours: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of a few dozen float64 operations."""
    assert ours.dtype == torch.float64
    assert_close_to_truth(ours, expected, expected, floor=32)


def random_matrix(d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, d, generator=generator, dtype=torch.float64)


def random_symmetric(d: int, seed: int) -> Tensor:
    A = random_matrix(d, seed)
    return A + A.T


def random_member(spec: str, d: int, seed: int) -> Tensor:
    """A well-conditioned dense matrix on the pattern."""
    return member(spec, torch.eye(d, dtype=torch.float64) + random_matrix(d, seed) / (4 * d))


def unit(d: int, *entries: tuple[int, int]) -> Tensor:
    """A matrix with ones at the given entries."""
    E = torch.zeros(d, d, dtype=torch.float64)
    for i, j in entries:
        E[i, j] = 1
    return E


def basis(spec: str, d: int) -> list[Tensor]:
    """The structure's subspace of the logarithm space; dense diagonal blocks are symmetric."""
    on = mask(spec, d)
    if is_toeplitz(spec):
        diagonals = [[(i, i + j) for i in range(d - j)] for j in range(d)]
        upper = [unit(d, *entries) for entries in diagonals]
        return upper if on[0, -1] else [E.T for E in upper]
    elements = []
    for i in range(d):
        for j in range(i + 1):
            entries = {e for e in ((i, j), (j, i)) if on[e]}
            if entries:
                elements.append(unit(d, *entries))
    return elements


def least_squares_projection(spec: str, N: Tensor) -> Tensor:
    """The m of the subspace that minimises || (m + m^T) / 2 - N ||_F, solved numerically."""
    elements = basis(spec, len(N))
    columns = torch.stack([((E + E.T) / 2).flatten() for E in elements], 1)
    solution = torch.linalg.lstsq(columns, N.flatten()[:, None]).solution
    return sum(c * E for c, E in zip(solution.flatten(), elements, strict=True))


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("spec", SPECS)
def test_table_1_projections_solve_a_least_squares_problem(spec: str, d: int) -> None:
    N = random_symmetric(d, seed=d)
    expected = least_squares_projection(spec, N)
    assert_equal(project(spec, N), expected)
    assert_equal(StructuredMatrix.project(spec, N).to_dense(), expected)


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("spec", SPECS)
def test_structures_are_closed_under_products(spec: str, d: int) -> None:
    A, B = random_member(spec, d, seed=1), random_member(spec, d, seed=2)
    product = StructuredMatrix.extract(spec, A) @ StructuredMatrix.extract(spec, B)
    assert isinstance(product, StructuredMatrix)
    assert (product.spec, product.dim) == (spec, d)
    assert_equal(product.to_dense(), A @ B)
    assert not product.to_dense()[~mask(spec, d)].any()


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-9))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("d", [5, 9])
@pytest.mark.parametrize(
    "family, inverse, first",
    [
        ("rank_tril", False, True),
        ("rank_triu_topleft", False, False),
        ("rank_triu", True, True),
        ("rank_tril_topleft", True, False),
    ],
)
def test_figure_8_rank_forms_are_diagonal_plus_rank_k(
    family: str, inverse: bool, first: bool, d: int, k: int
) -> None:
    """K K^T of the column-bordered forms, its inverse of the row-bordered ones.

    The diagonal part belongs to the d - k indices outside of the border; in those alone, taking
    the right diagonal away leaves rank k.
    """
    K = StructuredMatrix.extract(f"{family}:{k}", random_member(f"{family}:{k}", d, seed=3))
    factor = torch.linalg.inv(K.to_dense()).T if inverse else K.to_dense()
    diagonal = factor.diagonal().square()
    border = torch.arange(d) < k if first else torch.arange(d) >= d - k
    low_rank = factor @ factor.T - torch.diag(diagonal * ~border)
    assert rank(low_rank) == k


def numbers_stored(spec: str, d: int) -> int:
    """Table 3 without the O: what a factor of dimension d has to store."""
    family, sizes = parse(spec)
    if family in ("diagonal", "triu_toeplitz", "tril_toeplitz"):
        return d
    if family == "block_diagonal":
        [k] = sizes
        return (d // k) * k**2 + (d % k) ** 2
    if family.startswith(("rank", "hierarchical")):
        border = min(sum(sizes), d)
        return border * d + (d - border)
    return d * d


STORAGE_SPECS = [
    *SPECS,
    "block_diagonal",
    "rank_triu",
    "rank_tril:5",
    "hierarchical",
    "hierarchical:3,4",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("d", [*DIMS, 40])
@pytest.mark.parametrize("spec", STORAGE_SPECS)
def test_table_3_bytes_of_a_factor(spec: str, d: int, dtype: torch.dtype) -> None:
    factor = StructuredMatrix.eye(spec, d, dtype=dtype)
    numbers = numbers_stored(spec, d)
    assert factor.nbytes == numbers * dtype.itemsize
    assert sum(tensor.numel() for _, tensor in factor.named_tensors()) == numbers


@pytest.mark.parametrize("alpha1", [0.0, 0.5])
@pytest.mark.parametrize("spec", STORAGE_SPECS)
def test_table_3_bytes_of_the_optimizer_state(spec: str, alpha1: float) -> None:
    """K and C, with Riemannian momentum also m_K and m_C; besides these only M."""
    case = CASES["linear"]
    model = case.model()
    optimizer = SINGD(model, structures=(spec, spec), alpha1=alpha1, T=1)
    train(model, optimizer, case.steps(2))
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    factors = sum(numbers_stored(spec, d) for d in (12, 7, 7, 5))
    momentum = sum(p.numel() for p in model.parameters())
    expected = (factors * (2 if alpha1 else 1) + momentum) * 8
    scalars = sum(t.numel() * t.element_size() for t in state if t.numel() == 1)
    assert sum(t.numel() * t.element_size() for t in state) - scalars == expected
