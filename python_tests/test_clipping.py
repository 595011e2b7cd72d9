"""Clipping: torch's of the gradients, and SINGD's own bounds of the step, in explicit float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import (
    OPTIONS,
    assert_bitwise,
    backward,
    inputs,
    loss_of,
    mlp,
    of_layer,
    snapshot,
    train,
    trained,
)
from torch import Tensor, nn

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]


# ---------------------------------------------------------------- torch's clipping


CLIPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "norm": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
    "value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
    "group": lambda model: nn.utils.clip_grad_norm_(model[0].parameters(), 0.1, foreach=True),
}


@pytest.mark.parametrize("clip", CLIPPERS)
def test_clipped_gradients_leave_the_statistics_as_they_are(clip: str) -> None:
    clipped_model, clipped = trained([0])
    model, optimizer = trained([0])
    for m, o in ((clipped_model, clipped), (model, optimizer)):
        backward(m, o, inputs(seed=1))
    before = [p.grad.clone() for p in clipped_model.parameters()]
    CLIPPERS[clip](clipped_model)
    after = [p.grad for p in clipped_model.parameters()]
    assert not all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    for p, grad in zip(model.parameters(), after, strict=True):
        p.grad = grad.clone()
    clipped.step()
    optimizer.step()
    assert_bitwise(snapshot(clipped_model, clipped), snapshot(model, optimizer))
    plain_model, plain = trained([0, 1])
    for name in ("K", "C", "m_K", "m_C"):
        key = f"0.weight: {name}"
        assert torch.equal(snapshot(clipped_model, clipped)[key], snapshot(plain_model, plain)[key])
    assert not torch.equal(clipped_model[0].weight, plain_model[0].weight)


# ---------------------------------------------------------------- our own bounds


def _net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A convolution, a layer without bias, a layer of which only the bias is trained."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(12, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)),
    )
    net[5].weight.requires_grad_(False)
    return net.to(dtype)


def _matrix(module: nn.Module, values: Callable[[Tensor], Tensor]) -> Tensor:
    """[weight, bias] of the trained parameters as d_o × d_i, in float64."""
    trained_ = [p for p in (module.weight, module.bias) if p is not None and p.requires_grad]
    return torch.cat([values(p).double().reshape(p.shape[0], -1) for p in trained_], dim=1)


def _steps(
    scale: float = 1.0, dtype: torch.dtype = torch.float64, steps: int = 3, **options: Any
) -> list[dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Per step and layer: how W moved over -lr, P and the gradient, from the dense factors."""
    net = _net(dtype)
    optimizer = SINGD(net, **{**OPTIONS, "momentum": 0.0, "weight_decay": 0.0, **options})
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    record = []
    for seed in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, inputs(6, 2, 5, seed=seed, dtype=dtype))).backward()
        start = {name: _matrix(net[int(name)], torch.clone) for name in optimizer.factors()}
        scaler.step(optimizer)
        scaler.update()
        moves = {}
        for name, (K, C) in optimizer.factors().items():
            G = _matrix(net[int(name)], lambda p: p.grad) / scale
            K, C = K.to_dense().double(), C.to_dense().double()
            end = _matrix(net[int(name)], torch.clone).detach()
            lr = float(optimizer.param_groups[0]["lr"])
            moves[name] = ((start[name].detach() - end) / lr, C @ C.T @ G @ K @ K.T, G)
        record.append(moves)
    return record


LR = OPTIONS["lr"]
STRUCTURES = [("dense", "dense"), ("diagonal", "block_diagonal:2"), ("tril", "hierarchical:1,1")]
everywhere = [
    pytest.mark.parametrize("structures", STRUCTURES, ids="-".join),
    pytest.mark.parametrize("scale", [1.0, 2.0**10]),
    pytest.mark.parametrize("lr", [LR, torch.tensor(LR)], ids=["float", "tensor"]),
]


def _everywhere(test: Callable) -> Callable:
    for mark in everywhere:
        test = mark(test)
    return test


