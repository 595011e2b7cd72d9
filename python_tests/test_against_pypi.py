"""PyPI singd 0.0.5 as a second witness, in float32, the dtype that all its structures take."""

from functools import cache

import pytest
from cases import Case, parameters, train
from reference.singd import ReferenceSINGD
from tolerance import assert_close_to_truth, relative_to_movement
from torch import Tensor, eye, nn

from singd_ext import SINGD

pypi = pytest.importorskip("singd.optim.optimizer", reason="the witness is PyPI singd")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Calling naive implementation"),  # of PyPI's Toeplitz
]

# Dimensions above 30, so that blocks of 30 and borders of 15 + 15 leave something over; a loss
# so steep that curvature, and with it the structures, matters beside the identity.
LOSS_SCALE = 25.0
NETS = {
    "linear": Case(
        lambda: [nn.Linear(37, 33), nn.Tanh(), nn.Linear(33, 32, bias=False)], 6, (3, 37)
    ),
    "conv2d": Case(
        lambda: [
            *(nn.Conv2d(5, 34, 3, stride=2, padding=1), nn.Tanh()),
            nn.Conv2d(34, 32, 2, bias=False),
        ],
        4,
        (5, 7, 6),
    ),
}
STRUCTURES = [
    "dense",
    "diagonal",
    "block30diagonal",
    "hierarchical15_15",
    "triltoeplitz",
    "triutoeplitz",
]
METHODS = {
    "singd": {},
    "ikfac": {"kfac_like": True, "alpha1": 0.0},
    "normalized": {"normalize_lr_cov": True, "weight_decay": 0.1, "loss_average": "batch+sequence"},
}
# Weights move by about a tenth of themselves: one float32 rounding is 1e-6 of the movement.
FLOAT32 = 2e-5

parametrize = pytest.mark.parametrize
every_run = [
    parametrize("method", METHODS),
    parametrize("kfac_approx", ["expand", "reduce"]),
    parametrize("structure", STRUCTURES),
    parametrize("net", NETS),
]


def for_every_run(test):
    for mark in every_run:
        test = mark(test)
    return test


def recipe(structure: str, kfac_approx: str, method: str) -> tuple[dict, int]:
    """The options and the number of steps."""
    options = {"lr": 0.002, "damping": 0.05, "T": 1, "lr_cov": 0.04, "kfac_approx": kfac_approx}
    options |= {"structures": (structure, structure)} | METHODS[method]
    if structure == "block30diagonal":
        # PyPI multiplies by K where K^T is meant: right as long as the blocks are symmetric,
        # which they are after one update of the factors
        return options | {"T": 3}, 3
    return options, 12


@cache
def truth(net: str, structure: str, kfac_approx: str, method: str) -> dict[str, Tensor]:
    options, steps = recipe(structure, kfac_approx, method)
    reference = ReferenceSINGD(NETS[net].model().float(), **options)
    train(reference.model, reference, NETS[net].steps(steps), LOSS_SCALE)
    return parameters(reference.model) | by_name(reference.factors())


@cache
def in_float32(package: str, net: str, structure: str, kfac_approx: str, method: str):
    """Weights and dense factors after training with PyPI's or with our optimizer."""
    options, steps = recipe(structure, kfac_approx, method)
    model = NETS[net].model().float()
    batches = [[(x.float(), y.float()) for x, y in step] for step in NETS[net].steps(steps)]
    optimizer = (SINGD if package == "singd_ext" else pypi.SINGD)(model, **options)
    train(model, optimizer, batches, LOSS_SCALE)
    if package == "singd_ext":
        factors = optimizer.factors()
    else:
        factors = {name: (K, optimizer.Cs[name]) for name, K in optimizer.Ks.items()}
    return parameters(model) | by_name(factors)


def by_name(factors: dict) -> dict[str, Tensor]:
    return {
        f"{name}.{side}": factor if isinstance(factor, Tensor) else factor.to_dense()
        for name, pair in factors.items()
        for side, factor in zip("KC", pair, strict=True)
    }


def start(net: str, name: str, like: Tensor) -> Tensor:
    """Where a weight or a factor began."""
    model = parameters(NETS[net].model().float())
    return model[name] if name in model else eye(len(like))


@for_every_run
def test_oracle_agrees_with_pypi(net: str, structure: str, kfac_approx: str, method: str) -> None:
    run = (net, structure, kfac_approx, method)
    witness = in_float32("pypi", *run)
    for name, expected in truth(*run).items():
        begin = start(net, name, expected)
        assert relative_to_movement(witness[name], expected, begin) < FLOAT32, name


@for_every_run
def test_singd_ext_agrees_with_pypi(
    net: str, structure: str, kfac_approx: str, method: str
) -> None:
    run = (net, structure, kfac_approx, method)
    ours, witness = in_float32("singd_ext", *run), in_float32("pypi", *run)
    for name, expected in truth(*run).items():
        begin = start(net, name, expected)
        assert relative_to_movement(ours[name], witness[name], begin) < FLOAT32, name
        assert_close_to_truth(ours[name], witness[name], expected)


@parametrize("method", METHODS)
@parametrize("net", NETS)
def test_agreement_can_tell_structures_apart(net: str, method: str) -> None:
    """Runs with equal numbers of steps end more than a thousandth of their movement apart."""
    runs = {s: truth(net, s, "expand", method) for s in STRUCTURES if s != "block30diagonal"}
    names = list(parameters(NETS[net].model()))
    for a in runs:
        for b in runs:
            apart = [
                relative_to_movement(runs[a][n], runs[b][n], start(net, n, runs[b][n]))
                for n in names
            ]
            assert a == b or max(apart) > 1e-3, f"{a} and {b}"
