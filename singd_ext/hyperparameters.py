"""The options of SINGD: one validated dataclass, with the paper's symbol beside each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .structured import DTYPES, canonical_spec

KFAC_APPROXIMATIONS = ("expand", "reduce")
LOSS_AVERAGES = (None, "batch", "batch+sequence")


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

    def __post_init__(self) -> None:
        _check_number("lr", self.lr, tensor=True)
        _check_number("momentum", self.momentum, below=1)
        _check_number("damping", self.damping)
        _check_number("alpha1", self.alpha1, below=1)
        _check_number("weight_decay", self.weight_decay)
        _check_integer("T", self.T, at_least=1)
        _check_choice("loss_average", self.loss_average, LOSS_AVERAGES)
        if not callable(self.lr_cov) or isinstance(self.lr_cov, Tensor):
            _check_number("lr_cov", self.lr_cov, tensor=True)
        _check_pair("structures", self.structures)
        for spec in self.structures:
            _check_structure(spec)
        _check_choice("kfac_approx", self.kfac_approx, KFAC_APPROXIMATIONS)
        _check_pair("preconditioner_dtype", self.preconditioner_dtype)
        for dtype in self.preconditioner_dtype:
            _check_choice("preconditioner_dtype", dtype, (None, *DTYPES))
        for name in ("kfac_like", "normalize_lr_cov", "stochastic_rounding"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        _check_choice("expm_order", self.expm_order, (1, 2))
        _check_number("step_cap", self.step_cap, allow_infinity=True, positive=True)
        _check_integer("seed", self.seed, at_least=0)

    def lr_cov_at(self, step: int) -> float:
        """β₁ at this step of the group.

        Raises:
            ValueError: If a scheduled value is not a number >= 0.
        """
        value = self.lr_cov(step) if callable(self.lr_cov) else self.lr_cov
        _check_number(f"lr_cov({step})" if callable(self.lr_cov) else "lr_cov", value, tensor=True)
        return float(value)

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> Hyperparameters:
        """Validate the options in a parameter group."""
        return cls(**{field.name: group[field.name] for field in fields(cls)})


def _check_number(
    name: str,
    value: Any,
    *,
    below: float = math.inf,
    positive: bool = False,
    allow_infinity: bool = False,
    tensor: bool = False,
) -> None:
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


def _check_integer(name: str, value: Any, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise ValueError(f"{name} is {value!r}; it must be an integer >= {at_least}")


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or not any(value is a or value == a for a in allowed):
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