@_everywhere
def test_max_update_norm_bounds_every_layer(lr: Any, scale: float, structures: Any) -> None:
    free = _steps(structures=structures)
    norms = sorted(float(LR * P.norm()) for _, P, _ in free[0].values())
    bound = (norms[0] + norms[1]) / 2  # binds for two layers of three
    bound_steps = 0
    for moves in _steps(scale, lr=lr, structures=structures, max_update_norm=bound):
        for move, P, _ in moves.values():
            nu = min(1.0, bound / float(LR * P.norm()))
            bound_steps += nu < 1
            torch.testing.assert_close(move, nu * P, rtol=1e-7, atol=1e-10)
    assert 0 < bound_steps < 9


def _kl(moves: dict[str, tuple[Tensor, Tensor, Tensor]]) -> float:
    return sum(float(LR**2 * (P * G).sum()) for _, P, G in moves.values())


@_everywhere
def test_kl_clip_bounds_the_whole_model(lr: Any, scale: float, structures: Any) -> None:
    kl = sorted(_kl(moves) for moves in _steps(structures=structures))[1]
    binding = 0
    for moves in _steps(scale, lr=lr, structures=structures, kl_clip=0.99 * kl):
        nu = min(1.0, (0.99 * kl / _kl(moves)) ** 0.5)
        binding += nu < 1
        for move, P, _ in moves.values():
            torch.testing.assert_close(move, nu * P, rtol=1e-7, atol=1e-10)
    assert binding > 0


def test_layers_are_bounded_before_the_model() -> None:
    norm = 0.02
    free = _steps(steps=1)[0]
    nus = {name: min(1.0, norm / float(LR * P.norm())) for name, (_, P, _) in free.items()}
    assert min(nus.values()) < 1
    left = sum(LR**2 * nus[name] ** 2 * float((P * G).sum()) for name, (_, P, G) in free.items())
    (moves,) = _steps(steps=1, max_update_norm=norm, kl_clip=left / 4)
    for name, (move, P, _) in moves.items():
        torch.testing.assert_close(move, 0.5 * nus[name] * P, rtol=1e-9, atol=1e-12)


def test_trust_region_is_of_all_groups_that_have_one() -> None:
    model, reference = mlp(5, 4, 4, 3), mlp(5, 4, 4, 3)
    options = {**OPTIONS, "weight_decay": 0.0, "momentum": 0.0}
    groups = [
        {"params": model[0].parameters(), "kl_clip": 1e-5},
        {"params": model[2].parameters(), "kl_clip": 4e-5, "structures": ("diagonal", "diagonal")},
        {"params": model[4].parameters(), "lr": 0.03},
    ]
    optimizer = SINGD(model, params=groups, **options)
    free = SINGD(
        reference,
        params=[
            {**group, "params": layer.parameters(), "kl_clip": None}
            for group, layer in zip(groups, reference[::2], strict=True)
        ],
        **options,
    )
    start = snapshot(model, optimizer)
    train(model, optimizer, [0])
    train(reference, free, [0])
    total = 0.0
    for name in ("0", "2"):
        K, C = (factor.to_dense() for factor in free.factors()[name])
        G = _matrix(reference[int(name)], lambda p: p.grad)
        total += LR**2 * float((C.T @ G @ K).square().sum())
    nus = {"0": (1e-5 / total) ** 0.5, "2": (4e-5 / total) ** 0.5, "4": 1.0}
    assert nus["2"] < 1
    ours, others = snapshot(model, optimizer), snapshot(reference, free)
    for name, nu in nus.items():
        for p in (f"{name}.weight", f"{name}.bias"):
            torch.testing.assert_close(
                ours[p] - start[p], nu * (others[p] - start[p]), rtol=1e-9, atol=1e-12
            )


BOUNDS = [{"max_update_norm": 1e6}, {"kl_clip": 1e6}, {"max_update_norm": 1e6, "kl_clip": 1e6}]


