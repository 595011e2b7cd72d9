"""`update_factors_` on a CPU against the algorithm in dense float64, and what a refusal leaves.

Most of it is of factors whose products are torch's: dense, triangular, Toeplitz, and wide blocks
and borders.
"""

from typing import Any

import calls
import pytest
import torch
from reference import masks
from reference.singd import average_trace, expm
from tolerance import assert_close_to_truth
from torch import Tensor

from singd_ext import StructuredMatrix, ops

INF, NAN = float("inf"), float("nan")
SCALES = (0.5, 0.25)
DEFAULTS: dict[str, Any] = {
    "lr_cov": 0.0625, "damping": 0.5, "alpha1": 0.5, "kfac_like": False,
    "normalize_lr_cov": False, "expm_order": 1, "step_cap": INF,
}  # fmt: skip
WIDE = ["block_diagonal:260", "hierarchical:140,140", "tril_toeplitz"]  # with torch's products


def update(
    state: list[Tensor],
    statistics: list[Tensor],
    specs: tuple[str, str],
    dims: tuple[int, int],
    **options: Any,
) -> int:
    """Update K, C, m_K and m_C in place and return the outcome; statistics as they are stored."""
    o = {**DEFAULTS, **options}
    o["lr_cov"] = torch.tensor(o["lr_cov"], dtype=torch.float64)
    momenta = [[m] for m in state[2:]] if o["alpha1"] != 0 else [[], []]
    rejected = torch.zeros((), dtype=torch.int64)
    outcomes = ops.update_factors_(
        [state[0]], [state[1]], *momenta, [rejected],
        *([s.flatten()] for s in statistics),
        *([scale] for scale in SCALES), *([d] for d in dims), *specs, **o,
    )  # fmt: skip
    assert rejected.item() == (outcomes.item() == 1)
    return outcomes.item()


def expected(
    state: list[Tensor], rows: list[Tensor], specs: tuple[str, str], **options: Any
) -> list[Tensor]:
    """The same in dense matrices, from the rows of the statistics, in the dtype of all these."""
    o = {**DEFAULTS, **options}
    K, C, m_K, m_C = state

    def projected(spec: str, symmetric: Tensor) -> Tensor:
        return masks.project(spec, symmetric.double()).to(symmetric.dtype)

    H, grams = [], []
    for factor, x, spec, scale in zip((K, C), rows, specs, SCALES, strict=True):
        H.append(projected(spec, factor.T @ (x.T @ x) @ factor * scale))
        grams.append(projected(spec, factor.T @ factor))
    new = []
    for i, (factor, m) in enumerate(((K, m_K), (C, m_C))):
        h, gram = (1.0 if o["kfac_like"] else average_trace(x[1 - i]) for x in (H, grams))
        s = 0.5 * (1 - o["alpha1"] if o["normalize_lr_cov"] else 1)
        eye = torch.eye(len(factor), dtype=factor.dtype)
        m = o["alpha1"] * m + s * (h * H[i] + o["damping"] * gram * grams[i] - eye)
        wide = m.double()
        beta = o["lr_cov"] / (max(1, wide.abs().max()) if o["normalize_lr_cov"] else 1)
        sums = [wide.abs().sum(dim).max() for dim in (0, 1)]
        norm = min(wide.norm(), (sums[0] * sums[1]).sqrt())
        new += [factor @ expm(-min(beta, o["step_cap"] / norm) * m, o["expm_order"]), m]
    return [new[0], new[2], new[1], new[3]]


