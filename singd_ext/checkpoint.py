"""Checks and copies of a saved optimizer state."""

from __future__ import annotations

from copy import deepcopy
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .fallback import OWN, Group, State, check_saved, is_own
from .hyperparameters import FIXED_OPTIONS, OPTIONS, Hyperparameters

if TYPE_CHECKING:
    from .optimizer import SINGD


def saved_group(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group of builtins: NumPy numbers converted, an `lr_cov` function left out."""
    result = {name: _builtin(value) for name, value in group.items()}
    if is_own(group) and callable(result["lr_cov"]) and not isinstance(result["lr_cov"], Tensor):
        result["lr_cov"] = None
    return result


def _builtin(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def checked_state(optimizer: SINGD, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a saved state that fits the optimizer; the original is not changed.

    Raises:
        ValueError: If groups, options, or shapes of tensors differ, naming what and where.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("the saved state lacks 'state' or 'param_groups': it is no state_dict() "
                         "of an optimizer")  # fmt: skip
    saved_groups = [dict(group) for group in state_dict["param_groups"]]
    if len(saved_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the saved state has {len(saved_groups)} parameter groups, the optimizer "
            f"{len(optimizer.param_groups)}"
        )
    for index, (saved, own) in enumerate(zip(saved_groups, optimizer.param_groups, strict=True)):
        _check_group(index, saved, own)
        if not is_own(own):
            continue
        for name in OPTIONS:  # options that are newer than the saved state
            saved.setdefault(name, own[name])
        # A function is not saved: the optimizer's own goes on, or else its number.
        lr_cov = own["lr_cov"] if saved["lr_cov"] is None else saved["lr_cov"]
        Hyperparameters.of_group({**own, **saved, "lr_cov": lr_cov})
    state = {key: dict(entries) for key, entries in state_dict["state"].items()}
    for name, parameter, saved_id, group in _parameters(optimizer, saved_groups):
        entries = optimizer.state.get(parameter, {}), state.get(saved_id, {})
        if is_own(group):
            _check_entries(name, parameter, *entries, group)
        else:
            check_saved(name, parameter, *entries)
    return {**state_dict, "param_groups": saved_groups, "state": state}


def restore_state(
    optimizer: SINGD,
    checked: dict[str, Any],
    lr_cov: dict[int, Any],
    fallback_groups: list[Group],
    fallback_state: State,
) -> None:
    """Finish `Optimizer.load_state_dict`.

    It casts the tensors to the parameter's dtype, or shares them with the caller: they are copied
    once more, in the dtypes they were saved in. And `lr_cov` is what each group had before, for
    groups that were saved with a function. The fallback's groups and state are as it loaded them.
    """
    for index, before in lr_cov.items():
        if optimizer.param_groups[index]["lr_cov"] is None:
            optimizer.param_groups[index]["lr_cov"] = before
    others = iter(fallback_groups)
    optimizer.param_groups = [g if is_own(g) else next(others) for g in optimizer.param_groups]
    optimizer.state.update(fallback_state)
    for _, parameter, saved_id, group in _parameters(optimizer, checked["param_groups"]):
        if saved_id in checked["state"] and is_own(group):
            optimizer.state[parameter] = {
                key: value.detach().clone().to(parameter.device)
                if isinstance(value, Tensor)
                else deepcopy(value)
                for key, value in checked["state"][saved_id].items()
            }


def _check_group(index: int, saved: dict[str, Any], own: dict[str, Any]) -> None:
    if len(saved["params"]) != len(own["params"]):
        raise ValueError(
            f"parameter group {index} has {len(saved['params'])} parameters in the saved state, "
            f"{len(own['params'])} in the optimizer"
        )
    if saved.get("optimizer", OWN) != own["optimizer"]:
        raise ValueError(
            f"parameter group {index} was trained by {saved.get('optimizer', OWN)} in the saved "
            f"state, and is by {own['optimizer']} in the optimizer"
        )
    if not is_own(own):
        return
    for name in (*FIXED_OPTIONS, "steps", "lr_cov"):
        if name not in saved:
            raise ValueError(f"parameter group {index} of the saved state has no '{name}': it is "
                             "not a state of singd_ext.SINGD")  # fmt: skip
    if not isinstance(saved["steps"], int) or not 0 <= saved["steps"] < 2**62:
        raise ValueError(
            f"parameter group {index} of the saved state has steps={saved['steps']!r}; it must be "
            "a number of steps"
        )
    for name in FIXED_OPTIONS:
        if tuple(saved[name]) != tuple(own[name]):
            raise ValueError(
                f"parameter group {index} was saved with {name}={saved[name]!r}, but the "
                f"optimizer has {own[name]!r}"
            )


def _check_entries(
    name: str,
    parameter: Tensor,
    own: dict[str, Any],
    saved: dict[str, Any],
    group: dict[str, Any],
) -> None:
    keys = ["K", "C", "rejected", "skipped"]
    keys += ["m_K", "m_C"] if group["alpha1"] != 0 else []
    keys += ["momentum_buffer"] if group["momentum"] != 0 else []
    for key in own:
        if _entry(key) in keys and key not in saved:
            raise ValueError(f"parameter '{name}': the saved state has no '{key}'")
    for key in saved:
        if _entry(key) in ("K", "C") and key not in own:
            raise ValueError(
                f"parameter '{name}': the saved state has a '{key}', the optimizer none"
            )
    for key, value in saved.items():
        expected = parameter if key == "momentum_buffer" else own.get(key)
        if not isinstance(expected, Tensor):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"parameter '{name}': saved '{key}' is {type(value).__name__}, expected a tensor"
            )
        if value.shape != expected.shape:
            raise ValueError(
                f"parameter '{name}': saved '{key}' has shape {tuple(value.shape)}, expected "
                f"{tuple(expected.shape)}"
            )
        if value.is_floating_point() != expected.is_floating_point() or value.is_complex():
            raise ValueError(
                f"parameter '{name}': saved '{key}' has dtype {value.dtype}, expected one like "
                f"{expected.dtype}"
            )


def _entry(key: str) -> str:
    """Return what an entry of the state is, whichever of a parameter's layers it belongs to."""
    return key.rpartition(".")[2]


def _parameters(
    optimizer: SINGD, saved_groups: list[dict[str, Any]]
) -> list[tuple[str, Tensor, Any, dict[str, Any]]]:
    """(name, parameter, its key in the saved state, its saved group) of every parameter."""
    names = {id(p): name for name, p in optimizer._model.named_parameters()}
    return [
        (names.get(id(parameter), "?"), parameter, key, saved)
        for own, saved in zip(optimizer.param_groups, saved_groups, strict=True)
        for parameter, key in zip(own["params"], saved["params"], strict=True)
    ]
