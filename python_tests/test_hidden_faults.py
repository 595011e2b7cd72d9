"""Faults that must not hide: NaN behind a norm, overflow between products, memory that is missing.

Of the CPU's kernels.
"""

from typing import Any

import pytest
import torch
from nets import inputs, mlp, snapshot
from torch import Tensor, nn

from singd_ext import _C, SINGD, ops

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
