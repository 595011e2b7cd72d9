"""A step against dense products in float64: widths around the edges of vectors and tiles."""

import itertools
import math
from collections.abc import Iterable
from typing import Any, Literal

import calls
import pytest
import torch
from tolerance import assert_close_to_truth
from torch import Tensor

from singd_ext import StructuredMatrix, ops

pytestmark = pytest.mark.usefixtures("backend")

WIDTHS = [1, 4, 5, 15, 16, 17, 30, 64, 65]
DIMS = [(70, 129), (33, 96)]  # d_o, d_i
ALPHA, GAMMA, BETA = 0.75, 0.25, 0.125


def specs_of(width: int) -> list[tuple[str, str]]:
    """Structures of K and C with blocks and borders of this width."""
    blocks, border = f"block_diagonal:{width}", f"rank_tril:{width}"
    arrow = f"hierarchical:{max(1, width // 2)},{(width + 1) // 2}"
    first, last = f"rank_triu:{width}", f"rank_tril_topleft:{width}"
    last_column = f"rank_triu_topleft:{width}"
    return [
        (blocks, blocks), (arrow, arrow), (border, border),
        ("diagonal", blocks), (blocks, "diagonal"), ("diagonal", border), (arrow, "diagonal"),
        (first, last), (last, first), (border, last), (last_column, first), (last, last_column),
    ]  # fmt: skip


def dense_step(W: Tensor, M: Tensor, G: Tensor, K: Tensor, C: Tensor) -> Tensor:
    M = ALPHA * M + C @ (C.T @ G @ K) @ K.T + GAMMA * W
    return torch.cat([W - BETA * M, M])


ALL = ("weight", "momentum", "gradient")
Order = Literal["transposed"] | int | None


def laid_out(matrix: Tensor, order: Order, in_order: bool = True) -> Tensor:
    """Return a copy that lies in memory row by row, or in the other order.

    This is column by column or, of a matrix [rows, channels, taps], channels-last; for a negative
    number of taps, channel by channel as the weight of a transposed convolution.
    """
    contiguous, swapped = torch.contiguous_format, (-1, -2)
    if isinstance(order, int):
        matrix = matrix.unflatten(1, (-1, abs(order)))
        swapped = (-1, -2) if order > 0 else (0, 1)
    if order is None or not in_order:
        return matrix.clone(memory_format=contiguous)
    return matrix.transpose(*swapped).clone(memory_format=contiguous).transpose(*swapped)


