"""Products of size on a CPU: oneDNN's, those of Toeplitz factors in panels, and K Kᵀ that is kept.

Panels are about 256 wide. Beyond d = 850 (on the left) and 600 (on the right) float32 takes FFTs.
"""

import math

import calls
import pytest
import torch
from reference import masks
from test_operators import curvature_of, expected_curvature, random, random_member, rival_gram
from tolerance import assert_close_to_truth
from torch import Tensor

from singd_ext import _C, SINGD, StructuredMatrix, ops

DIMS = [257, 383, 384, 385, 511, 601, 769, 850, 851]
TOEPLITZ = ["triu_toeplitz", "tril_toeplitz"]


@pytest.mark.parametrize("spec", [*TOEPLITZ, "dense", "tril"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.filterwarnings("ignore:TF32")  # of torch's flags, whatever is set
def test_structured_matmul(
    spec: str, dtype: torch.dtype, side: str, transpose: bool, onednn: bool
) -> None:
    with torch.backends.mkldnn.flags(enabled=onednn):
        check_matmul(spec, dtype, side, transpose)


def check_matmul(spec: str, dtype: torch.dtype, side: str, transpose: bool) -> None:
    for dim in DIMS:
        factor = random_member(spec, dim, dtype)
        x = random(*((dim, 131) if side == "left" else (131, dim)), dtype=dtype)
        ours = ops.structured_matmul(factor.data, dim, spec, x, side=side, transpose=transpose)
        dense = factor.to_dense().T if transpose else factor.to_dense()
        rival, truth = (
            op @ y if side == "left" else y @ op
            for op, y in ((dense, x), (dense.double(), x.double()))
        )
        assert_close_to_truth(ours, rival, truth)


@pytest.mark.parametrize("spec", [*TOEPLITZ, "dense", "triu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ones_column", [False, True])
@pytest.mark.parametrize("rows", [130, 1029])
def test_statistic(spec: str, dtype: torch.dtype, ones_column: bool, rows: int) -> None:
    for dim in (385, 640) if rows == 1029 else (300, 640, 1025, 1536):
        if dim > 700 and dtype == torch.float32:
            continue  # no other way than at 640
        x = random(1, rows, dim - ones_column, dtype=dtype)
        factor = random_member(spec, dim, dtype)
        statistic = torch.zeros_like(factor.data, dtype=torch.float32)
        ops.accumulate_statistic_(statistic, x, factor.data, dim, spec, ones_column=ones_column)
        ours = curvature_of(statistic, factor, spec)
        fast = dtype if _C.cpu_bfloat16_gram() else torch.float32
        truth = expected_curvature([x], factor, spec, ones_column, "expand", torch.float64)
        if spec in TOEPLITZ and fast == torch.float32:  # FFTs
            ones = torch.ones(rows, int(ones_column))
            y = torch.cat([x[0].float(), ones], 1) @ factor.to_dense().float()
            rival = masks.project(spec, rival_gram(spec, y, fast).double()).to(fast)
        else:
            rival = expected_curvature([x], factor, spec, ones_column, "expand", fast)
        assert_close_to_truth(ours, rival, truth, factor=4.0, floor=16.0)


def momentum_of(M: Tensor, G: Tensor, K: Tensor, C: Tensor) -> Tensor:
    return 0.5 * M + C @ (C.T @ G) @ K @ K.T


@pytest.mark.parametrize("specs", [*((t, t) for t in TOEPLITZ), ("triu_toeplitz", "dense")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_step(specs: tuple[str, str], dtype: torch.dtype, bias: bool) -> None:
    """Factors and layers of one type, K K^T of the dense factor kept or not."""
    for d_i, d_o, kept in ((385, 300, False), (257, 640, True), (1025, 40, False)):
        K, C = (random_member(s, d, dtype) for s, d in zip(specs, (d_i, d_o), strict=True))
        G, W, M = (calls.numbers(d_o, d_i, seed=s, dtype=dtype) for s in range(3))
        columns = d_i - bias
        parts = [[t[:, :columns].clone(), t[:, columns:].flatten().clone()] for t in (W, M, G)]
        weight, momentum, gradient = ([[t] for t in pair] for pair in parts)
        square = C.to_dense() if kept and specs[1] == "dense" else None
        ops.preconditioned_update_(
            *weight, *momentum, [torch.zeros((), dtype=torch.int64)], *gradient,
            [K.data], [C.data], *specs, lr=torch.tensor(0.5), momentum=0.5, weight_decay=0.0,
            P_C=[] if square is None else [(square @ square.T).contiguous()],
        )  # fmt: skip
        ours = torch.cat([t.view(d_o, -1) for (t,) in momentum], 1)
        dense = [K.to_dense(), C.to_dense()]

        rival, truth = momentum_of(M, G, *dense), momentum_of(*(t.double() for t in (M, G, *dense)))
        assert_close_to_truth(ours, rival, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_its_transpose(dtype: torch.dtype) -> None:
    for dim in (1, 2, 127, 256, 257, 384, 700):
        square = StructuredMatrix("dense", dim, random(dim * dim, dtype=dtype)).to_dense()
        ours = _C.cpu_times_its_transpose(square)
        assert ours.dtype == dtype and torch.equal(ours, ours.T)
        assert_close_to_truth(ours, square @ square.T, square.double() @ square.double().T)
        if dim > 1:
            strided = _C.cpu_times_its_transpose(square.T)
            assert torch.equal(strided, _C.cpu_times_its_transpose(square.T.contiguous()))


def ill_conditioned(dim: int, condition: float) -> tuple[Tensor, Tensor, Tensor]:
    """K in bfloat16, the eigenvalues of K Kᵀ when it is rounded to that, and its eigenvectors."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q
    roots = torch.logspace(0, -math.log10(condition) / 2, dim, dtype=torch.float64)
    K = (q * roots @ q.T).bfloat16()
    product = K.double() @ K.double().T
    assert torch.linalg.eigvalsh(product)[0] > 0.9 / condition
    return K, *torch.linalg.eigh(product.bfloat16().double())


@pytest.mark.parametrize("dim", [256, 1024])
def test_a_step_of_ill_conditioned_factors_descends(dim: int) -> None:
    """Along an eigenvector that a rounded K Kᵀ has with a negative eigenvalue, it would ascend."""
    assert ill_conditioned(dim, 1e3)[1][0] > 0
    K, eigenvalues, vectors = ill_conditioned(dim, 1e4)
    assert -1e-3 < eigenvalues[0] < 0
    net = torch.nn.Linear(dim, dim, bias=False, dtype=torch.bfloat16)
    optimizer = SINGD(net, lr=1.0, momentum=0.0, T=10, structures=("dense", "dense"))
    net(torch.randn(9, dim, dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()
    optimizer.factors()[""][0].data.copy_(K.flatten())
    torch.nn.init.zeros_(net.weight)
    net.weight.grad = vectors[:, 0].bfloat16().expand(dim, dim).clone()
    optimizer.step()
    assert (net.weight.double() * net.weight.grad.double()).sum() < 0
