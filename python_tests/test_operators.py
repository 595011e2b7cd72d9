"""Every operator against dense float64, for every structure, dtype, awkward size and layout.

The rival of each tolerance is the same mathematics with dense matrices in PyTorch at that dtype.
"""

import pytest
import torch
from reference import masks
from tolerance import assert_close_to_truth
from torch import Tensor

from singd_ext import _C, StructuredMatrix, ops

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Around the sizes of blocks and borders, the chunks of rows, and the switch to FFTs at 256.
DIMS = [1, 2, 3, 4, 5, 6, 7, 31, 33, 64, 65, 129, 256, 257]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal numbers that the dtype represents exactly."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device(), dtype)


def random_member(spec: str, dim: int, dtype: torch.dtype, seed: int = 1) -> StructuredMatrix:
    """A well-scaled random matrix of the structure."""
    dense = masks.member(spec, random(dim, dim, seed=seed)) / dim**0.5
    # Numbers of the dtype, so that truth and operator start from the same matrix.
    return StructuredMatrix.extract(spec, dense.to(dtype))


every_structure = pytest.mark.parametrize("spec", masks.SPECS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@every_structure
@every_dtype
def test_project(spec: str, dtype: torch.dtype) -> None:
    for dim in DIMS:
        symmetric = random(dim, dim)
        symmetric = (symmetric + symmetric.T).to(dtype)
        ours = StructuredMatrix.project(spec, symmetric).to_dense()
        truth = masks.project(spec, symmetric.double())
        rival = masks.project(spec, symmetric.double()).to(dtype)
        assert_close_to_truth(ours, rival, truth)


@every_structure
@every_dtype
@pytest.mark.parametrize("rows", [0, 1, 3, 260, 1031])
def test_project_gram(spec: str, dtype: torch.dtype, rows: int) -> None:
    for dim in DIMS:
        x = random(rows, dim, dtype=dtype)
        ours = StructuredMatrix.project_gram(spec, x)
        wide = x if dtype == torch.float64 else x.float()
        assert ours.dtype == wide.dtype
        truth = masks.project(spec, x.double().T @ x.double())
        rival = masks.project(spec, rival_gram(spec, x, wide.dtype).double()).to(wide.dtype)
        assert_close_to_truth(ours.to_dense(), rival, truth, factor=4.0, floor=8.0)


def rival_gram(spec: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """XᵀX, or of a Toeplitz structure what FFTs make of its diagonal sums.

    On a GPU that of 16-bit rows comes from its tensor cores, whose sums are less accurate than
    those of float32 rows: an H100 rounds them towards zero.
    """
    if not masks.is_toeplitz(spec) and x.is_cuda and x.element_size() == 2 and x.shape[0] > 0:
        return torch.mm(x.T, x, out_dtype=dtype)
    x = x.to(dtype)
    if not masks.is_toeplitz(spec) or x.shape[0] == 0:
        return x.T @ x
    dim = x.shape[1]
    power = torch.fft.rfft(x, 2 * dim).abs().square().sum(0)
    sums = torch.fft.irfft(power, 2 * dim)[:dim]
    offset = (torch.arange(dim)[:, None] - torch.arange(dim)).abs()
    return (sums / torch.arange(dim, 0, -1))[offset]


@every_structure
@every_dtype
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("transpose", [False, True])
def test_structured_matmul(spec: str, dtype: torch.dtype, side: str, transpose: bool) -> None:
    for dim in DIMS:
        for other in (0, 1, 5, 70):
            factor = random_member(spec, dim, dtype)
            x = random(*((dim, other) if side == "left" else (other, dim)), dtype=dtype)
            ours = ops.structured_matmul(factor.data, dim, spec, x, side=side, transpose=transpose)
            dense = factor.to_dense()
            op = dense.T if transpose else dense
            rival = op @ x if side == "left" else x @ op
            truth = op.double() @ x.double() if side == "left" else x.double() @ op.double()
            assert ours.dtype == dtype
            assert_close_to_truth(ours, rival, truth)


@every_structure
@every_dtype
def test_structured_product_and_gram(spec: str, dtype: torch.dtype) -> None:
    for dim in DIMS:
        a, b = (random_member(spec, dim, dtype, seed) for seed in (1, 2))
        dense_a, dense_b = a.to_dense(), b.to_dense()
        truth = dense_a.double() @ dense_b.double()
        assert_close_to_truth((a @ b).to_dense(), dense_a @ dense_b, truth)
        gram = dense_a.double().T @ dense_a.double()
        rival = masks.project(spec, (dense_a.T @ dense_a).double()).to(dtype)
        assert_close_to_truth(a.gram().to_dense(), rival, masks.project(spec, gram))


@every_structure
@every_dtype
@pytest.mark.parametrize("ones_column", [False, True])
@pytest.mark.parametrize("shared", ["expand", "mean", "sum"])
def test_accumulated_statistic_gives_the_projected_curvature(
    backend: str, spec: str, dtype: torch.dtype, ones_column: bool, shared: str
) -> None:
    """Two micro-batches of different length, then m = ½ (Π(KᵀUK) − I) from a factor update."""
    for dim in (1, 2, 5, 7, 33, 65, 129, 257):
        features = dim - ones_column
        factor = random_member(spec, dim, dtype)
        batches = [random(3, 5, features, dtype=dtype), random(70, 4, features, dtype=dtype)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        statistic = torch.zeros_like(factor.data, dtype=wide)
        for x in batches:
            ops.accumulate_statistic_(
                statistic, x, factor.data, dim, spec, ones_column=ones_column, shared=shared
            )
        ours = curvature_of(statistic, factor, spec)
        truth = expected_curvature(batches, factor, spec, ones_column, shared, torch.float64)
        # Where that is fast, X K of these is a product in bfloat16, as in torch (docs/cpu.md).
        is_fast = backend == "cpu" and _C.cpu_bfloat16_gram() and dim >= 32 and shared == "expand"
        whole = spec in ("dense", "tril", "triu", "tril_toeplitz", "triu_toeplitz")
        rival_dtype = dtype if is_fast and whole and dtype == torch.bfloat16 else wide
        rival = expected_curvature(batches, factor, spec, ones_column, shared, rival_dtype)
        assert_close_to_truth(ours, rival, truth, factor=4.0, floor=16.0)


def curvature_of(statistic: Tensor, factor: StructuredMatrix, spec: str) -> Tensor:
    """Π(KᵀUK), read off the momentum of an IKFAC update with damping 0."""
    one = torch.ones(1, dtype=statistic.dtype)
    momentum, count = torch.zeros_like(statistic), torch.zeros((), dtype=torch.int64)
    ops.update_factors_(
        [factor.data.clone()], [one.clone()], [momentum], [one.clone()], [count],
        [statistic], [one.clone()], [1.0], [1.0], [factor.dim], [1], spec, "diagonal",
        lr_cov=torch.zeros(()), damping=0.0, alpha1=0.5, kfac_like=True, normalize_lr_cov=False,
        expm_order=1, step_cap=float("inf"),
    )  # fmt: skip
    assert count == 0
    eye = torch.eye(factor.dim, dtype=statistic.dtype)
    return 2 * StructuredMatrix(spec, factor.dim, momentum).to_dense() + eye


def expected_curvature(
    batches: list[Tensor],
    factor: StructuredMatrix,
    spec: str,
    ones_column: bool,
    shared: str,
    dtype: torch.dtype,
) -> Tensor:
    dense = factor.to_dense().to(dtype)
    gram = torch.zeros(factor.dim, factor.dim, dtype=dtype)
    for batch in batches:
        x = batch.to(dtype)
        if ones_column:
            x = torch.cat([x, torch.ones(*x.shape[:2], 1, dtype=dtype)], dim=2)
        rows = {"expand": x.flatten(0, 1), "mean": x.mean(1), "sum": x.sum(1)}[shared]
        gram += rows.T @ rows
    curvature = dense.T @ gram @ dense
    return masks.project(spec, curvature.double()).to(dtype)


def test_strided_and_misaligned_rows(backend: str) -> None:
    """Transposed, expanded, sliced and misaligned inputs give what contiguous ones give.

    The CPU gathers rows first, so the bits are the same; CUDA kernels sum strided rows in another
    order than contiguous ones.
    """
    x = random(6, 7, 10, dtype=torch.float32)
    storage = torch.zeros(x.numel() + 1)
    misaligned = storage[1:].view_as(x).copy_(x)
    expanded = x[:, :1].expand(6, 7, 10)
    variants = {
        "transposed": (x.transpose(1, 2).contiguous().transpose(1, 2), x),
        "every second": (x.repeat_interleave(2, dim=2)[..., ::2], x),
        "misaligned": (misaligned, x),
        "expanded": (expanded, expanded.contiguous()),
        "permuted batch": (x.transpose(0, 1), x.transpose(0, 1).contiguous()),
    }
    for spec in masks.SPECS:
        for shared in ("expand", "sum"):
            for name, (strided, contiguous) in variants.items():
                results = []
                for rows in (strided, contiguous, contiguous.double()):
                    factor = random_member(spec, 11, torch.float32).data.to(rows.dtype)
                    statistic = torch.zeros_like(factor)
                    ops.accumulate_statistic_(
                        statistic, rows, factor, 11, spec, ones_column=True, shared=shared
                    )
                    results.append(statistic)
                if backend == "cpu":
                    assert torch.equal(results[0], results[1]), f"{spec}, {name}"
                assert_close_to_truth(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_strided_parameters_are_updated_in_place(dtype: torch.dtype) -> None:
    """A channels-last weight and a sliced one end where contiguous ones end, and nothing else."""
    weight, gradient = random(6, 4, 3, 3, dtype=dtype), random(6, 4, 3, 3, dtype=dtype, seed=5)
    frame = torch.full((8, 4, 3, 3), 7.0, dtype=dtype)
    variants = [
        weight.clone(),
        weight.clone().to(memory_format=torch.channels_last),
        frame[1:7].copy_(weight),
    ]
    results = []
    for w in variants:
        empty = torch.empty(0)
        momentum = torch.zeros_like(w)
        ops.preconditioned_update_(
            [w], [empty], [momentum], [empty], [torch.zeros((), dtype=torch.int64)],
            [gradient], [empty], [random_member("triu", 36, dtype).data],
            [random_member("rank_tril:2", 6, dtype).data], "triu", "rank_tril:2",
            lr=torch.tensor(0.1), momentum=0.9, weight_decay=0.1,
        )  # fmt: skip
        results.append(w.clone())
    assert not torch.equal(results[0], weight)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert (frame[0] == 7).all() and (frame[7] == 7).all()


def test_overlapping_parameters_are_refused() -> None:
    weight = torch.zeros(1, 4).expand(3, 4)
    with pytest.raises(RuntimeError, match="single memory location"):
        update_one_layer(weight, torch.zeros(3, 4))


def update_one_layer(weight: Tensor, gradient: Tensor, **options: object) -> Tensor:
    empty = torch.empty(0)
    arguments = {"lr": torch.tensor(0.1), "momentum": 0.0, "weight_decay": 0.0} | options
    rows, columns = weight.shape[0], weight[0].numel()
    return ops.preconditioned_update_(
        [weight], [empty], [], [], [torch.zeros((), dtype=torch.int64)], [gradient], [empty],
        [torch.ones(columns)], [torch.ones(rows)], "diagonal", "diagonal", **arguments,
    )  # fmt: skip


def test_stochastic_rounding_keeps_the_mean_and_repeats() -> None:
    """A step of a tenth of a bfloat16 rounding moves the mean weight; round to nearest does not."""
    step = 2**-8 / 10
    start = torch.ones(64, 512, dtype=torch.bfloat16)
    gradient = torch.full_like(start, -1)  # weights grow, from 1 where the spacing is 2^-7
    nearest, first, second, other = (start.clone() for _ in range(4))
    for weight, key in ((nearest, None), (first, [3, 8]), (second, [3, 8]), (other, [3, 9])):
        update_one_layer(weight, gradient, lr=torch.tensor(step), rounding_key=key)
    assert torch.equal(nearest, start)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    moved = (first.double() - 1).mean().item()
    # Bernoulli draws of height 2^-7: the standard error of their mean, times 5.
    p = step / 2**-7
    assert abs(moved - step) < 5 * 2**-7 * (p * (1 - p) / start.numel()) ** 0.5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.project(torch.zeros(2, 3), "dense"), ValueError, "must be square"),
        (lambda: ops.project(torch.zeros(2, 2), "band:2"), ValueError, "'band:2' is unknown"),
        (lambda: ops.project(torch.zeros(2, 2, dtype=torch.int), "dense"), TypeError, "Int"),
        (lambda: ops.project(torch.zeros(2, 2, dtype=torch.cfloat), "dense"), TypeError, "Complex"),
        (lambda: ops.project_gram(torch.zeros(3), "dense"), ValueError, "2 dimensions"),
        (lambda: ops.project_gram(torch.zeros(3, 0), "dense"), ValueError, "at least 1"),
        (lambda: ops.to_dense(torch.zeros(3), 4, "diagonal"), ValueError, "stores 4 numbers"),
        (
            lambda: ops.to_dense(torch.zeros(8)[::2], 4, "diagonal"),
            ValueError,
            "must be contiguous",
        ),
        (
            lambda: ops.structured_matmul(torch.zeros(4), 4, "diagonal", torch.zeros(3, 2)),
            ValueError,
            r"does not fit a matrix of shape \[3, 2\]",
        ),
        (
            lambda: ops.structured_matmul(
                torch.zeros(4), 4, "diagonal", torch.zeros(4, 2), side="top"
            ),
            ValueError,
            "allowed are 'left' and 'right'",
        ),
        (
            lambda: ops.accumulate_statistic_(
                torch.zeros(4), torch.zeros(1, 2, 3), torch.zeros(4), 4, "diagonal"
            ),
            ValueError,
            "do not fit a factor 'diagonal' of dimension 4",
        ),
        (
            lambda: ops.accumulate_statistic_(
                torch.zeros(4, dtype=torch.bfloat16), torch.zeros(1, 2, 4), torch.zeros(4), 4,
                "diagonal",
            ),
            TypeError,
            "sums need float32 or float64",
        ),
        (
            lambda: ops.accumulate_statistic_(
                torch.zeros(4), torch.zeros(1, 2, 4), torch.zeros(4), 4, "diagonal", shared="max"
            ),
            ValueError,
            "allowed are 'expand', 'mean' and 'sum'",
        ),
        (
            lambda: update_one_layer(torch.zeros(3, 4), torch.zeros(4, 3)),
            ValueError,
            r"shape \[3, 4\] but its gradient has shape \[4, 3\]",
        ),
        (
            lambda: update_one_layer(torch.zeros(3, 4), torch.zeros(3, 4), lr=torch.zeros(2)),
            ValueError,
            "lr must hold one number",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


def test_a_failed_check_of_one_layer_changes_no_layer() -> None:
    weights, before = [torch.ones(2, 2), torch.ones(2, 2)], torch.ones(2, 2)
    counts = [torch.zeros((), dtype=torch.int64) for _ in weights]
    empty = [torch.empty(0), torch.empty(0)]
    with pytest.raises(ValueError, match="stores 2 numbers"):
        ops.preconditioned_update_(
            weights, empty, [], [], counts, [torch.ones(2, 2)] * 2, empty,
            [torch.ones(2), torch.ones(3)], [torch.ones(2)] * 2, "diagonal", "diagonal",
            lr=torch.tensor(1.0), momentum=0.0, weight_decay=0.0,
        )  # fmt: skip
    assert all(torch.equal(w, before) for w in weights)
