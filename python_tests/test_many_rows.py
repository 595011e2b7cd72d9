"""Statistics of more rows than one pass takes, and of bfloat16 rows multiplied as they are."""

import pytest
import torch
from reference import masks
from test_operators import curvature_of, expected_curvature, random, random_member
from tolerance import assert_close_to_truth

from singd_ext import StructuredMatrix, ops

pytestmark = pytest.mark.usefixtures("backend")

BORDERS_OF_ONE = ("rank_triu:1", "rank_triu_topleft:1", "rank_tril:1", "rank_tril_topleft:1")
SPECS = (
    *BORDERS_OF_ONE,
    "block_diagonal:7",
    "block_diagonal:30",
    "hierarchical:2,3",
    "rank_tril:2",
)
ALL = (*masks.SPECS, "block_diagonal:30", "hierarchical:16,16", "rank_tril:17")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 127, 129, 511, 513, 1029])
def test_rows_at_the_edges_of_passes(spec: str, dtype: torch.dtype, rows: int) -> None:
    for dim, ones_column in ((31, True), (60, True), (130, False), (257, True)):
        x = random(1, rows, dim - ones_column, dtype=dtype)
        factor = random_member(spec, dim, dtype)
        statistic = torch.zeros_like(factor.data, dtype=torch.float32)
        ops.accumulate_statistic_(
            statistic, x, factor.data, dim, spec, ones_column=ones_column, shared="expand"
        )
        ours = curvature_of(statistic, factor, spec)
        truth, rival = (
            expected_curvature([x], factor, spec, ones_column, "expand", wide)
            for wide in (torch.float64, torch.float32)
        )
        assert_close_to_truth(ours, rival, truth, factor=4.0, floor=16.0)


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("rows", [0, 3, 513])
def test_new_memory_is_overwritten(spec: str, dtype: torch.dtype, rows: int) -> None:
    """Whatever it holds; small integers are summed exactly."""
    for dim in (1, 2, 31, 257):
        x = random(1, rows, dim, dtype=torch.float64).sign().to(dtype)
        factor = StructuredMatrix.eye(spec, dim, dtype).data
        wide = torch.promote_types(dtype, torch.float32)
        zeros, garbage = torch.zeros_like(factor, dtype=wide), torch.full_like(factor, torch.nan)
        garbage = garbage.to(wide)
        ops.accumulate_statistic_(zeros, x, factor, dim, spec)
        ops.accumulate_statistic_(garbage, x, factor, dim, spec, overwrite=True)
        if "toeplitz" in spec:  # FFTs of integers are rounded to integers
            zeros, garbage = zeros.round(), garbage.round()
        assert torch.equal(garbage, zeros), dim
        assert zeros.any() == (rows > 0)


# Of a factor of small integers: number, distance from the diagonal, and where it is.
DIAGONALS = ((1, 0, 0), (-1, 1, 1), (1, 5, 5), (2, 1, -1), (-1, 3, -3))
WHOLE = ("dense", "tril", "triu_toeplitz", "tril_toeplitz")


@pytest.mark.parametrize("spec", WHOLE)
@pytest.mark.parametrize("rows", [1, 127, 129, 513])
def test_bfloat16_rows_of_whole_factors(spec: str, rows: int) -> None:
    """Where the processor is fast at it, they are multiplied by K in bfloat16."""
    for dim, ones_column in ((31, True), (32, False), (130, True), (257, False)):
        x = random(rows, 1, dim - ones_column, dtype=torch.bfloat16)
        factor = random_member(spec, dim, torch.bfloat16)
        statistic = torch.zeros_like(factor.data, dtype=torch.float32)
        ops.accumulate_statistic_(statistic, x, factor.data, dim, spec, ones_column=ones_column)
        ours = curvature_of(statistic, factor, spec)
        truth, rival = (
            expected_curvature([x], factor, spec, ones_column, "expand", dtype)
            for dtype in (torch.float64, torch.bfloat16)
        )
        assert_close_to_truth(ours, rival, truth)


