"""Weights and factors after 20 steps in float64 are those of the oracle."""

import pytest
from cases import CASES, parameters, train
from reference.masks import SPECS
from reference.singd import ReferenceSINGD
from tolerance import assert_same_trajectory
from trajectories import (
    BASE,
    METHODS,
    MIXED,
    NORMALIZED,
    OPTIONS,
    STEEP,
    assert_same_factors,
    check,
)

from singd_ext import SINGD

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.usefixtures("backend"),
]

PAIRS = [
    ("dense", "diagonal"),
    ("diagonal", "dense"),
    ("block_diagonal:3", "hierarchical:2,1"),
    ("hierarchical:3,2", "block_diagonal:4"),
    ("rank_triu:2", "rank_tril:3"),
    ("rank_tril:1", "triu_toeplitz"),
    ("rank_triu_topleft:3", "tril"),
    ("triu", "rank_tril_topleft:2"),
    ("tril_toeplitz", "rank_triu_topleft:1"),
    ("triu_toeplitz", "diagonal"),
    ("hierarchical", "block_diagonal"),  # default sizes, larger than most of the factors
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("spec", SPECS)
def test_every_structure(spec: str, name: str, method: str) -> None:
    check(CASES[name], structures=(spec, spec), **METHODS[method])


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_different_structures_for_both_factors(pair: tuple[str, str]) -> None:
    check(CASES["conv2d"], structures=pair)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "pair", [("hierarchical:2,1", "rank_tril:2"), ("diagonal", "tril_toeplitz")], ids="-".join
)
def test_every_net(pair: tuple[str, str], name: str, kfac_approx: str, method: str) -> None:
    check(CASES[name], structures=pair, kfac_approx=kfac_approx, **METHODS[method])


@pytest.mark.parametrize("loss_average", ["batch", "batch+sequence", None])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["linear_4d", "conv1d"])
@pytest.mark.parametrize("pair", MIXED[:2], ids="-".join)
def test_loss_averages(
    pair: tuple[str, str], name: str, kfac_approx: str, loss_average: str | None
) -> None:
    options = {"structures": pair, "kfac_approx": kfac_approx, "loss_average": loss_average}
    check(CASES[name], **options)


@pytest.mark.parametrize("pair", MIXED, ids="-".join)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options: dict, pair: tuple[str, str]) -> None:
    check(CASES["linear_3d"], structures=pair, **options)


@pytest.mark.parametrize("pair", MIXED, ids="-".join)
@pytest.mark.parametrize("options", NORMALIZED.values(), ids=NORMALIZED.keys())
def test_normalized_lr_cov(options: dict, pair: tuple[str, str]) -> None:
    check(STEEP, structures=pair, **options)


@pytest.mark.parametrize("pair", MIXED, ids="-".join)
@pytest.mark.parametrize("freeze", [["0.bias"], ["0.weight"], ["0.weight", "0.bias"]])
@pytest.mark.parametrize("name", ["linear_3d", "conv2d"])
def test_frozen_parameters(name: str, freeze: list[str], pair: tuple[str, str]) -> None:
    check(CASES[name], structures=pair, freeze=freeze, weight_decay=0.1)


@pytest.mark.parametrize("left_out", ["bias", "weight"])
def test_parameters_left_out_are_frozen(left_out: str) -> None:
    case = CASES["linear_3d"]
    steps, start = case.steps(20), parameters(case.model())
    frozen, model = case.model(), case.model()
    for layer in (frozen[0], frozen[2]):
        if getattr(layer, left_out) is not None:
            getattr(layer, left_out).requires_grad_(False)
    reference = ReferenceSINGD(frozen, **BASE)
    train(reference.model, reference, steps, case.loss_scale)
    optimizer = SINGD(model, [p for n, p in model.named_parameters() if left_out not in n], **BASE)
    train(model, optimizer, steps, case.loss_scale)
    assert_same_trajectory(parameters(model), parameters(reference.model), start)
    assert_same_factors(optimizer, reference)


@pytest.mark.parametrize("loss_average", ["batch", "batch+sequence", None])
@pytest.mark.parametrize("name", ["linear_3d", "conv2d"])
@pytest.mark.parametrize("pair", MIXED, ids="-".join)
def test_accumulation(pair: tuple[str, str], name: str, loss_average: str | None) -> None:
    case = CASES[name]
    steps = case.steps(20, sizes=(5, 3))
    check(case, steps, structures=pair, loss_average=loss_average, T=3)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("pair", MIXED, ids="-".join)
def test_layer_unused_in_some_steps(pair: tuple[str, str], T: int) -> None:
    case = CASES["sometimes_unused"]
    steps = case.steps(20)
    taken = [x.mean() > 0.3 for [(x, _)] in steps]
    assert 5 < sum(taken) < 15
    check(case, steps, structures=pair, T=T, weight_decay=0.1)


def test_parameter_groups_have_their_own_options() -> None:
    case = CASES["conv2d"]
    groups = {
        "0": {"structures": ("rank_triu:2", "triu"), "lr": 0.02, "T": 3, "kfac_approx": "reduce"},
        "2": {"structures": ("diagonal", "tril_toeplitz"), "weight_decay": 0.1, "momentum": 0.5},
        "4": {
            "kfac_like": True,
            "alpha1": 0.0,
            "loss_average": None,
            "damping": 0.1,
            "lr_cov": 0.1,
        },
    }
    model, steps = case.model(), case.steps(20)
    start = parameters(model)
    reference = ReferenceSINGD(model, layer_options=groups, **BASE)
    train(reference.model, reference, steps, case.loss_scale)
    params = [
        dict(params=model.get_submodule(name).parameters(), **options)
        for name, options in groups.items()
    ]
    optimizer = SINGD(model, params, **BASE)
    train(model, optimizer, steps, case.loss_scale)
    assert_same_trajectory(parameters(model), parameters(reference.model), start)
    assert_same_factors(optimizer, reference)


def test_step_cap_does_not_bind_in_ordinary_training() -> None:
    case = CASES["conv2d"]
    steps, ends = case.steps(20), []
    for step_cap in (0.5, float("inf")):
        model = case.model()
        options = BASE | {"structures": ("hierarchical:2,1", "triu"), "step_cap": step_cap}
        train(model, SINGD(model, **options), steps, case.loss_scale)
        ends.append(parameters(model))
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])
