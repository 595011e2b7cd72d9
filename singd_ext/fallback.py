"""What SINGD does not precondition, trained by another torch optimizer inside the same one.

The other optimizer works on SINGD's own state and on the very groups in `param_groups`, so that
schedulers, checkpoints and users see one optimizer. The entry "optimizer" of a group says whose it
is.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from .scaling import Scales

Group = dict[str, Any]
State = dict[Any, dict[str, Any]]
Factory = Callable[[list[Any]], torch.optim.Optimizer]

OWN = "SINGD"  # marks the groups that SINGD preconditions
FALLBACK = "fallback"  # asks for a group to be trained by the fallback, whatever it is

# State of torch's optimizers that has the shape of the parameter.
_PARAMETER_SHAPED = (
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "sum",
)  # fmt: skip


def is_own(group: Group) -> bool:
    """Whether SINGD trains a group itself."""
    return group.get("optimizer", OWN) == OWN


class Fallback:
    """The other optimizer: none, torch's AdamW, or what a factory makes of the parameters.

    Raises:
        ValueError: For another name, or options without "adamw".
    """

    def __init__(
        self, fallback: str | Factory | None, options: dict[str, Any] | None = None
    ) -> None:
        if fallback is not None and fallback != "adamw" and not callable(fallback):
            raise ValueError(
                f"fallback is {fallback!r}; it must be None, 'adamw', or a function from a list of "
                "parameters or groups to a torch.optim.Optimizer"
            )
        if options is not None and fallback != "adamw":
            raise ValueError(
                f"fallback_options is {options!r}, but it only goes with fallback='adamw': give "
                "the options to the optimizer that the function makes"
            )
        self._factory: Factory | None = None if isinstance(fallback, str) else fallback
        if fallback == "adamw":
            self._factory = AdamW({} if options is None else dict(options))
        self._optimizer: torch.optim.Optimizer | None = None

    def __bool__(self) -> bool:
        return self._factory is not None

    @property
    def name(self) -> str:
        """The class of the other optimizer, once it has parameters."""
        return FALLBACK if self._optimizer is None else type(self._optimizer).__name__

    def add_groups(self, groups: Sequence[Group], present: list[Group]) -> list[Group]:
        """Take parameters; return their groups with all options, as `param_groups` shall hold them.

        Args:
            groups: "params" and the options that differ from the other optimizer's defaults.
            present: The groups that are its own already.

        Raises:
            TypeError: If the factory returns something else than an optimizer.
            ValueError: If the optimizer needs a closure or does not hold exactly these parameters.
        """
        if not groups:
            return []
        if self._optimizer is None:
            added = self._construct(groups)
        else:
            self._optimizer.param_groups = list(present)
            for group in groups:
                self._optimizer.add_param_group(dict(group))
            added = self._optimizer.param_groups[len(present) :]
        for group in added:
            group["optimizer"] = self.name
        return added

    def _construct(self, groups: Sequence[Group]) -> list[Group]:
        assert self._factory is not None
        plain = len(groups) == 1 and set(groups[0]) == {"params"}
        made = self._factory(groups[0]["params"] if plain else [dict(group) for group in groups])
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(
                f"the fallback function returned {made!r}; it must return a torch.optim.Optimizer"
            )
        name = type(made).__name__
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"{name} cannot be the fallback: its step needs a closure")
        if name == OWN:
            raise ValueError("the fallback cannot be another SINGD")
        wanted = [id(tensor_of(p)) for group in groups for p in group["params"]]
        held = [id(p) for group in made.param_groups for p in group["params"]]
        if sorted(wanted) != sorted(held):
            raise ValueError(
                f"the fallback function was given {len(wanted)} parameters, but its {name} holds "
                f"{len(set(held) & set(wanted))} of them and {len(set(held) - set(wanted))} "
                "others; it must train exactly what it is given"
            )
        self._optimizer = made
        return made.param_groups

    # ---------------------------------------------------------------- the step

    def step(self, groups: list[Group], state: State, scales: Scales) -> None:
        """Update the parameters of these groups, or do nothing if a scaler found infinities.

        An optimizer that knows a scaler's scale and flag gets both. For others the gradients are
        unscaled in place and the flag is read, which waits for a GPU, as in `GradScaler.step`.
        """
        optimizer = self._optimizer
        if optimizer is None or not groups:
            return
        optimizer.param_groups, optimizer.state = groups, state  # type: ignore[assignment]
        if "momentum" not in optimizer.defaults:
            for group in groups:
                _cycle_first_beta(group)
        with torch.no_grad():
            if scales.found_inf is None and scales.gradient is None:
                optimizer.step()
            elif _supports_scales(optimizer):
                _step_with_scales(optimizer, scales)
            elif scales.found_inf is None or scales.found_inf.item() == 0:
                _unscale(groups, scales.gradient)
                optimizer.step()

    # ---------------------------------------------------------------- checkpoints

    def loaded(
        self, groups: list[Group], saved_groups: list[Group], saved_state: State
    ) -> tuple[list[Group], State]:
        """Return groups and state as the other optimizer loads them; nothing is changed.

        Args:
            groups: Its present groups.
            saved_groups: The saved groups in their place.
            saved_state: The whole saved state, which is copied.
        """
        optimizer = self._optimizer
        if optimizer is None or not groups:
            return [], {}
        keys = [key for group in saved_groups for key in group["params"]]
        state = {key: deepcopy(saved_state[key]) for key in keys if key in saved_state}
        optimizer.param_groups, optimizer.state = list(groups), defaultdict(dict)
        optimizer.load_state_dict({"state": state, "param_groups": saved_groups})
        return optimizer.param_groups, optimizer.state


class AdamW:
    """The factory of fallback="adamw": torch's AdamW, fused where torch has it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __call__(self, params: list[Any]) -> torch.optim.Optimizer:
        options = dict(self._options)
        if not {"fused", "foreach", "differentiable"} & options.keys():
            groups = [p["params"] if isinstance(p, dict) else [p] for p in params]
            options["fused"] = all(_can_fuse(tensor_of(p)) for group in groups for p in group)
        return torch.optim.AdamW(params, **options)