@pytest.mark.parametrize("spec", WHOLE)
@pytest.mark.parametrize("rows", [1, 127, 129, 4097])
def test_every_bfloat16_row_of_whole_factors_counts(spec: str, rows: int) -> None:
    """Small integers are exact; FFTs of them are rounded to integers.

    A fifth of the numbers are not zero, so that sums stay below 2^22, where float32 has quarters.
    """
    for dim, ones_column in ((31, True), (32, False), (130, True), (257, False)):
        x = (random(rows, 1, dim - ones_column) / 2.5).round().clamp(-1, 1).bfloat16()
        strided = torch.cat([x, x], dim=2)[..., : x.shape[2]]
        dense = sum(c * torch.diag(torch.ones(dim - i), j) for c, i, j in DIAGONALS)
        factor = StructuredMatrix.extract(spec, masks.member(spec, dense).bfloat16())
        statistic = torch.zeros_like(factor.data, dtype=torch.float32)
        for part in (x, strided):
            ops.accumulate_statistic_(
                statistic, part, factor.data, dim, spec, ones_column=ones_column
            )
        y = (
            torch.cat([x[:, 0], torch.ones(rows, 1)], 1)[:, :dim].double()
            @ factor.to_dense().double()
        )
        expected = 2 * y.T @ y
        if "toeplitz" in spec:
            expected = torch.stack([expected.diagonal(i).sum() for i in range(dim)])
            statistic = statistic.round()
        assert expected.max() < 2**22
        assert torch.equal(statistic.double(), expected.flatten()), dim


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_every_size_up_to_two_vectors(dtype: torch.dtype) -> None:
    for size in range(1, 34):
        spec, dim = f"block_diagonal:{size}", 3 * size - 1
        x, k = random(1, 70, dim, dtype=dtype), StructuredMatrix.eye(spec, dim, dtype).data
        statistic = torch.zeros_like(k, dtype=torch.float32)
        ops.accumulate_statistic_(statistic, x, k, dim, spec)
        truth, rival = (
            StructuredMatrix(spec, dim, ops.extract(w[0].T @ w[0], spec)).to_dense()
            for w in (x.double(), x.float())
        )
        ours = StructuredMatrix(spec, dim, statistic).to_dense()
        assert_close_to_truth(ours, rival, truth, factor=4.0, floor=16.0)


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_rows_give_what_their_float32_copies_give(spec: str) -> None:
    """Rows of batches that are expanded, permuted, sliced, or begin at any byte pair."""
    x = random(6, 23, 40, dtype=torch.bfloat16)
    storage = torch.zeros(x.numel() + 1, dtype=torch.bfloat16)
    variants = {
        "misaligned": storage[1:].view_as(x).copy_(x),
        "expanded": x[:, :1].expand(6, 23, 40),
        "permuted": x.transpose(0, 1),
        "sliced": x[:, 2:, 3:30],
    }
    for name, rows in variants.items():
        dim = rows.shape[-1] + 1
        k = random_member(spec, dim, torch.float32).data
        ours, theirs, truth = (
            _statistic(spec, dim, r, k) for r in (rows, rows.float(), rows.double())
        )
        assert_close_to_truth(ours, theirs, truth, factor=4.0, floor=16.0)
        assert ours.abs().sum() > 0, name


@pytest.mark.parametrize("spec", ["triu_toeplitz", "tril_toeplitz"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_toeplitz_products_of_more_rows_than_are_transformed_together(
    spec: str, side: str, dtype: torch.dtype
) -> None:
    dim, other = 301, 1003
    k = random_member(spec, dim, dtype)
    x = random(*((dim, other) if side == "left" else (other, dim)), dtype=dtype)
    for transpose in (False, True):
        ours = ops.structured_matmul(k.data, dim, spec, x, side=side, transpose=transpose)
        dense = k.to_dense().T if transpose else k.to_dense()
        rival, truth = (
            matrix @ y if side == "left" else y @ matrix
            for matrix, y in ((dense, x), (dense.double(), x.double()))
        )
        # As every transform, these round in proportion to the largest numbers of a row.
        assert_close_to_truth(ours, rival, truth, factor=8.0, floor=16.0)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_bfloat16_row_that_is_not_finite_shows(spec: str, value: float) -> None:
    for row, column in ((0, 0), (14, 39), (7, 20)):
        x = torch.ones(3, 5, 40, dtype=torch.bfloat16)
        x[row // 5, row % 5, column] = value
        k = StructuredMatrix.eye(spec, 40, torch.float32).data
        statistic = torch.zeros_like(k)
        ops.accumulate_statistic_(statistic, x, k, 40, spec, ones_column=False, shared="expand")
        assert not statistic.isfinite().all()


def _statistic(spec: str, dim: int, rows: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    statistic = torch.zeros_like(k, dtype=wide)
    ops.accumulate_statistic_(
        statistic, rows, k.to(wide), dim, spec, ones_column=True, shared="expand"
    )
    return statistic
