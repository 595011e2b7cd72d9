"""Training with singd_ext and with the oracle, and the options under which tests do it."""

from collections.abc import Sequence
from dataclasses import replace

from cases import CASES, Case, MicroBatches, parameters, train
from reference.singd import ReferenceSINGD
from tolerance import assert_same_trajectory
from torch import eye

from singd_ext import SINGD

BASE = {"lr": 0.01, "momentum": 0.9, "damping": 0.05, "alpha1": 0.5, "T": 1, "lr_cov": 0.05}
IKFAC = {"kfac_like": True, "alpha1": 0.0}
METHODS = {"singd": {}, "ikfac": IKFAC}

# Pairs that touch all five families on both sides.
MIXED = [
    ("dense", "triu_toeplitz"),
    ("hierarchical:2,1", "rank_tril:2"),
    ("rank_triu_topleft:2", "block_diagonal:3"),
    ("tril_toeplitz", "diagonal"),
]

OPTIONS = {
    "no momentum": {"momentum": 0.0},
    "weight decay": {"weight_decay": 0.3},
    "weight decay without momentum": {"weight_decay": 0.3, "momentum": 0.0},
    "T=3": {"T": 3},
    "no Riemannian momentum": {"alpha1": 0.0},
    "strong damping": {"damping": 0.5},
    "second order": {"expm_order": 2},
    "scheduled": {"lr_cov": lambda step: 0.2 / (1 + step)},
}


# Curvature large enough for entries of m above 1, where the normalization sets in.
STEEP = replace(CASES["linear_3d"], loss_scale=20.0)
NORMALIZED = {
    "singd": {"lr": 0.001, "normalize_lr_cov": True},
    "no Riemannian momentum": {"lr": 0.001, "normalize_lr_cov": True, "alpha1": 0.0},
    "ikfac": dict(lr=0.001, normalize_lr_cov=True, **IKFAC),
}


def final_reference(case: Case, steps: Sequence[MicroBatches], **options) -> ReferenceSINGD:
    reference = ReferenceSINGD(case.model(), **(BASE | options))
    train(reference.model, reference, steps, case.loss_scale)
    return reference


def assert_same_factors(optimizer: SINGD, reference: ReferenceSINGD) -> None:
    ours, truth = optimizer.factors(), reference.factors()
    assert ours.keys() == truth.keys()
    for name, factors in truth.items():
        assert_same_trajectory(
            {f"{name}.{side}": ours[name][i].to_dense() for i, side in enumerate("KC")},
            {f"{name}.{side}": factors[i] for i, side in enumerate("KC")},
            {f"{name}.{side}": eye(len(factors[i])) for i, side in enumerate("KC")},
        )


def check(
    case: Case,
    steps: Sequence[MicroBatches] | None = None,
    freeze: Sequence[str] = (),
    **options,
) -> None:
    """Train the case with both, and compare."""
    options = BASE | options
    steps = steps or case.steps(20)
    model = case.model()
    for name in freeze:
        model.get_parameter(name).requires_grad_(False)
    start = parameters(model)

    reference = ReferenceSINGD(model, **options)
    train(reference.model, reference, steps, case.loss_scale)
    optimizer = SINGD(model, **options)
    train(model, optimizer, steps, case.loss_scale)

    assert set(optimizer.rejections().values()) == {(0, 0)}
    assert_same_trajectory(parameters(model), parameters(reference.model), start)
    assert_same_factors(optimizer, reference)
