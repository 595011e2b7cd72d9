"""Faults that must not hide: NaN behind a norm, overflow between products, memory that is missing.

Of the CPU's kernels.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import inputs, mlp, snapshot
from torch import Tensor, nn
from torch.testing import assert_close

from singd_ext import _C, SINGD, StructuredMatrix, ops

LOCAL = ["diagonal", "block_diagonal:8", "rank_triu:1", "rank_tril:1", "rank_triu:7", "rank_tril:7",
         "hierarchical:3,4", "hierarchical:15,15"]  # fmt: skip
DIM = 40


def _factor(spec: str, dtype: torch.dtype = torch.float32) -> Tensor:
    factor = inputs(_C.storage_size(spec, DIM), seed=3, dtype=torch.float64) / 10
    factor[_C.diagonal_slots(spec, DIM)] = 1
    return factor.to(dtype)


def _step(spec: str, K: Tensor, C: Tensor, G: Tensor, **options: Any) -> tuple[int, Tensor, Tensor]:
    """The step of one layer without bias: its outcome, W and M."""
    none, W, M = torch.empty(0), torch.ones_like(G), torch.zeros_like(G)
    skipped = torch.zeros((), dtype=torch.int64)
    outcomes = ops.preconditioned_update_(
        [W], [none], [M], [none], [skipped], [G], [none], [K], [C], spec, spec,
        lr=torch.tensor(0.1), momentum=0.9, weight_decay=0.0, **options,
    )  # fmt: skip
    assert outcomes.item() == skipped.item()
    return int(skipped), W, M


# -------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("side", ["K", "C"])
@pytest.mark.parametrize("spec", LOCAL)
def test_nan_anywhere_in_a_factor_keeps_the_layer(spec: str, side: str, dtype: torch.dtype) -> None:
    G = inputs(DIM, DIM, dtype=dtype)
    for slot in range(0, _C.storage_size(spec, DIM), 7):
        factors = {"K": _factor(spec, dtype), "C": _factor(spec, dtype)}
        factors[side][slot] = float("nan")
        skipped, W, M = _step(spec, factors["K"], factors["C"], G)
        assert skipped == 1, slot
        assert torch.equal(W, torch.ones_like(W)) and not M.any()


@pytest.mark.parametrize("spec", [*LOCAL, "dense", "triu_toeplitz"])
@pytest.mark.parametrize("scale", [float("nan"), 0.0])
def test_scale_that_makes_nan_of_zero_gradients_keeps_the_layer(scale: float, spec: str) -> None:
    factor, grad_scale = _factor(spec), torch.tensor(scale)
    skipped, W, _ = _step(spec, factor, factor, torch.zeros(DIM, DIM), grad_scale=grad_scale)
    assert skipped == 1 and torch.equal(W, torch.ones_like(W))


@pytest.mark.parametrize("spec", [*LOCAL, "dense", "triu_toeplitz"])
@pytest.mark.parametrize("scale", [1e8, 1e10, 1e13, 1e18])
def test_second_order_exponential_of_a_huge_momentum(scale: float, spec: str) -> None:
    model = nn.Linear(20, 10)
    optimizer = SINGD(model, T=1, structures=(spec, spec), expm_order=2, max_update_norm=1.0)
    with pytest.warns(UserWarning, match="layers"):
        for seed in range(3):
            optimizer.zero_grad()
            x = inputs(8, 20, seed=seed, dtype=torch.float32)
            ((scale if seed == 1 else 1.0) * model(x).square().mean()).backward()
            optimizer.step()
    for name, value in snapshot(model, optimizer).items():
        if isinstance(value, Tensor):
            assert value.isfinite().all(), name


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None


def test_output_without_gradient_adds_nothing() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, lr_cov=0.0)
    _NoGradient.apply(model(inputs())).sum().backward()
    assert all("statistic_K" not in state for state in optimizer.state.values())
    assert all(p.grad is None for p in model.parameters())
    (_NoGradient.apply(model(inputs())).sum() + model[0](inputs()).sum()).backward()
    optimizer.step()


# -------------------------------------------------------------------- memory


def _fixed(size: int) -> Tensor:
    """Memory that cannot be enlarged, as if there were no more."""
    return torch.frombuffer(bytearray(size), dtype=torch.uint8)


@pytest.mark.parametrize("spec", ["block_diagonal:8", "hierarchical:3,4", "dense"])
def test_failed_call_leaves_no_memory_that_passes_for_more(spec: str) -> None:
    factor, G = _factor(spec), inputs(DIM, DIM, dtype=torch.float32)
    workspace = _fixed(64)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="resize"):
            _step(spec, factor, factor, G, workspace=workspace)
        assert workspace.numel() == 0
    assert _step(spec, factor, factor, G, workspace=torch.empty(0, dtype=torch.uint8))[0] == 0


@pytest.mark.parametrize("spec", ["block_diagonal:8", "hierarchical:3,4", "diagonal"])
def test_products_that_were_not_made_do_not_pass_for_kept(spec: str) -> None:
    factor, G = _factor(spec), inputs(DIM, DIM, dtype=torch.float32)
    products = torch.empty(0, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="resize"):
        _step(spec, factor, factor, G, workspace=_fixed(64), products=products)
    assert products.numel() == 0
    for _ in range(2):  # made, then kept
        _, W, _ = _step(spec, factor, factor, G, products=products)
        assert products.numel() > 0
        assert torch.equal(W, _step(spec, factor, factor, G)[1])


# -------------------------------------------------------------------- random bits


@pytest.mark.parametrize("options", [{}, {"max_update_norm": 1e9}], ids=["together", "bounded"])
@pytest.mark.parametrize("groups", [False, True], ids=["group", "groups"])
def test_layers_and_groups_are_rounded_by_bits_of_their_own(
    groups: bool, options: dict[str, Any]
) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False).bfloat16() for _ in range(2)))
    model[1].weight.data.copy_(model[0].weight)
    params = [{"params": layer.parameters()} for layer in model] if groups else None
    optimizer = SINGD(
        model, params, lr_cov=0.0, stochastic_rounding=True, structures=("diagonal", "diagonal"),
        **options,
    )  # fmt: skip
    x = inputs(16, 64, dtype=torch.bfloat16)
    for _ in range(20):
        optimizer.zero_grad()
        sum(layer(x).float().square().mean() for layer in model).backward()
        optimizer.step()
    same = (model[0].weight == model[1].weight).float().mean()
    assert 0.05 < same < 0.4


def test_bias_of_more_columns_than_one_is_refused() -> None:
    factor = torch.ones(3)
    W, b = torch.zeros(3, 2), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"bias has shape \[3, 2\] but the weight has 3 rows"):
        ops.preconditioned_update_(
            [W], [b], [], [], [torch.zeros((), dtype=torch.int64)], [W], [b], [factor], [factor],
            "diagonal", "diagonal", lr=torch.tensor(0.1), momentum=0.0, weight_decay=0.0,
        )  # fmt: skip


# -------------------------------------------------------------------- outputs changed in place


class _InPlace(nn.Module):
    """A layer whose output is changed in place."""

    def __init__(self, layer: nn.Module, change: str) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.change == "relu":
            return torch.relu_(y)
        if self.change == "residual":
            y += 1.5
        elif self.change == "index":
            y[..., 0] = 0
        return y * y


LAYERS = {
    "linear 1d": (lambda: nn.Linear(6, 6), (6,)),
    "linear 2d": (lambda: nn.Linear(6, 6), (4, 6)),
    "linear 3d": (lambda: nn.Linear(6, 6), (4, 3, 6)),
    "linear 4d": (lambda: nn.Linear(6, 6), (2, 2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 6, bias=False), (4, 3, 6)),
    "conv": (lambda: nn.Conv1d(6, 6, 3), (4, 6, 6)),
    "unbatched conv": (lambda: nn.Conv1d(6, 6, 3), (6, 6)),
    "unbatched conv, channels last": (
        lambda: nn.Conv2d(6, 6, 3).to(memory_format=torch.channels_last),
        (6, 6, 5),
    ),
    "unbatched transposed conv": (lambda: nn.ConvTranspose1d(6, 6, 3), (6, 6)),
}


@pytest.mark.parametrize("change", ["relu", "residual", "index"])
@pytest.mark.parametrize("name", LAYERS)
def test_output_changed_in_place_is_observed(name: str, change: str) -> None:
    make, shape = LAYERS[name]
    snapshots = []
    for in_place in (True, False):
        torch.manual_seed(0)
        layer = make().double()
        model = _InPlace(layer, change)
        optimizer = SINGD(model, T=1, lr_cov=0.01)
        x = inputs(*shape)
        if in_place:
            y = model(x)
        elif change == "relu":
            y = torch.relu(layer(x))
        elif change == "residual":
            y = (layer(x) + 1.5).square()
        else:
            output = layer(x)
            kept = torch.ones_like(output)
            kept[..., 0] = 0
            y = (output * kept).square()
        y.square().sum().backward()
        assert optimizer.state[layer.weight]["rows"] > 0
        optimizer.step()
        snapshots.append(snapshot(model, optimizer))
    assert_close(snapshots[0], snapshots[1], rtol=1e-12, atol=1e-14)


def test_out_projection_changed_in_place_is_observed() -> None:
    snapshots = []
    for in_place in (True, False):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(6, 2, batch_first=True).double()
        optimizer = SINGD(attention, T=1, lr_cov=0.01)
        x = inputs(3, 4, 6)
        y = attention(x, x, x, need_weights=False)[0]
        y = y.add_(x) if in_place else y + x
        y.square().sum().backward()
        optimizer.step()
        snapshots.append(snapshot(attention, optimizer))
    assert_close(snapshots[0], snapshots[1], rtol=1e-12, atol=1e-14)


def test_layer_that_is_used_twice_and_changed_once_counts_all_rows() -> None:
    layer = nn.Linear(4, 4)
    optimizer = SINGD(layer, T=1)
    x = inputs(3, 2, 4, dtype=torch.float32)
    layer(torch.relu_(layer(x))).square().mean().backward()
    assert optimizer.state[layer.weight]["rows"] == 12


# -------------------------------------------------------------------- large numbers, other types


@pytest.mark.parametrize("scale", [1e17, 1e19, 1e30])
@pytest.mark.parametrize(
    ("bound", "largest"), [({"max_update_norm": 0.01}, 0.01), ({"kl_clip": 1e-3}, 1e-3**0.5)]
)
def test_bounds_bind_where_squares_overflow_float32(
    bound: dict[str, float], largest: float, scale: float
) -> None:
    layer = nn.Linear(4, 4, bias=False)
    before = layer.weight.detach().clone()
    structures = ("diagonal", "diagonal")
    optimizer = SINGD(layer, momentum=0.0, lr_cov=0.0, structures=structures, T=1000, **bound)
    layer.weight.grad = torch.full((4, 4), scale)
    with pytest.warns(UserWarning, match="modules were not called"):
        optimizer.step()
    assert (layer.weight - before).norm().item() == pytest.approx(largest, rel=1e-3)
    assert optimizer.rejections() == {"": (0, 0)}


def test_step_cap_of_blocks_where_squares_overflow_float32() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, bias=False)
    options = {"alpha1": 0.0, "kfac_like": True, "structures": ("block_diagonal:4",) * 2}
    optimizer = SINGD(layer, T=1, **options)
    layer(torch.randn(1, 8) * 1e11).backward(torch.zeros(1, 4))
    with pytest.warns(UserWarning, match="step_cap"):
        optimizer.step()
    change = optimizer.factors()[""][0].to_dense() - torch.eye(8)
    assert change.norm().item() == pytest.approx(0.5, rel=1e-5)


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.T.clone(memory_format=torch.contiguous_format).T


def _channels_last(matrix: Tensor) -> Tensor:
    return matrix.view(len(matrix), -1, 3, 1).clone(memory_format=torch.channels_last)


def _channels_apart(matrix: Tensor) -> Tensor:
    channels = matrix.view(len(matrix), -1, 3, 1).transpose(0, 1)
    return channels.clone(memory_format=torch.contiguous_format).transpose(0, 1)


@pytest.mark.parametrize("spec", ["diagonal", "block_diagonal:4", "rank_tril:2"])
@pytest.mark.parametrize("laid_out", [_transposed, _channels_last, _channels_apart])
def test_a_step_in_another_order_is_refused_where_it_would_overflow(
    spec: str, laid_out: Callable[[Tensor], Tensor]
) -> None:
    """Near overflow what would be stored is looked at, number by number."""
    d_o, d_i = 7, 12
    K, C = (StructuredMatrix.eye(spec, d, torch.float32).data for d in (d_i, d_o))
    none, largest = torch.empty(0), torch.finfo(torch.float32).max
    start = torch.full((d_o, d_i), largest / 8)
    for number in range(d_o * d_i):
        gradient = torch.full((d_o, d_i), largest / 2)
        for value, refused in ((largest, False), (-largest, True)):
            gradient.view(-1)[number] = value
            weight, counter = laid_out(start), torch.zeros((), dtype=torch.int64)
            ops.preconditioned_update_(
                [weight], [none], [], [], [counter], [laid_out(gradient)], [none],
                [K], [C], spec, spec, lr=torch.tensor(1.0), momentum=0.0, weight_decay=0.0,
            )  # fmt: skip
            assert counter.item() == refused
            assert torch.equal(weight.reshape(d_o, d_i), start if refused else start - gradient)


class _Mixed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float(), self.bias)


def test_momentum_of_a_bias_follows_its_own_dtype() -> None:
    layer = _Mixed(4, 3)
    layer.weight.data = layer.weight.data.bfloat16()
    optimizer = SINGD(layer, T=1000)
    for dtype in (torch.bfloat16, torch.float16):
        layer.weight.data = layer.weight.data.to(dtype)
        optimizer.zero_grad()
        layer(inputs(5, 4, dtype=torch.float32)).square().mean().backward()
        optimizer.step()
        assert optimizer.state[layer.weight]["momentum_buffer"].dtype == dtype
        assert optimizer.state[layer.bias]["momentum_buffer"].dtype == torch.float32
