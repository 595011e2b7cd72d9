"""Loads and stores of 16-bit numbers: exact, rounded to nearest, or stochastically by index."""

import calls
import pytest
import torch
from reference import masks
from torch import Tensor

from singd_ext import StructuredMatrix, ops

pytestmark = pytest.mark.usefixtures("backend")

HALVES = [torch.bfloat16, torch.float16]


def every_number(dtype: torch.dtype) -> Tensor:
    """[256, 256]: all bit patterns but those of magnitudes beyond 1e36, infinities and NaN.

    Near overflow a step may be refused, and infinities times a weight decay of 0 are NaN.
    """
    numbers = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype).view(256, 256)
    return torch.where(numbers.float().abs() < 1e36, numbers, torch.zeros_like(numbers))


def step(
    weight: Tensor,
    gradient: Tensor,
    factors: tuple[Tensor, Tensor] | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """Weight and momentum after W - M with M = 1/2 old M + C Cᵀ gradient K Kᵀ and old M = 0.

    factors: diagonals of K and C; default: of ones.
    """
    weight, momentum = weight.clone(), torch.zeros_like(weight)
    empty = weight.new_empty(0)
    K, C = factors or (torch.ones(weight.shape[1]), torch.ones(weight.shape[0]))
    ops.preconditioned_update_(
        [weight], [empty], [momentum], [empty], [torch.zeros((), dtype=torch.int64)], [gradient],
        [empty], [K], [C], "diagonal", "diagonal",
        lr=torch.tensor(1.0), momentum=0.5, weight_decay=0.0, **options,
    )  # fmt: skip
    return weight, momentum


@pytest.mark.parametrize("dtype", HALVES)
def test_every_weight_is_read_and_written_exactly(dtype: torch.dtype) -> None:
    weight = every_number(dtype)
    after, _ = step(weight, torch.zeros_like(weight))
    assert torch.equal(after, weight)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_gradient_is_read_exactly_and_momentum_written(
    dtype: torch.dtype, weight: float
) -> None:
    gradient = every_number(dtype)
    after, momentum = step(torch.full_like(gradient, weight), gradient)
    assert torch.equal(momentum, gradient)
    assert torch.equal(after, (weight - gradient.float()).to(dtype))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_every_column_and_row_has_its_own_scale(dtype: torch.dtype) -> None:
    """Powers of two, which are exact; 75 numbers are whole vectors and some that are left."""
    weight = torch.zeros(9, 75, dtype=dtype)
    K, C = (2.0 ** (torch.arange(d) % 5 - 2.0) for d in (75, 9))
    after, momentum = step(weight, torch.ones_like(weight), factors=(K, C))
    expected = torch.outer(C * C, K * K).to(dtype)
    assert torch.equal(momentum, expected) and torch.equal(after, -expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_stores_round_to_nearest_as_torch_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-24, 15, (2, 256, 256), generator=generator, device="cpu")
    random = torch.randn(2, 256, 256, generator=generator, device="cpu")
    numbers = torch.ldexp(random, exponents).to(torch.get_default_device(), dtype)
    weight, gradient = numbers[0], numbers[1]
    after, _ = step(weight, gradient)
    assert torch.equal(after, (weight.float() - gradient.float()).to(dtype))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_one_number_that_is_not_finite_is_seen_wherever_it_is(
    dtype: torch.dtype, value: float
) -> None:
    """One layer for each place: rows of 75 numbers are lines of a cache and some that are left."""
    rows, columns = 2, 75
    gradients = torch.zeros(rows * columns, rows, columns, dtype=dtype)
    gradients.view(rows * columns, -1).fill_diagonal_(value)
    weights = [torch.ones(rows, columns, dtype=dtype) for _ in gradients]
    momenta = [torch.zeros_like(w) for w in weights]
    empty = [weights[0].new_empty(0)] * len(weights)
    outcomes = ops.preconditioned_update_(
        weights, empty, momenta, empty, [torch.zeros((), dtype=torch.int64) for _ in weights],
        list(gradients), empty, [torch.ones(columns)] * len(weights),
        [torch.ones(rows)] * len(weights), "diagonal", "diagonal",
        lr=torch.tensor(1.0), momentum=0.5, weight_decay=0.5,
    )  # fmt: skip
    assert outcomes.tolist() == [1] * len(weights)
    assert all((w == 1).all() for w in weights) and not any(m.any() for m in momenta)


def test_stochastic_rounding_draws_anew_for_every_element() -> None:
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    gradient = torch.full_like(weight, 2.0**-9)  # half of the spacing below 1
    after, _ = step(weight, gradient, rounding_key=[1, 2])
    down = after != 1
    assert 0.4 < down.float().mean() < 0.6
    for lines in (down, down.T):
        assert len({tuple(line.tolist()) for line in lines}) == 64


def test_scaled_gradients_are_divided_by_their_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2, 40, 30, generator=generator, device="cpu")
    weight, gradient = random.to(torch.get_default_device())
    plain, scaled = (
        step(weight, factor * gradient, grad_scale=torch.tensor(factor)) for factor in (1.0, 8.0)
    )
    for expected, actual in zip(plain, scaled, strict=True):
        assert torch.equal(actual, expected)
    assert not torch.equal(plain[0], weight)


@pytest.mark.parametrize("spec", ["diagonal", "block_diagonal:5", "hierarchical:2,2"])
@pytest.mark.parametrize("index", [0, 4, 11])
@pytest.mark.parametrize("side", [0, 1], ids=["K", "C"])
@pytest.mark.parametrize(
    ("entry", "statistic"), [(1.0, 1e6), (256.0, 2.0**-5)], ids=["momentum", "factor alone"]
)
def test_one_entry_that_overflows_as_it_is_stored_keeps_both_factors(
    spec: str, index: int, side: int, entry: float, statistic: float
) -> None:
    """IKFAC, where the factors do not depend on each other: one update is finite in float16."""
    dim = 12

    def extracted(value: float, dtype: torch.dtype) -> list[Tensor]:
        dense = [torch.eye(dim), torch.eye(dim)]
        dense[side][index, index] = value
        return [StructuredMatrix.extract(spec, x).data.to(dtype) for x in dense]

    factors, statistics = extracted(entry, torch.float16), extracted(statistic, torch.float32)
    momenta = [torch.zeros_like(f) for f in factors]
    before = [t.clone() for t in (*factors, *momenta)]
    rejected = torch.zeros((), dtype=torch.int64)
    outcomes = ops.update_factors_(
        [factors[0]], [factors[1]], [momenta[0]], [momenta[1]], [rejected],
        [statistics[0]], [statistics[1]], [1.0], [1.0], [dim], [dim], spec, spec,
        lr_cov=torch.tensor(1.0), damping=0.0, alpha1=0.5, kfac_like=True,
        normalize_lr_cov=False, expm_order=1, step_cap=float("inf"),
    )  # fmt: skip
    assert outcomes.tolist() == [1] and rejected.item() == 1
    assert all(map(torch.equal, (*factors, *momenta), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [*masks.SPECS, "block_diagonal:30"])
def test_a_factor_update_writes_nothing_behind_the_state(spec: str, dtype: torch.dtype) -> None:
    room = 64
    state = calls.update_factors(spec, spec, [calls.Shape(31, 47)], dtype, room=room)
    for name in ("K", "C", "m_K", "m_C"):
        numbers = state[name][0]
        assert (numbers.as_strided((room,), (1,), numbers.numel()) == 1).all(), name