def one_step(
    spec_K: str,
    spec_C: str,
    d_o: int,
    d_i: int,
    bias: bool,
    dtype: torch.dtype,
    unscale: bool,
    order: Order = None,
    ordered: Iterable[str] = ALL,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return W and M after a step: ours, PyTorch's and the truth.

    Factors of 16-bit layers are float32.

    order: How those of "weight", "momentum" and "gradient" that are in `ordered` lie in memory.
    """
    wide = torch.promote_types(dtype, torch.float32)
    K, C = (calls.factor(s, d, 1, wide) for s, d in ((spec_K, d_i), (spec_C, d_o)))
    W, M, scaled = (calls.numbers(d_o, d_i, seed=seed, dtype=dtype) for seed in range(3))
    columns = d_i - 1 if bias else d_i
    weight, momentum, gradient = (
        (
            laid_out(t[:, :columns], order, name in ordered),
            t[:, columns:].flatten().clone(),
        )
        for t, name in ((W, "weight"), (M, "momentum"), (scaled, "gradient"))
    )
    ops.preconditioned_update_(
        *([t] for t in weight), *([t] for t in momentum),
        [torch.zeros((), dtype=torch.int64)], *([t] for t in gradient),
        [K], [C], spec_K, spec_C,
        lr=torch.tensor(BETA, dtype=torch.float64), momentum=ALPHA, weight_decay=GAMMA,
        grad_scale=torch.tensor(8.0) if unscale else None,
    )  # fmt: skip
    ours = torch.cat(
        [torch.cat([w.reshape(d_o, -1), b.view(d_o, -1)], 1) for w, b in (weight, momentum)]
    )
    dense = [
        StructuredMatrix(spec_K, d_i, K).to_dense(),
        StructuredMatrix(spec_C, d_o, C).to_dense(),
    ]
    G = scaled / 8 if unscale else scaled
    rival = dense_step(W, M, G, *(t.to(dtype) for t in dense))
    truth = dense_step(*(t.double() for t in (W, M, G, *dense)))
    return ours, rival, truth


def check_step(*arguments: Any) -> None:
    assert_close_to_truth(*one_step(*arguments))


@pytest.mark.parametrize("unscale", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("width", WIDTHS)
def test_step(width: int, bias: bool, dtype: torch.dtype, unscale: bool) -> None:
    for d_o, d_i in DIMS:
        for spec_K, spec_C in specs_of(width):
            check_step(spec_K, spec_C, d_o, d_i, bias, dtype, unscale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("width", [1, 16, 30])
def test_step_of_a_transposed_weight(width: int, bias: bool, dtype: torch.dtype) -> None:
    for d_o, d_i in [*DIMS, (1, 5), (5, 1 + bias)]:
        for spec_K, spec_C in specs_of(width):
            check_step(spec_K, spec_C, d_o, d_i, bias, dtype, False, "transposed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("order", [1, 2, 9, 25, -1, -2, -9])
@pytest.mark.parametrize("width", [1, 16, 30])
def test_step_of_a_convolution(width: int, order: int, bias: bool, dtype: torch.dtype) -> None:
    """As close as a step of rows, which rounds at other places."""
    for d_o, channels in ((33, 5), (1, 7), (4, 1)):
        for spec_K, spec_C in specs_of(width):
            layer = (spec_K, spec_C, d_o, channels * abs(order) + bias, bias, dtype, False)
            ours, (rows, _, truth) = one_step(*layer, order)[0], one_step(*layer)
            assert_close_to_truth(ours, rows, truth)


@pytest.mark.parametrize("shape", [(5, 3, 2, 2), (5, 3, 1, 1), (4, 1, 2, 3), (1, 4, 3, 1)], ids=str)
@pytest.mark.parametrize("spec", ["diagonal", "block_diagonal:2", "rank_tril:1", "dense"])
def test_every_order_of_the_dimensions_in_memory(spec: str, shape: tuple[int, ...]) -> None:
    """Products are kept from order to order, and the gradient's is that of another weight."""
    d_o, d_i = shape[0], math.prod(shape[1:]) + 1
    K, C = (calls.factor(spec, d, seed, torch.float64) for seed, d in ((1, d_i), (2, d_o)))
    columns = [calls.numbers(d_o, d_i, seed=seed, dtype=torch.float64) for seed in range(3)]
    kept = torch.empty(0, dtype=torch.uint8)
    orders, results = list(itertools.permutations(range(4))), []
    for order, other in zip(orders, [*orders[1:], orders[0]], strict=True):
        back = [order.index(i) for i in range(4)]
        weight, momentum = (
            matrix[:, 1:].reshape(shape).permute(order).clone(memory_format=torch.contiguous_format)
            for matrix in columns[:2]
        )
        weight, momentum = weight.permute(back), momentum.permute(back)
        gradient = columns[2][:, 1:].reshape(shape).permute(other).contiguous()
        gradient = gradient.permute([other.index(i) for i in range(4)])
        biases = [matrix[:, 0].clone() for matrix in columns]
        ops.preconditioned_update_(
            [weight], [biases[0]], [momentum], [biases[1]],
            [torch.zeros((), dtype=torch.int64)], [gradient], [biases[2]],
            [K], [C], spec, spec, products=kept,
            lr=torch.tensor(BETA, dtype=torch.float64), momentum=ALPHA, weight_decay=GAMMA,
        )  # fmt: skip
        results.append(torch.cat([weight.flatten(), momentum.flatten(), *biases[:2]]))
    assert not torch.equal(results[0][: weight.numel()], columns[0][:, 1:].flatten())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("order", "channels"), [(4, 515), (300, 5), (512, 2), (513, 2), (-512, 2), (-513, 2)]
)
@pytest.mark.parametrize(
    "specs", [("diagonal", "diagonal"), ("block_diagonal:7", "rank_tril:1")], ids=str
)
def test_step_of_many_taps_or_channels(
    specs: tuple[str, str], order: int, channels: int, dtype: torch.dtype
) -> None:
    """More than a group holds, and the largest kernel that is not copied."""
    check_step(*specs, 7, abs(order) * channels + 1, True, dtype, False, order)


