"""Checks and copies of a saved optimizer state."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .hyperparameters import Hyperparameters

if TYPE_CHECKING:
    from .optimizer import SINGD

# Options that say what the state looks like, and so are fixed once it exists.
FIXED_OPTIONS = ("structures", "preconditioner_dtype")


def checked_state(optimizer: SINGD, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a saved state that fits the optimizer; the original is not changed.

    Raises:
        ValueError: If groups, options, or shapes of tensors differ, naming what and where.
    """
    saved_groups = [dict(group) for group in state_dict["param_groups"]]
    if len(saved_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the saved state has {len(saved_groups)} parameter groups, the optimizer "
            f"{len(optimizer.param_groups)}"
        )
    for index, (saved, own) in enumerate(zip(saved_groups, optimizer.param_groups, strict=True)):
        _check_group(index, saved, own)
        if saved["lr_cov"] is None:  # a function, which is not saved
            saved["lr_cov"] = own["lr_cov"]
        Hyperparameters.of_group({**own, **saved})
    state = {key: dict(entries) for key, entries in state_dict["state"].items()}
    for name, parameter, saved_id in _parameters(optimizer, saved_groups):
        _check_entries(name, optimizer.state.get(parameter, {}), state.get(saved_id, {}))
    return {**state_dict, "param_groups": saved_groups, "state": state}


def restore_state(optimizer: SINGD, checked: dict[str, Any]) -> None:
    """Copy the tensors once more, in the dtypes they were saved in.

    `Optimizer.load_state_dict` casts them to the parameter's dtype, or shares them with the caller.
    """
    for _, parameter, saved_id in _parameters(optimizer, checked["param_groups"]):
        if saved_id in checked["state"]:
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
    for name in (*FIXED_OPTIONS, "steps", "lr_cov"):
        if name not in saved:
            raise ValueError(f"parameter group {index} of the saved state has no '{name}': it is "
                             "not a state of singd_ext.SINGD")  # fmt: skip
    for name in FIXED_OPTIONS:
        if tuple(saved[name]) != tuple(own[name]):
            raise ValueError(
                f"parameter group {index} was saved with {name}={saved[name]!r}, but the "
                f"optimizer has {own[name]!r}"
            )


def _check_entries(name: str, own: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in ("K", "C", "rejected", "skipped"):
        if (key in own) != (key in saved):
            raise ValueError(
                f"parameter '{name}': '{key}' is in only one of the saved state and the optimizer's"
            )
    for key, value in saved.items():
        if key in own and isinstance(value, Tensor) and value.shape != own[key].shape:
            raise ValueError(
                f"parameter '{name}': saved '{key}' has shape {tuple(value.shape)}, expected "
                f"{tuple(own[key].shape)}"
            )


def _parameters(
    optimizer: SINGD, saved_groups: list[dict[str, Any]]
) -> list[tuple[str, Tensor, Any]]:
    """(name, parameter, its key in the saved state) of every parameter."""
    names = {id(p): name for name, p in optimizer._model.named_parameters()}
    return [
        (names.get(id(parameter), "?"), parameter, key)
        for own, saved in zip(optimizer.param_groups, saved_groups, strict=True)
        for parameter, key in zip(own["params"], saved["params"], strict=True)
    ]