@pytest.mark.parametrize("bounds", BOUNDS, ids=lambda b: "-".join(b))
def test_bound_that_does_not_bind_changes_no_bit(bounds: dict[str, float]) -> None:
    assert_bitwise(snapshot(*trained(range(3), **bounds)), snapshot(*trained(range(3))))


def test_weight_decay_and_momentum_are_outside_of_the_bound() -> None:
    """One step from zero momentum: M = ν P + γ W."""
    model, optimizer = trained([0], max_update_norm=1e-9, weight_decay=0.5)
    start = mlp()
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q - LR * 0.5 * q, rtol=0, atol=2e-9)
        torch.testing.assert_close(
            optimizer.state[p]["momentum_buffer"], 0.5 * q.detach(), rtol=0, atol=1e-7
        )


@pytest.mark.parametrize("bounds", [{"max_update_norm": 0.01}, {"kl_clip": 1e-5}])
def test_zero_gradient_is_no_division_by_zero(bounds: dict[str, float]) -> None:
    model, optimizer = trained([], **bounds, weight_decay=0.0)
    backward(model, optimizer, inputs())
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step()
    for p, q in zip(model.parameters(), mlp().parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("bounds", [{"max_update_norm": 1e-3}, {"kl_clip": 1e-7}])
def test_layer_with_a_nan_is_skipped_and_the_others_are_still_bounded(
    bounds: dict[str, float],
) -> None:
    model, optimizer = trained([], **bounds, momentum=0.0, weight_decay=0.0)
    start = snapshot(model, optimizer)
    backward(model, optimizer, inputs())
    model[0].weight.grad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match=r"'0'.*gradient was not finite"):
        optimizer.step()
    after = snapshot(model, optimizer)
    assert torch.equal(after["0.weight"], start["0.weight"])
    move = sum(
        float((after[f"2.{p}"] - start[f"2.{p}"]).square().sum()) for p in ("weight", "bias")
    )
    assert 0 < move**0.5 <= 1.000001e-3
    assert optimizer.rejections()["0"][1] == 1


def test_bounds_in_bfloat16_and_layers_that_a_step_does_not_use() -> None:
    model = mlp(dtype=torch.bfloat16)
    optimizer = SINGD(model, **{**OPTIONS, "weight_decay": 0.0, "momentum": 0.0},
                      max_update_norm=0.05, kl_clip=1.0)  # fmt: skip
    model[0].requires_grad_(False)
    start = snapshot(model, optimizer)
    backward(model, optimizer, inputs(dtype=torch.bfloat16))
    optimizer.step()
    after = snapshot(model, optimizer)
    assert_bitwise(of_layer(after, "0"), of_layer(start, "0"))
    move = torch.cat([(after[k] - start[k]).float().flatten() for k in ("2.weight", "2.bias")])
    assert 0 < move.norm() < 0.05 * 1.1


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "1", True])
@pytest.mark.parametrize("option", ["max_update_norm", "kl_clip"])
def test_bad_bound_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} is .*must be"):
        SINGD(mlp(), **{option: value})
    model, optimizer = trained([])
    backward(model, optimizer, inputs())
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=f"{option} is .*must be"):
        optimizer.step()


def test_bounds_can_be_scheduled_and_are_saved() -> None:
    model, optimizer = trained([0], kl_clip=1e6)
    optimizer.param_groups[0].update(kl_clip=None, max_update_norm=1e-9, weight_decay=0.0)
    optimizer.param_groups[0]["momentum"] = 0.0
    before = model[0].weight.detach().clone()
    train(model, optimizer, [1])
    assert 0 < (model[0].weight - before).norm() <= 1.01e-9
    _, other = trained([])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["max_update_norm"] == 1e-9


def test_state_saved_before_the_bounds_existed_takes_the_optimizers_own() -> None:
    _, optimizer = trained([0])
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["max_update_norm"], group["kl_clip"]
    _, other = trained([], kl_clip=0.5)
    other.load_state_dict(saved)
    assert other.param_groups[0]["kl_clip"] == 0.5
    assert "kl_clip" not in saved["param_groups"][0]