@pytest.mark.parametrize("ordered", [["weight"], ["weight", "gradient"], ["gradient", "momentum"]])
@pytest.mark.parametrize("order", ["transposed", 3, -3])
@pytest.mark.parametrize("spec", ["diagonal", "hierarchical:2,3", "dense"])
def test_step_where_some_lies_in_memory_in_another_order(
    spec: str, order: Order, ordered: list[str]
) -> None:
    check_step(spec, spec, 33, 19, True, torch.float32, True, order, ordered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "specs",
    [
        ("block_diagonal:30", "block_diagonal:32"),
        ("block_diagonal:33", "block_diagonal:7"),
        ("hierarchical:15,15", "hierarchical:15,15"),
        ("rank_tril:33", "rank_triu:17"),
        ("rank_triu:1", "rank_tril_topleft:1"),
        ("block_diagonal:64", "rank_triu_topleft:40"),
    ],
    ids=str,
)
def test_step_of_many_tiles(specs: tuple[str, str], dtype: torch.dtype) -> None:
    """Several tiles, strips of rows and splits of columns; rows move in vectors."""
    for order in (None, "transposed", 6, -6):
        check_step(*specs, 300, 601, True, dtype, False, order)
    check_step(*specs, 690, 37, False, dtype, False)  # four uneven shares of thin products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "specs",
    [("hierarchical:2,3", "hierarchical:8,9"), ("diagonal", "rank_tril:3"), ("rank_triu:33",) * 2],
    ids=str,
)
def test_step_of_many_rows(specs: tuple[str, str], dtype: torch.dtype) -> None:
    """Thin products of C go by panels of at most 4,096 rows."""
    check_step(*specs, 4200, 41, True, dtype, False)


def test_an_overflow_in_the_last_row_alone_is_found() -> None:
    """Dense factors: the preconditioned gradient lies in memory with its bias in between."""
    weight, bias = torch.ones(8, 2), torch.ones(8)
    factor = torch.eye(8)
    factor[7, 7] = 1e15
    gradient = torch.zeros(8, 2)
    gradient[7, 1] = 1e20
    counter = torch.zeros((), dtype=torch.int64)
    outcomes = ops.preconditioned_update_(
        [weight], [bias], [], [], [counter], [gradient], [torch.zeros(8)],
        [torch.eye(3).flatten()], [factor.flatten()], "dense", "dense",
        lr=torch.tensor(1.0), momentum=0.0, weight_decay=0.0,
    )  # fmt: skip
    assert outcomes.tolist() == [1] and counter.item() == 1
    assert weight.eq(1).all() and bias.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["diagonal", "block_diagonal:4", "hierarchical:2,2"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_found_at_every_place_of_a_vector(
    spec: str, dtype: torch.dtype, value: float
) -> None:
    d_o, d_i = 16, 24
    K, C = (StructuredMatrix.eye(spec, d, torch.float32).data for d in (d_i, d_o))
    none = torch.empty(0, dtype=dtype)
    for j in range(d_i):
        weight, gradient = torch.ones(d_o, d_i, dtype=dtype), torch.zeros(d_o, d_i, dtype=dtype)
        gradient[5 * j % d_o, j] = value
        counter = torch.zeros((), dtype=torch.int64)
        outcomes = ops.preconditioned_update_(
            [weight], [none], [], [], [counter], [gradient], [none], [K], [C], spec, spec,
            lr=torch.tensor(1.0), momentum=0.0, weight_decay=0.0,
        )  # fmt: skip
        assert outcomes.tolist() == [1] and counter.item() == 1, j
        assert weight.eq(1).all(), j
