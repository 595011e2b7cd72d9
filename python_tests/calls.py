"""Whole calls of the hot operators on lists of layers of odd sizes, on whatever backend is in use.

Every call takes numbers that bfloat16 represents, so that the same call in another dtype, or on
another backend, starts from the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from reference import masks
from torch import Tensor

from singd_ext import StructuredMatrix, ops


@dataclass(frozen=True)
class Shape:
    """One layer: W is d_o × d_i, of which the last column is a bias if there is one."""

    d_o: int
    d_i: int
    bias: bool = False


SHAPES = [
    Shape(33, 70, True),
    Shape(1, 5),
    Shape(64, 64),
    Shape(36, 137, True),  # several parts of a tile, in rows that move in vectors
    Shape(130, 9, True),
    Shape(40, 257),
]


def numbers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, device="cpu").bfloat16()
    return x.to(torch.get_default_device(), dtype)


def factor(spec: str, dim: int, seed: int, dtype: torch.dtype) -> Tensor:
    """A random matrix of the structure, near the identity."""
    eye = torch.eye(dim, dtype=torch.float64)
    dense = masks.member(spec, numbers(dim, dim, seed=seed, dtype=torch.float64)) / (4 * dim**0.5)
    member = StructuredMatrix.extract(spec, (eye + dense).bfloat16().to(dtype))
    return member.data


def accumulate(spec: str, shape: Shape, rows: int, dtype: torch.dtype, **options: Any) -> Tensor:
    """The statistic of K for some rows."""
    k = factor(spec, shape.d_i, 1, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    statistic = torch.zeros_like(k, dtype=wide)
    x = numbers(rows, 3, shape.d_i - shape.bias, seed=2, dtype=dtype)
    ops.accumulate_statistic_(statistic, x, k, shape.d_i, spec, ones_column=shape.bias, **options)
    return statistic


def with_room(numbers: Tensor, room: int) -> Tensor:
    """The same numbers, with ones behind them in memory."""
    return torch.cat([numbers, numbers.new_ones(room)])[: numbers.numel()]


def update_factors(
    spec_K: str, spec_C: str, shapes: list[Shape], dtype: torch.dtype, room: int = 0, **options: Any
) -> dict[str, list[Tensor]]:
    """The factors and momenta after an update from statistics of random rows.

    room: numbers of memory behind each of them.
    """
    dims = ([s.d_i for s in shapes], [s.d_o for s in shapes])
    specs = (spec_K, spec_C)
    state: dict[str, list[Tensor]] = {}
    statistics: list[list[Tensor]] = []
    for side, name in enumerate("KC"):
        state[name] = [factor(specs[side], d, 3 + side, dtype) for d in dims[side]]
        state[f"m_{name}"] = [
            factor(specs[side], d, 5 + side, dtype).mul_(0.125) for d in dims[side]
        ]
        for key in (name, f"m_{name}"):
            state[key] = [with_room(numbers, room) for numbers in state[key]]
        statistics.append([accumulate(specs[side], Shape(1, d), 20, dtype) for d in dims[side]])
    state["rejected"] = [torch.zeros((), dtype=torch.int64) for _ in shapes]
    arguments: dict[str, Any] = {
        "lr_cov": torch.tensor(0.0625), "damping": 0.5, "alpha1": 0.5, "kfac_like": False,
        "normalize_lr_cov": False, "expm_order": 1, "step_cap": 4.0,
    }  # fmt: skip
    state["outcomes"] = [
        ops.update_factors_(
            state["K"], state["C"], state["m_K"], state["m_C"], state["rejected"], *statistics,
            [1 / 60] * len(shapes), [1 / 64] * len(shapes), *dims, *specs, **(arguments | options),
        )
    ]  # fmt: skip
    return state


def update_parameters(
    spec_K: str,
    spec_C: str,
    shapes: list[Shape],
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None = None,
    keep_products: bool = False,
    first: int = 0,
    **options: Any,
) -> dict[str, list[Tensor]]:
    """Weights, biases and momenta after a step with random gradients.

    Layer i has the numbers of layer `first` + i of another call.
    """
    empty = torch.empty(0, dtype=dtype)

    def parameters(seed: int) -> tuple[list[Tensor], list[Tensor]]:
        weights = [
            numbers(s.d_o, s.d_i - s.bias, seed=seed + i, dtype=dtype)
            for i, s in enumerate(shapes, first)
        ]
        biases = [
            numbers(s.d_o, seed=seed + 50 + i, dtype=dtype) if s.bias else empty
            for i, s in enumerate(shapes, first)
        ]
        return weights, biases

    weight, bias = parameters(100)
    momentum, momentum_bias = parameters(200)
    gradient, gradient_bias = parameters(300)
    factor_dtype = factor_dtype or dtype
    K = [factor(spec_K, s.d_i, 7, factor_dtype) for s in shapes]
    C = [factor(spec_C, s.d_o, 8, factor_dtype) for s in shapes]
    if keep_products:  # of dense factors
        options["P_K"] = [
            k.view(s.d_i, s.d_i) @ k.view(s.d_i, s.d_i).T for k, s in zip(K, shapes, strict=True)
        ]
        options["P_C"] = [
            c.view(s.d_o, s.d_o) @ c.view(s.d_o, s.d_o).T for c, s in zip(C, shapes, strict=True)
        ]
    skipped = [torch.zeros((), dtype=torch.int64) for _ in shapes]
    arguments = {"lr": torch.tensor(0.125), "momentum": 0.75, "weight_decay": 0.25} | options
    outcomes = ops.preconditioned_update_(
        weight, bias, momentum, momentum_bias, skipped, gradient, gradient_bias, K, C, spec_K,
        spec_C, **arguments,
    )  # fmt: skip
    return {
        "weight": weight, "bias": bias, "momentum": momentum, "momentum_bias": momentum_bias,
        "skipped": skipped, "outcomes": [outcomes],
    }  # fmt: skip


def assert_same(*results: dict[str, list[Tensor]]) -> None:
    """All calls left the same bits."""
    for name, tensors in results[0].items():
        for result in results[1:]:
            for first, other in zip(tensors, result[name], strict=True):
                assert torch.equal(first, other), name
