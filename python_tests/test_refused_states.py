"""States that do not fit are refused, and nothing changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import assert_same_tree, make
from nets import mlp, train

pytestmark = [pytest.mark.filterwarnings("error")]


def _other_structure(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["structures"] = ("dense", "tril")


def _other_factor_dtype(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["preconditioner_dtype"] = (torch.float32, None)


def _bad_option(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["damping"] = -1.0


def _fewer_parameters(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


def _no_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"] = []


def _more_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))


def _other_optimizer(saved: dict[str, Any]) -> None:
    model = mlp()
    saved.update(torch.optim.AdamW(model.parameters()).state_dict())


def _missing_layer(saved: dict[str, Any]) -> None:
    del saved["state"][0]


def _without(entry: str) -> Callable[[dict[str, Any]], None]:
    def damage(saved: dict[str, Any]) -> None:
        del saved["state"][2][entry]

    return damage


def _other_shape(entry: str) -> Callable[[dict[str, Any]], None]:
    def damage(saved: dict[str, Any]) -> None:
        saved["state"][2][entry] = saved["state"][2][entry].flatten()[:-1].clone()

    return damage


def _without_states(saved: dict[str, Any]) -> None:
    saved.clear()


def _steps(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["steps"] = "x"


def _replaced(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(saved: dict[str, Any]) -> None:
        entries = next(e for e in reversed(saved["state"].values()) if key in e)
        entries[key] = value(entries[key])

    return damage


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "other_structure": (_other_structure, r"structures=\('dense', 'tril'\)"),
    "other_factor_dtype": (_other_factor_dtype, "preconditioner_dtype"),
    "no_states": (_without_states, "lacks 'state' or 'param_groups'"),
    "steps": (_steps, "steps='x'"),
    "number_for_K": (
        _replaced("K", lambda K: 3.0),
        r"'2\.weight'.*'K' is float, expected a tensor",
    ),
    "integer_K": (_replaced("K", torch.Tensor.long), r"'2\.weight'.*'K' has dtype torch.int64"),
    "complex_K": (_replaced("K", lambda K: K + 1j), r"'2\.weight'.*'K' has dtype torch.complex"),
    "bad_option": (_bad_option, "damping is -1.0"),
    "fewer_parameters": (_fewer_parameters, "3 parameters in the saved state, 4"),
    "no_groups": (_no_groups, "0 parameter groups.* 1"),
    "more_groups": (_more_groups, "2 parameter groups.* 1"),
    "other_optimizer": (_other_optimizer, r"not a state of singd_ext\.SINGD"),
    "missing_layer": (_missing_layer, r"'0\.weight'.*'K'"),
    "missing_K": (_without("K"), r"'2\.weight'.*'K'"),
    "missing_C": (_without("C"), r"'2\.weight'.*'C'"),
    "missing_m_K": (_without("m_K"), r"'2\.weight'.*'m_K'"),
    "missing_momentum": (_without("momentum_buffer"), r"'2\.weight'.*'momentum_buffer'"),
    "shape_of_K": (_other_shape("K"), r"'2\.weight'.*'K' has shape \(24,\).*\(25,\)"),
    "shape_of_m_C": (_other_shape("m_C"), r"'2\.weight'.*'m_C' has shape"),
    "shape_of_momentum": (_other_shape("momentum_buffer"), r"'momentum_buffer' has shape"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_state_that_does_not_fit_is_refused_and_nothing_changes(damage: str) -> None:
    model, optimizer = make()
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    intact = copy.deepcopy(saved)
    change, message = REFUSED[damage]
    change(saved)
    train(model, optimizer, [2])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same_tree(optimizer.state_dict(), before)
    optimizer.load_state_dict(intact)
    assert_same_tree(optimizer.state_dict(), intact)


def test_state_of_another_parameter_dtype_is_refused_or_keeps_training() -> None:
    source, source_optimizer = make(dtype=torch.float32)
    train(source, source_optimizer, range(2))
    model, optimizer = make(dtype=torch.bfloat16)
    optimizer.load_state_dict(source_optimizer.state_dict())
    assert {K.dtype for K, _ in optimizer.factors().values()} == {torch.float32}
    train(model, optimizer, range(2))
    assert all(p.isfinite().all() for p in model.parameters())