def tensor_of(entry: Any) -> Any:
    """The parameter in an entry of "params", which may be (name, parameter)."""
    return entry[1] if isinstance(entry, tuple) else entry


def check_new_parameters(
    entries: Sequence[Any], present: Sequence[Group], names: dict[int, str]
) -> None:
    """Check that no parameter is given twice, and that all have values.

    Raises:
        ValueError: Naming the parameter.
    """
    seen = {id(tensor_of(entry)) for group in present for entry in group["params"]}
    for p in map(tensor_of, entries):
        name = names.get(id(p), "<not in model>")
        if id(p) in seen:
            raise ValueError(
                f"parameter '{name}' is given twice, in one or in different parameter groups; it "
                "must be in one"
            )
        seen.add(id(p))
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"parameter '{name}' is uninitialised: run a forward pass first")


def check_saved(name: str, parameter: Tensor, own: dict[str, Any], saved: dict[str, Any]) -> None:
    """Check entries and shapes of a fallback parameter's saved state.

    Raises:
        ValueError: Naming the parameter, the entry and both shapes.
    """
    if missing := [key for key in own if saved and key not in saved]:
        raise ValueError(f"parameter '{name}': the saved state has no '{missing[0]}'")
    for key, value in saved.items():
        expected = own.get(key, parameter if key in _PARAMETER_SHAPED else None)
        if not isinstance(value, Tensor) or not isinstance(expected, Tensor):
            continue
        if value.shape != expected.shape:
            raise ValueError(
                f"parameter '{name}': saved '{key}' has shape {tuple(value.shape)}, expected "
                f"{tuple(expected.shape)}"
            )


def _can_fuse(parameter: Any) -> bool:
    """Whether torch has a fused AdamW for this parameter's device and dtype."""
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
        return False
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel("aten::_fused_adamw_", parameter.device.type.upper())


def _cycle_first_beta(group: Group) -> None:
    """Give a momentum that a scheduler wrote to the group to the optimizer's β₁.

    OneCycleLR and CyclicLR look at SINGD's defaults, which have "momentum", and write that into
    every group.
    """
    if "momentum" in group and "betas" in group:
        group["betas"] = (group.pop("momentum"), *group["betas"][1:])


def _supports_scales(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all groups are updated by kernels that take the scale and the flag."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return all(group.get("fused", True) for group in optimizer.param_groups)


def _step_with_scales(optimizer: Any, scales: Scales) -> None:
    optimizer.grad_scale, optimizer.found_inf = scales.gradient, scales.found_inf
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def _unscale(groups: Sequence[Group], scale: Tensor | None) -> None:
    """Divide the gradients by the scale, as `GradScaler.unscale_` does."""
    if scale is None:
        return
    inverse = scale.double().reciprocal().float()
    for p in (p for group in groups for p in group["params"]):
        if p.grad is not None:
            values = p.grad._values() if p.grad.is_sparse else p.grad
            values.mul_(inverse.to(p.device, non_blocking=True))
