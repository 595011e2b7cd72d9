"""Sparse structures have no d × d matrix anywhere, and Toeplitz products are FFTs of length O(d).

Every operation that PyTorch runs is recorded with its shapes, also inside the operators; the growth
of the operators' own kernels is counted by csrc/tests/test_cpu_operations.cpp.
"""

from dataclasses import dataclass
from math import prod

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from singd_ext import SINGD
from singd_ext.bench.memory import quiet_profiler

TOEPLITZ = ("triu_toeplitz", "tril_toeplitz")
SPARSE = (
    "diagonal", "block_diagonal:30", "rank_triu:1", "rank_tril:1", "rank_triu_topleft:1",
    "rank_tril_topleft:1", "hierarchical:15,15", *TOEPLITZ,
)  # fmt: skip
BYTES = {
    "bool": 1, "unsigned char": 1, "float": 4, "double": 8, "long int": 8,
    "c10::complex<float>": 8, "c10::complex<double>": 16,
}  # fmt: skip
THIN, ROWS = 48, 16  # of W, and of X


@dataclass
class Seen:
    """What one training step of layers d → THIN → d did.

    Attributes:
        largest: Bytes of the largest tensor that an operation took, workspaces too.
        allocated: Bytes of the largest allocation of a tensor.
        lengths: Of FFTs.
        transformed: Elements that FFTs took.
    """

    largest: int
    allocated: int
    lengths: set[int]
    transformed: int


def training_step(spec: str, d: int, rows: int = ROWS) -> Seen:
    """Statistic, factor update and step for K and C of dimension d."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(d, THIN, bias=False), nn.Linear(THIN, d, bias=False))
    optimizer = SINGD(net, structures=(spec, spec), T=1)
    x = torch.randn(rows, d)

    def step() -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    step()
    quiet_profiler()
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True
    ) as record:
        step()
    events = record.profiler.kineto_results.events()
    tensors = [t for e in events for t in zip(e.shapes(), e.dtypes(), strict=True) if t[0]]
    shapes = [(e.name(), shape) for e in events for shape in e.shapes() if shape]
    # A transform back takes half of its length, the other half being conjugate.
    ffts = [shape for name, shape in shapes if name in ("aten::_fft_r2c", "aten::_fft_c2r")]
    return Seen(
        largest=max(prod(shape) * BYTES[dtype] for shape, dtype in tensors),
        allocated=max(e.nbytes() for e in events if e.name() == "[memory]"),
        lengths={max(shape) for shape in ffts},
        transformed=sum(prod(shape) for shape in ffts),
    )


@pytest.mark.parametrize("spec", SPARSE)
def test_nothing_grows_faster_than_d(spec: str) -> None:
    """Tensors have a few times as many numbers as W, and twice as many for twice d."""
    small, large = training_step(spec, 2048), training_step(spec, 4096)
    for one, two in ((small.largest, large.largest), (small.allocated, large.allocated)):
        assert two <= 2 * one
        assert two <= 6 * 4 * THIN * 4096 < 4 * 4096**2 / 10


@pytest.mark.parametrize("spec", TOEPLITZ)
def test_toeplitz_products_are_ffts_of_length_2d(spec: str) -> None:
    for d in (1000, 1500, 4096):
        lengths = training_step(spec, d).lengths
        assert lengths and max(lengths) <= 2.1 * d and min(lengths) >= d  # d: of half a spectrum


@pytest.mark.parametrize("spec", TOEPLITZ)
def test_ffts_grow_with_d_and_with_the_rows(spec: str) -> None:
    """The number of elements is that of X, g and W times a constant; the logarithm is the FFT's."""
    once = training_step(spec, 2048).transformed
    assert training_step(spec, 4096).transformed == pytest.approx(2 * once, rel=0.01)
    rows = [training_step(spec, 2048, m).transformed for m in (16, 32, 48)]
    assert rows[2] - rows[1] == rows[1] - rows[0] > 0


def test_a_square_matrix_would_be_seen() -> None:
    """Small Toeplitz factors multiply by a dense copy, and a dense factor is one."""
    assert training_step("triu_toeplitz", 256).largest >= 4 * 256**2
    assert training_step("dense", 512).largest >= 4 * 512**2
