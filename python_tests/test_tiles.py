"""bfloat16 layers whose blocks and borders fill tiles: P is kept as planes of bfloat16 numbers.

Where the processor has no AMX, and on the other backends, these are steps like all others.
"""

from collections.abc import Callable

import calls
import pytest
import torch
from reference import masks
from torch import Tensor

from singd_ext import StructuredMatrix, ops

pytestmark = pytest.mark.usefixtures("backend")

WIDE = [
    "block_diagonal:30", "block_diagonal:32", "block_diagonal:48", "hierarchical:15,15",
    "rank_tril:24", "rank_triu:24", "rank_tril_topleft:30", "rank_triu_topleft:32",
]  # fmt: skip
SHAPES = [calls.Shape(70, 129, True), calls.Shape(33, 96), calls.Shape(150, 40)]


def memory(fill: int, size: int = 1 << 22) -> Tensor:
    """Memory of a call, of which it takes what it needs; all ones are NaN in every type."""
    return torch.full((size,), fill, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", WIDE)
def test_what_was_in_the_memory_of_a_call_does_not_matter(spec: str, dtype: torch.dtype) -> None:
    calls.assert_same(
        *(
            calls.update_parameters(
                spec, spec, SHAPES, dtype, products=products, workspace=memory(fill)
            )
            for fill in (0, 255)
            for products in (memory(fill), None)
        )
    )


@pytest.mark.parametrize("spec", ["block_diagonal:32", "rank_tril:32"])
def test_kept_products_are_not_those_of_layers_in_another_type(spec: str) -> None:
    """The numbers of P would pass for planes: a model may be cast between two steps."""
    shapes = [calls.Shape(64, 96)]
    fresh = calls.update_parameters(spec, spec, shapes, torch.bfloat16, torch.float32)
    products = torch.empty(0, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        last = calls.update_parameters(spec, spec, shapes, dtype, torch.float32, products=products)
    assert torch.equal(last["weight"][0], fresh["weight"][0])


def canceling(spec: str, dim: int) -> Tensor:
    """The storage of a factor F with rows that differ in their sign, as far as it can have them."""
    dense = torch.eye(dim, dtype=torch.float64)
    dense[:, 0], dense[:, -1] = 0.0, 0.0
    dense[0, 0], dense[1, 0], dense[0, -1], dense[1, -1] = 1.0, -1.0, 1.0, -1.0
    return StructuredMatrix.extract(spec, masks.member(spec, dense).float()).data


def spreading(spec: str, dim: int) -> Tensor:
    """The same with rows in the middle that take a difference of the first or the last two."""
    dense = torch.eye(dim, dtype=torch.float64)
    for first, second in ((0, 1), (dim - 1, dim - 2)):
        dense[first, first] = dense[second, second] = 1.5
        for middle in (5, 20, 30):  # one at least is in no border
            dense[first, middle] = dense[middle, first] = 1.0
            dense[second, middle] = dense[middle, second] = -1.0
    return StructuredMatrix.extract(spec, masks.member(spec, dense).float()).data


@pytest.mark.parametrize("factor", [canceling, spreading])
@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", WIDE)
def test_a_difference_of_gradients_is_not_that_of_rounded_ones(
    spec: str, side: str, scale: float | None, factor: Callable[[str, int], Tensor]
) -> None:
    """P G has g₀ − g₁ of gradients that are close: what is summed is rounded at the end alone."""
    d = 40
    structures = ("diagonal", spec) if side == "left" else (spec, "diagonal")
    dims = (d, 37) if side == "right" else (37, d)
    factors = [
        torch.ones(n) if s == "diagonal" else factor(s, n)
        for s, n in zip(structures, dims, strict=True)
    ]
    gradient = torch.zeros(dims[1], dims[0], dtype=torch.bfloat16)
    rows = gradient if side == "left" else gradient.T
    rows[[0, -1]] = 1 + 2**-7
    rows[[1, -2]] = 1
    weight = torch.zeros_like(gradient)
    ops.preconditioned_update_(
        [weight], [torch.empty(0)], [], [], [torch.zeros((), dtype=torch.int64)],
        [gradient], [torch.empty(0)], [factors[0]], [factors[1]], *structures,
        lr=torch.tensor(1.0), momentum=0.0, weight_decay=0.0,
        grad_scale=None if scale is None else torch.tensor(scale),
    )  # fmt: skip
    K, C = (
        StructuredMatrix(s, n, f).to_dense().double()
        for s, n, f in zip(structures, dims, factors, strict=True)
    )
    truth = -(C @ C.T @ gradient.double() @ K @ K.T) / (scale or 1.0)
    torch.testing.assert_close(weight.double(), truth, rtol=2**-7, atol=2**-16)
