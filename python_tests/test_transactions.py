"""A step that cannot be taken changes nothing of its layer; no step makes a factor singular."""

import math
from typing import Any

import pytest
import torch
from nets import assert_bitwise, inputs, of_layer, snapshot, trained
from torch import Tensor, nn

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("backend")]

STRUCTURES = [
    "dense",
    "tril",
    "triu",
    "diagonal",
    "block_diagonal:2",
    "rank_triu:1",
    "rank_tril:2",
    "rank_triu_topleft:1",
    "rank_tril_topleft:1",
    "hierarchical:1,1",
    "triu_toeplitz",
    "tril_toeplitz",
]
INF, NAN = float("inf"), float("nan")
OPTIONS: dict[str, Any] = {"lr": 0.01, "lr_cov": 0.01, "T": 1, "weight_decay": 0.01}
FACTORS = (": K", ": C", ": m_K", ": m_C")


class TwoLayers(nn.Module):
    """Layers a and b, whose inputs and output gradients the test chooses."""

    def __init__(self, d_in: int = 5, d_out: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(d_in, d_out, dtype=dtype)
        self.b = nn.Linear(d_in, d_out, dtype=dtype)

    def backward(self, seed: int, x: Tensor | None = None, g: Tensor | None = None) -> None:
        """Both layers see normal numbers, but layer a sees x and g where given."""
        d_out, d_in = self.a.weight.shape
        dtype = self.a.weight.dtype
        random_x = inputs(4, d_in, seed=2 * seed, dtype=dtype)
        random_g = inputs(4, d_out, seed=2 * seed + 1, dtype=dtype) / 4
        for p in self.parameters():
            p.grad = None
        self.a(random_x if x is None else x).backward(random_g if g is None else g)
        self.b(random_x).backward(random_g)


def _with(tensor: Tensor, value: float) -> Tensor:
    tensor[1, 2] = value
    return tensor


def _factors_of(copies: dict[str, Any], layer: str) -> dict[str, Any]:
    return {key: value for key, value in copies.items() if key in [
        f"{layer}.weight{name}" for name in FACTORS]}  # fmt: skip


def _parameters_of(copies: dict[str, Any], layer: str) -> dict[str, Any]:
    factors = _factors_of(copies, layer)
    return {key: value for key, value in of_layer(copies, layer).items() if key not in factors}


def _all_changed(after: dict[str, Any], before: dict[str, Any]) -> bool:
    return all(not torch.equal(after[key], value) for key, value in before.items())


def _all_finite(copies: dict[str, Any]) -> bool:
    return all(value.isfinite().all() for value in copies.values() if isinstance(value, Tensor))


# -------------------------------------------------------------------- rejected updates


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("where", ["x", "g"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_non_finite_input_or_output_gradient_keeps_the_layer_and_trains_the_others(
    value: float, where: str, dtype: torch.dtype, structure: str
) -> None:
    model = TwoLayers(dtype=dtype)
    optimizer = SINGD(model, structures=(structure, structure), **OPTIONS)
    model.backward(0)
    optimizer.step()
    before = snapshot(model, optimizer)
    shape = (4, 5) if where == "x" else (4, 3)
    model.backward(1, **{where: _with(inputs(*shape, dtype=dtype), value)})
    with pytest.warns(UserWarning) as warned:
        optimizer.step()
    after = snapshot(model, optimizer)
    assert_bitwise(of_layer(after, "a"), of_layer(before, "a"))
    assert _all_changed(_parameters_of(after, "b"), _parameters_of(before, "b"))
    assert not torch.equal(after["b.weight: m_K"], before["b.weight: m_K"])
    assert optimizer.rejections() == {"a": (1, 1), "b": (0, 0)}
    messages = [str(w.message) for w in warned]
    assert len(messages) == 2 and all("'a'" in m and "'b'" not in m for m in messages)
    assert "curvature" in messages[0] and "gradient" in messages[1]

    model.backward(2, **{where: _with(inputs(*shape, dtype=dtype), value)})
    optimizer.step()  # silently
    assert optimizer.rejections() == {"a": (2, 2), "b": (0, 0)}
    model.backward(3)
    optimizer.step()
    assert optimizer.rejections() == {"a": (2, 2), "b": (0, 0)}
    final = snapshot(model, optimizer)
    assert _all_finite(final) and not torch.equal(final["a.weight"], before["a.weight"])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("huge", ["x", "g"])
def test_overflowing_statistic_keeps_the_factors_but_the_parameters_step(
    huge: str, structure: str
) -> None:
    scales = {"x": (1e25, 1e-25), "g": (1e-25, 1e25)}[huge]  # squares overflow float32
    model = TwoLayers(dtype=torch.float32)
    optimizer = SINGD(model, structures=(structure, structure), **OPTIONS)
    model.backward(0)
    optimizer.step()
    before = snapshot(model, optimizer)
    x, g = (inputs(4, d, dtype=torch.float32) * s for d, s in zip((5, 3), scales, strict=True))
    model.backward(1, x, g)
    model.a.bias.grad.zero_()
    with pytest.warns(UserWarning, match=r"'a'\].*curvature") as warned:
        optimizer.step()
    after = snapshot(model, optimizer)
    assert len(warned) == 1 and optimizer.rejections() == {"a": (1, 0), "b": (0, 0)}
    assert_bitwise(_factors_of(after, "a"), _factors_of(before, "a"))
    assert not torch.equal(after["b.weight: m_K"], before["b.weight: m_K"])
    assert _all_changed(_parameters_of(after, "a"), _parameters_of(before, "a"))
    assert _all_finite(after)


@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_non_finite_gradient_element_keeps_weight_bias_and_their_momenta(
    dtype: torch.dtype, value: float, parameter: str
) -> None:
    model = TwoLayers(dtype=dtype)
    optimizer = SINGD(model, **OPTIONS)
    model.backward(0)
    optimizer.step()
    before = snapshot(model, optimizer)
    model.backward(1)
    model.a.get_parameter(parameter).grad.view(-1)[1] = value
    with pytest.warns(UserWarning, match=r"'a'\].*gradient") as warned:
        optimizer.step()
    after = snapshot(model, optimizer)
    assert len(warned) == 1 and optimizer.rejections() == {"a": (0, 1), "b": (0, 0)}
    assert_bitwise(_parameters_of(after, "a"), _parameters_of(before, "a"))
    assert not torch.equal(after["a.weight: m_K"], before["a.weight: m_K"])
    assert _all_changed(_parameters_of(after, "b"), _parameters_of(before, "b"))


# -------------------------------------------------------------------- extreme but finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_zero_gradient_from_the_first_step_applies_weight_decay_once(
    structure: str, dtype: torch.dtype
) -> None:
    model = TwoLayers(dtype=dtype)
    optimizer = SINGD(
        model, structures=(structure, structure), lr=0.5, weight_decay=0.25, T=1, lr_cov=0.01
    )
    weight, bias = model.a.weight.detach().clone(), model.a.bias.detach().clone()
    model.backward(0, g=torch.zeros(4, 3, dtype=dtype))
    optimizer.step()
    for p, start in ((model.a.weight, weight), (model.a.bias, bias)):
        torch.testing.assert_close(p.detach(), start - 0.5 * (0.25 * start))
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 0.25 * start)
    for seed in range(3):
        model.backward(seed, g=torch.zeros(4, 3, dtype=dtype))
        optimizer.step()
    assert _all_finite(snapshot(model, optimizer))
    assert optimizer.rejections() == {"a": (0, 0), "b": (0, 0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_gradients_are_neither_lost_nor_rejected(dtype: torch.dtype) -> None:
    model = TwoLayers(dtype=dtype)
    optimizer = SINGD(model, T=1, lr=1.0, momentum=0.0)
    model.a.weight.data.zero_()
    model.backward(0, g=torch.full((4, 3), 1e-20, dtype=dtype))
    gradient = model.a.weight.grad.clone()
    optimizer.step()
    K, C = (f.to_dense().double() for f in optimizer.factors()["a"])
    assert optimizer.rejections()["a"] == (0, 0)
    joined = torch.cat([gradient, model.a.bias.grad.unsqueeze(1)], dim=1).double()
    expected = -(C @ C.T @ joined @ K @ K.T)[:, :-1]
    torch.testing.assert_close(model.a.weight.double(), expected, rtol=0.02, atol=1e-25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_1e30_are_rejected_as_curvature_but_stepped_with(dtype: torch.dtype) -> None:
    model = TwoLayers(dtype=dtype)
    optimizer = SINGD(model, **OPTIONS)
    before = snapshot(model, optimizer)
    model.backward(0, g=torch.full((4, 3), 1e30, dtype=dtype))
    with pytest.warns(UserWarning, match=r"'a'\].*curvature"):
        optimizer.step()
    after = snapshot(model, optimizer)
    assert_bitwise(_factors_of(after, "a"), _factors_of(before, "a"))
    assert _all_finite(after) and after["a.weight"].abs().max() > 1e27


@pytest.mark.parametrize("size", [1e25, 1.0])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_finite_gradient_that_overflows_when_preconditioned_keeps_the_layer(
    structure: str, size: float
) -> None:
    model = TwoLayers(dtype=torch.float32)
    optimizer = SINGD(model, structures=(structure, structure), **{**OPTIONS, "T": 10})
    model.backward(0)
    optimizer.step()
    for factor in optimizer.factors()["a"]:
        factor.data.mul_(1e8)  # C Cᵀ and K Kᵀ are about 1e16: 1e32 is finite, 1e57 is not
    before = snapshot(model, optimizer)
    model.backward(1, g=torch.full((4, 3), size))
    overflows = size > 1
    if overflows:
        with pytest.warns(UserWarning, match=r"'a'\].*not finite"):
            optimizer.step()
    else:
        optimizer.step()
    after = snapshot(model, optimizer)
    assert optimizer.rejections() == {"a": (0, int(overflows)), "b": (0, 0)}
    assert _all_finite(after)
    assert _all_changed(_parameters_of(after, "b"), _parameters_of(before, "b"))
    if overflows:
        assert_bitwise(of_layer(after, "a"), of_layer(before, "a"))
    else:
        assert after["a.weight"].abs().max() > 1e25


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("structure", ["hierarchical:4,4", "rank_triu:9", "rank_tril:9"])
def test_bfloat16_gradient_near_overflow(backend: str, structure: str, overflows: bool) -> None:
    """Wide borders of bfloat16 layers, which some processors multiply by F and Fᵀ, not by P."""
    torch.manual_seed(0)
    model = nn.Linear(41, 30, bias=False, dtype=torch.bfloat16)
    optimizer = SINGD(model, structures=(structure, structure), **{**OPTIONS, "T": 10})
    model(inputs(4, 41).bfloat16()).square().mean().backward()
    optimizer.step()
    for factor in optimizer.factors()[""]:
        factor.data.mul_(1e8)  # P_C and P_K are about 1e16
    before = model.weight.detach().clone()
    # 2e38 is above half of the largest number; a GPU refuses what comes within 1/16 of it.
    size = 1e8 if overflows else 2e6 if backend == "cpu" else 1e4
    model.weight.grad = torch.full_like(model.weight, size)
    if overflows:
        with pytest.warns(UserWarning, match="not finite"):
            optimizer.step()
        assert torch.equal(model.weight, before)
    else:
        optimizer.step()
        assert model.weight.isfinite().all() and model.weight.abs().min() > 1e33


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_of_width_one_equal_a_dense_structure(structure: str, bias: bool) -> None:
    runs = []
    for spec in (structure, "dense"):
        torch.manual_seed(0)
        model = nn.Linear(1, 1, bias=bias).double()
        optimizer = SINGD(model, structures=("dense" if bias else spec, spec), **OPTIONS)
        for seed in range(3):
            optimizer.zero_grad()
            model(inputs(4, 1, seed=seed)).square().mean().backward()
            optimizer.step()
        runs.append(snapshot(model, optimizer))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-13, atol=1e-15)


# -------------------------------------------------------------------- step cap


@pytest.mark.parametrize("expm_order", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("cause", ["lr_cov", "outlier"])
def test_capped_steps_keep_the_factors_finite_and_nonsingular(
    cause: str, structure: str, expm_order: int
) -> None:
    model = TwoLayers()
    options = {**OPTIONS, "lr_cov": 100.0 if cause == "lr_cov" else 0.05}
    optimizer = SINGD(model, structures=(structure, structure), expm_order=expm_order, **options)
    # ||beta m|| <= 1/2 bounds the singular values of the truncated exponential.
    bounds = {1: (0.5, 1.5), 2: (1 - 1 / 2 - 1 / 8, math.exp(0.5))}[expm_order]
    capped = False
    for seed in range(8):
        old = [factor.to_dense() for pair in optimizer.factors().values() for factor in pair]
        x = inputs(4, 5, seed=2 * seed)
        if cause == "outlier":
            x[:, 2] *= 1e3
        model.backward(seed, x)
        if not capped:
            with pytest.warns(UserWarning, match="shortened to step_cap"):
                optimizer.step()
            capped = True
        else:
            optimizer.step()
        new = [factor.to_dense() for pair in optimizer.factors().values() for factor in pair]
        for before, after in zip(old, new, strict=True):
            change = torch.linalg.svdvals(torch.linalg.solve(before, after))
            assert change.min() >= bounds[0] - 1e-6 and change.max() <= bounds[1] + 1e-6
    assert _all_finite(snapshot(model, optimizer))
    assert optimizer.rejections() == {"a": (0, 0), "b": (0, 0)}


@pytest.mark.parametrize("expm_order", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_step_cap_changes_nothing_where_it_does_not_bind(structure: str, expm_order: int) -> None:
    options = {"structures": (structure, structure), "expm_order": expm_order, "lr_cov": 0.05}
    capped = trained(range(4), **options)  # a warning, if it did bind, would be an error
    assert_bitwise(snapshot(*capped), snapshot(*trained(range(4), step_cap=INF, **options)))


def test_step_that_would_make_a_factor_exactly_zero_is_shortened() -> None:
    # K = C = 1, x = 2, g = 1, damping 1: m_K = m_C = (4 + 1 - 1) / 2 = 2, and 1 - lr_cov m = 0.
    model = nn.Linear(1, 1, bias=False).double()
    options = {"T": 1, "damping": 1.0, "lr_cov": 0.5, "structures": ("diagonal", "diagonal")}
    optimizer = SINGD(model, **options)
    model(torch.full((1, 1), 2.0).double()).sum().backward()
    with pytest.warns(UserWarning, match=r"''\].*shortened to step_cap"):
        optimizer.step()
    K, C = optimizer.factors()[""]
    assert optimizer.state[model.weight]["m_K"].item() == 2.0
    assert K.data.item() == 0.5 and C.data.item() == 0.5
