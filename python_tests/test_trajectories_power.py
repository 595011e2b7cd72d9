"""The runs that test_trajectories compares would end elsewhere with another algorithm."""

from itertools import combinations

import pytest
from cases import CASES, parameters
from reference.masks import SPECS
from reference.singd import ReferenceSINGD
from tolerance import relative_to_movement
from torch import Tensor
from trajectories import IKFAC, METHODS, MIXED, NORMALIZED, OPTIONS, STEEP, final_reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]


def assert_all_differ(runs: dict[str, ReferenceSINGD], start: dict[str, Tensor]) -> None:
    """Any two runs end further apart than a thousandth of their movement, in some weight."""
    for a, b in combinations(runs, 2):
        ends_a, ends_b = parameters(runs[a].model), parameters(runs[b].model)
        difference = max(relative_to_movement(ends_a[n], ends_b[n], start[n]) for n in start)
        assert difference > 1e-3, f"{a!r} and {b!r} differ by {difference:.3g} of the movement"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_trajectories_can_tell_structures_apart(name: str, method: str) -> None:
    case = CASES[name]
    steps, start = case.steps(20), parameters(case.model())
    runs = {s: final_reference(case, steps, structures=(s, s), **METHODS[method]) for s in SPECS}
    assert_all_differ(runs, start)


def test_trajectories_can_tell_options_apart() -> None:
    case = CASES["linear_3d"]
    steps, start = case.steps(20), parameters(case.model())
    pair = MIXED[1]
    variants = {
        "base": {},
        "ikfac": IKFAC,
        "reduce": {"kfac_approx": "reduce"},
        "sequence": {"loss_average": "batch+sequence"},
        "sum": {"loss_average": None},
        **OPTIONS,
    }
    runs = {n: final_reference(case, steps, structures=pair, **o) for n, o in variants.items()}
    assert_all_differ(runs, start)


@pytest.mark.parametrize("options", NORMALIZED.values(), ids=NORMALIZED.keys())
def test_trajectories_can_see_the_normalization(options: dict) -> None:
    steps, start = STEEP.steps(20), parameters(STEEP.model())
    variants = {"on": options, "off": options | {"normalize_lr_cov": False}}
    runs = {n: final_reference(STEEP, steps, structures=MIXED[1], **o) for n, o in variants.items()}
    assert_all_differ(runs, start)
