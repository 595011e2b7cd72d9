"""The options of SINGD: one validated dataclass, with the paper's symbol beside each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral, Real
from operator import itemgetter
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
        check_number("lr", self.lr, tensor=True)
        check_number("momentum", self.momentum, below=1)
        check_number("damping", self.damping)
        check_number("alpha1", self.alpha1, below=1)
        check_number("weight_decay", self.weight_decay)
        _check_integer("T", self.T, at_least=1)
        _check_choice("loss_average", self.loss_average, LOSS_AVERAGES)
        if not callable(self.lr_cov) or isinstance(self.lr_cov, Tensor):
            check_number("lr_cov", self.lr_cov, tensor=True)
        _check_pair("structures", self.structures)
        for spec in self.structures:
            _check_structure(spec)
        _check_choice("kfac_approx", self.kfac_approx, KFAC_APPROXIMATIONS)
        _check_pair("preconditioner_dtype", self.preconditioner_dtype)
        for dtype in self.preconditioner_dtype:
            _check_choice("preconditioner_dtype", dtype, (None, *DTYPES))
        for name in ("kfac_like", "normalize_lr_cov", "stochastic_rounding"):
            check_flag(name, getattr(self, name))
        _check_integer("expm_order", self.expm_order, at_least=1, at_most=2)
        check_number("step_cap", self.step_cap, allow_infinity=True, positive=True)
        _check_integer("seed", self.seed, at_least=0)
        for name in ("max_update_norm", "kl_clip"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), positive=True)

    @cached_property
    def values(self) -> tuple[Any, ...]:
        """The options in their order, as `option_values` gives them of a group."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @cached_property
    def lr_tensor(self) -> Tensor:
        """β₂ as a tensor."""
        return self.lr if isinstance(self.lr, Tensor) else torch.tensor(self.lr, dtype=torch.double)

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
        """Validate the options of parameter group `index` after a change.

        Raises:
            ValueError: For a bad option, or one that is fixed.
        """
        options = self.of_group(group)
        for name in FIXED_OPTIONS:
            if getattr(options, name) != getattr(self, name):
                raise ValueError(
                    f"{name} of parameter group {index} was changed from {getattr(self, name)!r} "
                    f"to {getattr(options, name)!r}; it is fixed at construction"
                )
        return options

    @classmethod
    def of_group(cls, group: dict[str, Any]) -> Hyperparameters:
        """Validate the options in a parameter group.

        Pairs become tuples there, and IKFAC's Riemannian momentum 0, with a warning.
        """
        options = cls(**{field.name: group[field.name] for field in fields(cls)})
        for name in FIXED_OPTIONS:
            group[name] = tuple(group[name])
        if options.kfac_like and options.alpha1 != 0:
            warn_user(
                f"kfac_like=True (IKFAC) has no Riemannian momentum: alpha1={options.alpha1} is "
                "set to 0"
            )
            group["alpha1"] = 0.0
        return cls(**{field.name: group[field.name] for field in fields(cls)})


option_values = itemgetter(*(field.name for field in fields(Hyperparameters)))


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