def check_update(
    specs: tuple[str, str],
    dims: tuple[int, int],
    dtype: torch.dtype,
    first: float = 1,
    momentum: float = 1,
    **options: Any,
) -> None:
    """One update; the first column of all rows is multiplied by `first`, old momenta by another."""
    sides = list(zip(specs, dims, strict=True))
    state = [calls.factor(spec, d, seed, dtype) for seed, (spec, d) in enumerate(sides * 2)]
    for m in state[2:]:
        m *= momentum
    rows = [calls.numbers(20, d, seed=9, dtype=dtype) / 4 for d in dims]
    for x in rows:
        x[:, 0] *= first
    statistics = []
    for x, factor, (spec, d) in zip(rows, state, sides):  # noqa: B905
        wide = torch.promote_types(dtype, torch.float32)
        statistics.append(torch.zeros_like(factor, dtype=wide))
        ops.accumulate_statistic_(statistics[-1], x.unsqueeze(0), factor, d, spec)

    def dense() -> list[Tensor]:
        return [
            StructuredMatrix(spec, d, t.clone()).to_dense()
            for t, (spec, d) in zip(state, sides * 2, strict=True)
        ]

    start = dense()
    truth = expected([t.double() for t in start], [x.double() for x in rows], specs, **options)
    rival = expected(start, rows, specs, **options)
    outcome = update(state, statistics, specs, dims, **options)
    assert outcome == (2 if options.get("step_cap", INF) < INF else 0)
    kept = 4 if options.get("alpha1", 1) != 0 else 2
    for ours, r, t in list(zip(dense(), rival, truth, strict=True))[:kept]:
        assert_close_to_truth(ours, r, t)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"kfac_like": True, "alpha1": 0.0},
    {"normalize_lr_cov": True},
    {"expm_order": 2, "lr_cov": 0.25},
    {"step_cap": 0.005},
    {"step_cap": 0.005, "expm_order": 2, "normalize_lr_cov": True},
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_option
@every_dtype
@pytest.mark.parametrize("dims", [(1, 2), (63, 129), (257, 300)], ids=str)
def test_dense_and_triangular_factors(
    dims: tuple[int, int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    for specs in (("dense", "dense"), ("tril", "triu"), ("triu", "dense")):
        check_update(specs, dims, dtype, **options)


@every_option
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("spec", [*WIDE, "diagonal"])
def test_other_factors_beside_dense_ones(
    spec: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """`diagonal` has the kernels' own products, and is committed together with the dense one."""
    check_update((spec, "dense"), (300, 290), dtype, **options)


@every_option
@every_dtype
@pytest.mark.parametrize("dims", [(1, 2), (30, 29), (63, 300)], ids=str)
def test_factors_with_products_of_the_kernels(
    dims: tuple[int, int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """With one large feature the Frobenius norm bounds a step, otherwise sums of rows do."""
    for specs in (
        ("block_diagonal:7", "block_diagonal:30"),
        ("hierarchical:3,4", "rank_tril:2"),
        ("rank_triu:1", "diagonal"),
    ):
        for first in (1, 4 if dtype == torch.float16 else 8):  # float16 would overflow
            check_update(specs, dims, dtype, first=first, **options)


@pytest.mark.parametrize("expm_order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [1e20, 1e30])
def test_a_short_step_along_a_huge_momentum(
    momentum: float, dtype: torch.dtype, expm_order: int
) -> None:
    """The square of the momentum overflows, but not that of what K is multiplied by."""
    for specs in (
        ("diagonal", "block_diagonal:7"),
        ("block_diagonal:30", "rank_triu:1"),
        ("hierarchical:3,4", "rank_tril:2"),
        ("rank_tril:9", "tril_toeplitz"),
        ("dense", "triu"),
    ):
        options = {"expm_order": expm_order, "step_cap": 0.5}
        check_update(specs, (63, 70), dtype, momentum=momentum, **options)


def test_several_threads(threads: None) -> None:
    for count in (1, 3):
        torch.set_num_threads(count)
        for specs in (("dense", "tril"), ("hierarchical:140,140", "dense")):
            check_update(specs, (700, 513), torch.float32, step_cap=0.01)


def test_stochastic_rounding_of_dense_momenta(threads: None) -> None:
    """Bits are drawn anew for every number of the storage, whichever thread writes it."""
    runs = []
    for count in (1, 3):
        torch.set_num_threads(count)
        state = [torch.eye(300, dtype=torch.bfloat16).flatten() for _ in range(4)]
        statistic = torch.full((300, 300), 1 + 2.0**-9)
        options = {"kfac_like": True, "damping": 0.0, "lr_cov": 0.0, "rounding_key": [1, 2]}
        assert update(state, [statistic] * 2, ("dense",) * 2, (300, 300), **options) == 0
        runs.append(state)
    assert all(map(torch.equal, *runs))
    up = (runs[0][2].view(300, 300) > 0.25) & ~torch.eye(300, dtype=torch.bool)
    assert 0.2 < up.float().mean() < 0.3
    for lines in (up, up.T):
        assert len({tuple(line.tolist()) for line in lines}) == 300


@pytest.mark.parametrize("expm_order", [1, 2])
def test_float32_momenta_of_bfloat16_factors_are_not_rounded(expm_order: int) -> None:
    """Products are in bfloat16 either way, and take the momentum rounded."""
    specs, d = ("dense", "tril"), 130
    factors = [calls.factor(spec, d, seed, torch.bfloat16) for seed, spec in enumerate(specs * 2)]
    statistics = [torch.eye(d) + calls.numbers(d, d, seed=9, dtype=torch.float32) for _ in specs]
    statistics = [(u + u.T) / 8 for u in statistics]
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        state = [f.clone() for f in factors[:2]] + [m.to(dtype, copy=True) for m in factors[2:]]
        assert update(state, statistics, specs, (d, d), expm_order=expm_order) == 0
        runs.append(state)
    for i, (rounded, wide) in enumerate(zip(*runs, strict=True)):
        if i >= 2:
            assert torch.equal(wide.bfloat16(), rounded)
            assert not torch.equal(wide, rounded.float())
        else:
            assert (wide.float() - rounded.float()).norm() <= 2**-8 * rounded.float().norm()


# ------------------------------------------------------------------------ refusals


def identities(specs: tuple[str, str], d: int, dtype: torch.dtype) -> list[Tensor]:
    """K = C = I and m_K = m_C = 0."""
    factors = [StructuredMatrix.eye(spec, d, dtype).data for spec in specs]
    return factors + [torch.zeros_like(f) for f in factors]


def assert_kept(
    state: list[Tensor], statistics: list[Tensor], specs: tuple[str, str], **options: Any
) -> None:
    before = [t.clone() for t in state]
    options = {"kfac_like": True, "damping": 0.0, **options}  # K and C do not depend on each other
    dims = (len(statistics[0]), len(statistics[1]))
    assert update(state, statistics, specs, dims, **options) == 1
    assert all(map(torch.equal, state, before))


@pytest.mark.parametrize("side", [0, 1], ids=["K", "C"])
@pytest.mark.parametrize("place", [(0, 0), (3, 40), (129, 0), (129, 129)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("partner", ["dense", "diagonal"])
def test_one_number_of_a_dense_statistic_that_is_not_finite_keeps_both_factors(
    partner: str, value: float, dtype: torch.dtype, place: tuple[int, int], side: int
) -> None:
    specs = ("dense", partner) if side == 0 else (partner, "dense")
    wide = torch.promote_types(dtype, torch.float32)
    statistics = [torch.eye(130, dtype=wide) for _ in range(2)]
    if partner == "diagonal":
        statistics[1 - side] = torch.ones(130, dtype=wide)
    statistics[side][place] = statistics[side][place[::-1]] = value
    assert_kept(identities(specs, 130, dtype), statistics, specs)


@pytest.mark.parametrize("side", [0, 1], ids=["K", "C"])
@pytest.mark.parametrize("place", [(0, 0), (3, 8), (11, 0), (11, 11)], ids=str)
@pytest.mark.parametrize("what", ["momentum", "factor", "large factor", "large update"])
@pytest.mark.parametrize("expm_order", [1, 2])
def test_an_overflow_of_one_number_as_it_is_stored_keeps_all_four(
    expm_order: int, what: str, place: tuple[int, int], side: int
) -> None:
    """In float16, where T is float32: the momentum alone, or the factor alone."""
    specs = ("dense", "dense")
    state = identities(specs, 12, torch.float16)
    statistics = [torch.eye(12) / scale for scale in SCALES]  # m = 0
    entry, lr_cov, k = {
        "momentum": (1e6, 1e-8, 1.0),
        "factor": (1e5, 1e2, 1.0),
        "large factor": (-10.0, 0.25, 6e4),
        "large update": (1e3, 4.0, 2e2),
    }[what]
    state[side].mul_(k)
    statistics[side][place] += entry / SCALES[side]
    if place[0] != place[1]:
        statistics[side][place[::-1]] += entry / SCALES[side]
    assert_kept(state, statistics, specs, lr_cov=lr_cov, expm_order=expm_order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_numbers_close_to_overflow_are_stored(dtype: torch.dtype) -> None:
    specs, large = ("dense", "dense"), 1e37
    state = identities(specs, 70, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    statistics = [torch.eye(70, dtype=wide) for _ in range(2)]
    statistics[0][5, 5] = large
    options = {"kfac_like": True, "damping": 0.0, "lr_cov": 1e-37}
    assert update(state, statistics, specs, (70, 70), **options) == 0
    momentum, factor = state[2].view(70, 70), state[0].view(70, 70)
    assert momentum[5, 5].item() == pytest.approx(SCALES[0] / 2 * large, rel=1e-2)
    assert factor[5, 5].item() == pytest.approx(1 - SCALES[0] / 2, rel=1e-2)
