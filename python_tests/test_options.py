"""Options: bad values are refused by name at construction and in `param_groups`, good ones work."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from nets import OPTIONS, assert_bitwise, backward, inputs, mlp, snapshot, train, trained

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]

NAN, INF = float("nan"), float("inf")
NO_NUMBER = [NAN, -INF, True, "0.1", None, [0.1], 1j, np.array([0.1, 0.2]), torch.ones(2)]
NOT_NEGATIVE = [*NO_NUMBER, INF, -0.1, -1, np.float32(-0.1), Fraction(-1, 8)]
NO_FLAG = [None, 0, 1, "True", np.bool_(True), torch.tensor(True)]
BAD: dict[str, list[Any]] = {
    "lr": [*NOT_NEGATIVE, torch.tensor(NAN), torch.tensor(-1.0), torch.tensor(1)],
    "momentum": [*NOT_NEGATIVE, 1, 1.5, np.float32(1)],
    "damping": NOT_NEGATIVE,
    "alpha1": [*NOT_NEGATIVE, 1, 1.5],
    "weight_decay": NOT_NEGATIVE,
    "T": [*NO_NUMBER, INF, 0, -1, 1.0, 2.5, np.float64(2), np.int64(0), torch.tensor(2)],
    "loss_average": ["sum", "mean", "Batch", True, 1, 0, ("batch",), np.array(["a", "b"])],
    "lr_cov": [*NOT_NEGATIVE, torch.tensor(NAN), torch.tensor(-1.0), torch.tensor(1)],
    "structures": [
        "dense",
        None,
        ("dense",),
        ("dense", "dense", "dense"),
        ("dense", None),
        (1, "dense"),
        ("densee", "dense"),
        ("dense", "block_diagonal:0"),
        ("block_diagonal:-3", "dense"),
        ("block_diagonal:1.5", "dense"),
        ("block_diagonal:", "dense"),
        ("hierarchical:4", "dense"),
        ("rank_triu:2,3", "dense"),
        ("diagonal:2", "dense"),
        ("dense ", "dense"),
        ("block_diagonal:99999999999999999999", "dense"),
    ],
    "kfac_approx": [None, True, 1, "Expand", "", np.array(["expand", "reduce"])],
    "kfac_like": NO_FLAG,
    "preconditioner_dtype": [
        None,
        torch.float32,
        (None,),
        ("float32", None),
        (None, torch.int32),
        (torch.complex64, None),
        (True, None),
    ],
    "normalize_lr_cov": NO_FLAG,
    "expm_order": [0, 3, -1, 1.0, 1.5, True, "1", None, NAN, np.float64(2), torch.tensor(1)],
    "step_cap": [*NO_NUMBER, 0, 0.0, -0.5],
    "stochastic_rounding": NO_FLAG,
    "seed": [*NO_NUMBER, INF, -1, 0.5, 1.0],
}
CONSTRUCTOR_ONLY: dict[str, list[Any]] = {
    "warn_unsupported": NO_FLAG,
    "init_grad_scale": [*NO_NUMBER, INF, 0, -1],
}
STATES_WHAT_IS_ALLOWED = ("must be", "must hold", "allowed are", "is a string")


def _pairs(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(option, value, id=f"{option}-{value!r}".replace("\n", ""))
        for option, values in table.items()
        for value in values
    ]


def _assert_names(error: pytest.ExceptionInfo[ValueError], option: str, value: Any) -> None:
    """The message holds the option, the value (or the part of a pair) and what is allowed."""
    message = str(error.value)
    parts = value if isinstance(value, tuple) and len(value) == 2 else [value]
    assert option in message
    if not isinstance(value, torch.Tensor):
        assert any(repr(part) in message for part in parts), message
    assert any(text in message for text in STATES_WHAT_IS_ALLOWED), message


@pytest.mark.parametrize(("option", "value"), _pairs({**BAD, **CONSTRUCTOR_ONLY}))
def test_bad_value_is_refused_at_construction(option: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        SINGD(mlp(), **{option: value})
    _assert_names(error, option, value)


@pytest.mark.parametrize(("option", "value"), _pairs(BAD))
def test_bad_value_is_refused_in_a_new_group(option: str, value: Any) -> None:
    model = mlp()
    optimizer = SINGD(model, params=model[0].parameters())
    with pytest.raises(ValueError, match=option):
        optimizer.add_param_group({"params": model[2].parameters(), option: value})
    assert list(optimizer.factors()) == ["0"] and len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("option", "value"), _pairs(BAD))
def test_bad_value_in_the_group_is_refused_by_step_without_a_change(
    option: str, value: Any
) -> None:
    model, optimizer = trained([0])
    undisturbed_model, undisturbed = trained(range(3))
    backward(model, optimizer, inputs(seed=1))
    before, good = snapshot(model, optimizer), optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError) as error:
        optimizer.step()
    _assert_names(error, option, value)
    assert_bitwise(snapshot(model, optimizer), before)

    optimizer.param_groups[0][option] = good
    optimizer.step()
    train(model, optimizer, [2])
    assert_bitwise(snapshot(model, optimizer), snapshot(undisturbed_model, undisturbed))


def test_bad_value_in_the_second_group_leaves_the_first_unchanged() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = SINGD(model, params=groups, **OPTIONS)
    backward(model, optimizer, inputs())
    before = snapshot(model, optimizer)
    for bad in ({"damping": NAN}, {"lr_cov": lambda step: NAN}):
        good = {key: optimizer.param_groups[1][key] for key in bad}
        optimizer.param_groups[1].update(bad)
        with pytest.raises(ValueError, match=next(iter(bad))):
            optimizer.step()
        optimizer.param_groups[1].update(good)
        assert_bitwise(snapshot(model, optimizer), before)
        assert [group["steps"] for group in optimizer.param_groups] == [0, 0]


@pytest.mark.parametrize("value", [NAN, INF, -0.1, True, "0.1", None, 1j])
def test_bad_value_of_an_lr_cov_function_is_refused(value: Any) -> None:
    model, optimizer = trained([], lr_cov=lambda step: value)
    backward(model, optimizer, inputs())
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"lr_cov.*must be"):
        optimizer.step()
    assert_bitwise(snapshot(model, optimizer), before)


@pytest.mark.parametrize("value", [NAN, -1.0, INF])
@pytest.mark.parametrize("option", ["lr", "lr_cov"])
def test_tensor_set_to_a_bad_value_in_place_is_refused(option: str, value: float) -> None:
    tensor = torch.tensor(0.0625)
    model, optimizer = trained([0], **{option: tensor})
    backward(model, optimizer, inputs(seed=1))
    before = snapshot(model, optimizer)
    tensor.fill_(value)  # as schedulers change a tensor
    with pytest.raises(ValueError, match=option):
        optimizer.step()
    assert_bitwise(snapshot(model, optimizer), before)


# -------------------------------------------------------------------- numbers of other types


NUMBERS = [np.float64(0.25), np.float32(0.25), np.float16(0.25), Fraction(1, 4)]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("option", ["lr", "momentum", "damping", "alpha1", "weight_decay"])
def test_number_of_any_type_equals_a_float(option: str, value: Any) -> None:
    assert_bitwise(snapshot(*trained(**{option: value})), snapshot(*trained(**{option: 0.25})))


@pytest.mark.parametrize("value", [np.float32(0.0625), torch.tensor(0.0625), Fraction(1, 16)])
def test_lr_cov_of_any_type_equals_a_float(value: Any) -> None:
    expected = snapshot(*trained(lr_cov=0.0625))
    assert_bitwise(snapshot(*trained(lr_cov=value)), expected)
    assert_bitwise(snapshot(*trained(lr_cov=lambda step: value)), expected)


@pytest.mark.parametrize("option", ["T", "expm_order", "seed"])
def test_numpy_integer_equals_an_int(option: str) -> None:
    assert_bitwise(snapshot(*trained(**{option: np.int64(2)})), snapshot(*trained(**{option: 2})))


@pytest.mark.parametrize("option", ["lr", "momentum", "damping", "alpha1", "weight_decay"])
def test_zero_is_accepted_and_stays_finite(option: str) -> None:
    for value in (0, 0.0):
        model, _ = trained(**{option: value})
        assert all(p.isfinite().all() for p in model.parameters())


def test_pairs_may_be_lists() -> None:
    model, optimizer = trained(structures=["diagonal", "dense"], preconditioner_dtype=[None, None])
    expected = trained(structures=("diagonal", "dense"))
    assert_bitwise(snapshot(model, optimizer), snapshot(*expected))


# -------------------------------------------------------------------- fixed options, kfac_like


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("structures", ("diagonal", "dense")),
        ("structures", ("dense", "tril")),
        ("preconditioner_dtype", (torch.float32, None)),
    ],
)
def test_what_fixes_the_state_cannot_change_after_construction(option: str, value: Any) -> None:
    model, optimizer = trained([0])
    backward(model, optimizer, inputs(seed=1))
    before, good = snapshot(model, optimizer), optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=f"{option}.*fixed at construction"):
        optimizer.step()
    assert_bitwise(snapshot(model, optimizer), before)
    optimizer.param_groups[0][option] = good
    optimizer.step()
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained(range(2))))


def test_structures_list_changed_in_place_is_refused_or_without_effect() -> None:
    model, optimizer = trained([0], structures=["dense", "dense"])
    given = optimizer.param_groups[0]["structures"]
    if isinstance(given, list):
        given[0] = "diagonal"
        with pytest.raises(ValueError, match=r"structures.*fixed at construction"):
            train(model, optimizer, [1])
    else:
        train(model, optimizer, [1])
        assert_bitwise(snapshot(model, optimizer), snapshot(*trained(range(2))))


def test_kfac_like_sets_alpha1_to_zero_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"kfac_like.*alpha1=0.5.*0"):
        optimizer = SINGD(mlp(), kfac_like=True)
    assert optimizer.param_groups[0]["alpha1"] == 0
    assert SINGD(mlp(), kfac_like=True, alpha1=0.0).param_groups[0]["alpha1"] == 0


def test_kfac_like_set_in_the_group_has_no_riemannian_momentum_either() -> None:
    model, optimizer = trained(range(2), alpha1=0.0)
    optimizer.param_groups[0].update(kfac_like=True, alpha1=0.5)
    reference_model, reference = trained(range(2), alpha1=0.0)
    reference.param_groups[0]["kfac_like"] = True
    with pytest.warns(UserWarning, match=r"kfac_like.*alpha1"):
        train(model, optimizer, [2, 3])
    train(reference_model, reference, [2, 3])
    assert_bitwise(snapshot(model, optimizer), snapshot(reference_model, reference))


@pytest.mark.parametrize("alpha1", [NAN, "0.5", -1, True])
def test_kfac_like_does_not_hide_a_bad_alpha1(alpha1: Any) -> None:
    with pytest.raises(ValueError, match="alpha1"):
        SINGD(mlp(), kfac_like=True, alpha1=alpha1)


def test_an_option_beside_a_bad_tensor_is_followed_once_that_is_mended() -> None:
    """The state that it needs is made then: nothing is half taken."""
    lr = torch.tensor(0.05, dtype=torch.float64)
    model, optimizer = trained(range(2), lr=lr, momentum=0.0)
    optimizer.param_groups[0]["momentum"] = 0.9
    lr.fill_(NAN)
    with pytest.raises(ValueError, match=r"lr is nan"):
        train(model, optimizer, [2])
    lr.fill_(0.05)
    train(model, optimizer, [2])
    other_model, other = trained(range(2), lr=lr.clone(), momentum=0.0)
    other.param_groups[0]["momentum"] = 0.9
    train(other_model, other, [2])
    assert_bitwise(snapshot(model, optimizer), snapshot(other_model, other))
