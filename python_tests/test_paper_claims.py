"""What the paper proves about the updates, checked on the oracle and on singd_ext."""

import copy
from itertools import pairwise

import pytest
import torch
from cases import Case, parameters, train
from reference.masks import SPECS
from reference.singd import ReferenceSINGD
from tolerance import relative_to_movement
from torch import Tensor, nn

from singd_ext import SINGD

IMPLEMENTATIONS = ["oracle", "singd_ext"]
IKFAC = {"kfac_like": True, "alpha1": 0.0}


def build(implementation: str, model: nn.Module, **options):
    """The model to train and its optimizer."""
    if implementation == "oracle":
        reference = ReferenceSINGD(model, **options)
        return reference.model, reference
    model = copy.deepcopy(model)
    return model, SINGD(model, **options)


def dense_factors(implementation: str, optimizer, layer: str) -> tuple[Tensor, ...]:
    factors = optimizer.factors()[layer]
    return factors if implementation == "oracle" else tuple(f.to_dense() for f in factors)


def distances_from_kfac(implementation: str, beta1: float, expm_order: int) -> Tensor:
    """||K K^T - (S_K + lambda I)^-1|| after five steps, and the same for C, at fixed weights."""
    damping, loss_scale = 0.1, 2.0
    case = Case(lambda: [nn.Linear(6, 4, bias=False)], 10, (6,))
    options = dict(lr=0.0, T=1, lr_cov=beta1, damping=damping, expm_order=expm_order, **IKFAC)
    model, optimizer = build(implementation, case.model(), **options)
    S_K, S_C = ((1 - damping) * torch.eye(d, dtype=torch.float64) for d in (6, 4))  # K = C = I
    for step in case.steps(5):
        train(model, optimizer, [step], loss_scale)
        [(x, y)] = step
        g = (2 * loss_scale / y.numel()) * (model(x) - y).detach()
        S_K = (1 - beta1) * S_K + beta1 * x.T @ x / len(x)
        S_C = (1 - beta1) * S_C + beta1 * g.T @ g * len(x)
    K, C = dense_factors(implementation, optimizer, "0")
    inverse_K, inverse_C = (
        torch.linalg.inv(S + damping * torch.eye(len(S), dtype=S.dtype)) for S in (S_K, S_C)
    )
    return torch.stack([(K @ K.T - inverse_K).norm(), (C @ C.T - inverse_C).norm()])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("expm_order", [1, 2])
def test_theorems_1_and_2_ikfac_is_kfac_up_to_beta1_squared(
    implementation: str, expm_order: int
) -> None:
    distances = [
        distances_from_kfac(implementation, beta1, expm_order) for beta1 in (4e-3, 2e-3, 1e-3)
    ]
    for larger, smaller in pairwise(distances):
        ratios = larger / smaller
        assert ((ratios - 4).abs() < 0.2).all(), f"fell by {ratios.tolist()}"


class Scale(nn.Module):
    """Multiplies by a constant; powers of two do so without rounding."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def weights_after_training(implementation: str, alpha_root: float, **options) -> dict[str, Tensor]:
    """Weights of a net whose layers have curvature (alpha U) x (G / alpha).

    Every layer gets its input times sqrt(alpha), and its output is divided by sqrt(alpha): the
    functions and the gradients of the weights are those of alpha = 1.
    """

    def layers() -> list[nn.Module]:
        s = alpha_root
        return [
            *(Scale(s), nn.Linear(11, 7, bias=False), Scale(1 / s), nn.Tanh()),
            *(Scale(s), nn.Linear(7, 5, bias=False), Scale(1 / s)),
        ]

    case = Case(layers, 9, (11,))
    options = {"lr": 0.01, "damping": 0.05, "T": 1, "lr_cov": 0.02} | options
    model, optimizer = build(implementation, case.model(), **options)
    start = parameters(model)
    train(model, optimizer, case.steps(10))
    return {name: value - start[name] for name, value in parameters(model).items()}


def change_under_rescaling(implementation: str, **options) -> float:
    """Largest change of a weight's movement when alpha goes from 1 to 4."""
    one = weights_after_training(implementation, 1.0, **options)
    four = weights_after_training(implementation, 2.0, **options)
    return max(relative_to_movement(four[n], one[n], torch.zeros_like(one[n])) for n in one)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SPECS)
def test_appendix_F_singd_is_invariant_to_the_choice_of_the_scale(
    spec: str, implementation: str
) -> None:
    assert change_under_rescaling(implementation, structures=(spec, spec)) < 1e-10


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SPECS)
def test_appendix_F_ikfac_is_not(spec: str, implementation: str) -> None:
    assert change_under_rescaling(implementation, structures=(spec, spec), **IKFAC) > 1e-2
