"""The options of SINGD: one validated dataclass, with the paper's symbol beside each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ._warnings import warn_user
from .structured import DTYPES, canonical_spec

KFAC_APPROXIMATIONS = ("expand", "reduce")
LOSS_AVERAGES = (None, "batch", "batch+sequence")

# Options that say what the state looks like, and so are fixed once it exists.
FIXED_OPTIONS = ("structures", "preconditioner_dtype")


@dataclass(frozen=True)
class Hyperparameters:
    """Options of one parameter group, validated at construction (Figure 4, Table 4).

    Raises:
        ValueError: Naming the option, its value and what is allowed.
    """

    lr: float | Tensor  # β₂, step size of the parameters
    momentum: float  # α₂, momentum of the parameters
    damping: float  # λ
    alpha1: float  # α₁, Riemannian momentum of the factors
    weight_decay: float  # γ
    T: int  # T, steps from one factor update to the next
    loss_average: str | None  # scaling of G
    lr_cov: float | Callable[[int], float]  # β₁, step size of the factors
    structures: tuple[str, str]  # L̂_K, L̂_C
    kfac_approx: str  # treatment of shared positions
    kfac_like: bool  # IKFAC (Figure 3) instead of SINGD
    preconditioner_dtype: tuple[torch.dtype | None, torch.dtype | None]
    normalize_lr_cov: bool
    expm_order: int  # order after which Expm is cut
    step_cap: float  # bound of β₁‖m‖
    stochastic_rounding: bool  # of bfloat16 stores
    seed: int  # of stochastic rounding
    max_update_norm: float | None  # bound of each layer's ‖β₂ P‖
    kl_clip: float | None  # bound of Σ β₂² ⟨P, ∂ℓ/∂W⟩

    def __post_init__(self) -> None:
        for name in OPTIONS:
            _CHECKS[name](name, getattr(self, name))

    def check_tensors(self) -> None:
        """Validate again what can change in place: step sizes in tensors."""
        if isinstance(self.lr, Tensor):
            check_number("lr", self.lr, tensor=True)
        if isinstance(self.lr_cov, Tensor):
            check_number("lr_cov", self.lr_cov, tensor=True)

    def lr_cov_at(self, step: int) -> float:
        """β₁ at this step of the group.

        Raises:
            ValueError: If a scheduled value is not a number >= 0.
        """
        if not callable(self.lr_cov):
            return float(self.lr_cov)
        value = self.lr_cov(step)
        check_number(f"lr_cov({step})", value, tensor=True)
        return float(value)

    def updated(self, group: dict[str, Any], index: int) -> Hyperparameters:
        """Validate the options of parameter group `index` that were changed, as schedulers do.

        Raises:
            ValueError: For a bad option, or one that is fixed.
        """
        known = vars(self)
        missing = [name for name in OPTIONS if name not in group]
        if missing:
            raise ValueError(
                f"parameter group {index} lacks the options {missing}: groups of SINGD stay where "
                "they were added, with all of their options"
            )
        changed = {name: group[name] for name in OPTIONS if group[name] is not known[name]}
        for name, value in changed.items():
            _CHECKS[name](name, value)
        for name in FIXED_OPTIONS:
            value, fixed = tuple(group[name]), known[name]
            if value != fixed:
                raise ValueError(
                    f"{name} of parameter group {index} was changed from {fixed!r} to {value!r}; "
                    "it is fixed at construction"
                )
            group[name] = changed[name] = fixed
        if not changed.keys().isdisjoint(("kfac_like", "alpha1")):
            changed["alpha1"] = _without_momentum_of_ikfac(group)
        options = object.__new__(Hyperparameters)  # past the checks of what is as it was
        vars(options).update({**known, **changed})
        options.check_tensors()
        return options

    @classmethod
    def of_group(cls, group: dict[str, Any]) -> Hyperparameters:
        """Validate the options in a parameter group.

        Pairs become tuples there, and IKFAC's Riemannian momentum 0, with a warning.
        """
        cls(**{name: group[name] for name in OPTIONS})
        for name in FIXED_OPTIONS:
            group[name] = tuple(group[name])
        _without_momentum_of_ikfac(group)
        return cls(**{name: group[name] for name in OPTIONS})


OPTIONS = tuple(field.name for field in fields(Hyperparameters))


def _without_momentum_of_ikfac(group: dict[str, Any]) -> float:
    """Return alpha1 of a group, which IKFAC does not have: it becomes 0 there, with a warning."""
    if group["kfac_like"] and group["alpha1"] != 0:
        warn_user(
            f"kfac_like=True (IKFAC) has no Riemannian momentum: alpha1={group['alpha1']} is set "
            "to 0"
        )
        group["alpha1"] = 0.0
    return group["alpha1"]


def check_number(
    name: str,
    value: Any,
    *,
    below: float = math.inf,
    positive: bool = False,
    allow_infinity: bool = False,
    tensor: bool = False,
) -> None:
    """Raise ValueError unless value is a finite real number in the given range."""
    allowed = "a number > 0" if positive else "a number >= 0"
    allowed += f" and < {below}" if below < math.inf else ""
    if tensor and isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name} is a tensor of shape {tuple(value.shape)} and dtype {value.dtype}; it "
                "must hold one floating-point number"
            )
        if value.device.type != "cpu":
            return  # reading it would wait for the device
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
    number = float(value)
    too_large = number >= below if below < math.inf else number == math.inf and not allow_infinity
    if not (number > 0 if positive else number >= 0) or too_large:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be True or False")


def _check_integer(name: str, value: Any, *, at_least: int, at_most: float = math.inf) -> None:
    allowed = f"an integer >= {at_least}" + (f" and <= {at_most}" if at_most < math.inf else "")
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or not at_least <= int(value) <= at_most:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    # The types are compared first: `==` of an array is no truth value.
    if not any(isinstance(value, type(choice)) and value == choice for choice in allowed):
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


def _check_pair(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}; it must be a pair, for K and for C")


def _check_structure(spec: Any) -> None:
    if not isinstance(spec, str):
        raise ValueError(f"structures contains {spec!r}; a structure is a string like 'diagonal'")
    try:
        canonical_spec(spec)
    except ValueError as error:
        raise ValueError(f"structures: {error}") from None


def _check_structures(name: str, value: Any) -> None:
    _check_pair(name, value)
    for spec in value:
        _check_structure(spec)


def _check_dtypes(name: str, value: Any) -> None:
    _check_pair(name, value)
    for dtype in value:
        _check_choice(name, dtype, (None, *DTYPES))


def _check_lr_cov(name: str, value: Any) -> None:
    if not callable(value) or isinstance(value, Tensor):
        check_number(name, value, tensor=True)


def _check_bound(name: str, value: Any) -> None:
    if value is not None:
        check_number(name, value, positive=True)


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "lr": partial(check_number, tensor=True),
    "momentum": partial(check_number, below=1),
    "damping": check_number,
    "alpha1": partial(check_number, below=1),
    "weight_decay": check_number,
    "T": partial(_check_integer, at_least=1, at_most=2**63 - 1),
    "loss_average": partial(_check_choice, allowed=LOSS_AVERAGES),
    "lr_cov": _check_lr_cov,
    "structures": _check_structures,
    "kfac_approx": partial(_check_choice, allowed=KFAC_APPROXIMATIONS),
    "kfac_like": check_flag,
    "preconditioner_dtype": _check_dtypes,
    "normalize_lr_cov": check_flag,
    "expm_order": partial(_check_integer, at_least=1, at_most=2),
    "step_cap": partial(check_number, allow_infinity=True, positive=True),
    "stochastic_rounding": check_flag,
    "seed": partial(_check_integer, at_least=0, at_most=2**63 - 1),
    "max_update_norm": _check_bound,
    "kl_clip": _check_bound,
}
