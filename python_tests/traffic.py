"""Bytes that the CUDA kernels must move, bytes that they move, and the layers these are counted on.

The emulator counts. Its DRAM bytes are those behind a cache of 32 MiB, less than an A100 or an H100
has; `minimum` formulas count every operand once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import backends
import calls
import torch
from calls import Shape
from torch import Tensor

from singd_ext import _C

CACHE = 32 << 20
# d_o × d_i of the linear layers of one block.
GPT2 = {
    "small": [Shape(2304, 768), Shape(768, 768), Shape(3072, 768), Shape(768, 3072)],
    "medium": [Shape(3072, 1024), Shape(1024, 1024), Shape(4096, 1024), Shape(1024, 4096)],
}
BLOCKS = {"small": 12, "medium": 24}


@contextmanager
def counting() -> Iterator[dict[str, Any]]:
    """Count what the emulated kernels do; the result is filled in at the end."""
    result: dict[str, Any] = {}
    assert backends.emulation is not None
    backends.emulation.start_counting(CACHE)
    try:
        yield result
    finally:
        result.update(backends.emulation.stop_counting())


def storage_bytes(spec: str, dim: int, dtype: torch.dtype) -> int:
    return _C.storage_size(spec, dim) * dtype.itemsize


def least_statistic_bytes(spec: str, rows: int, dim: int, dtype: torch.dtype) -> int:
    """X once, the float32 statistic read and written."""
    return rows * dim * dtype.itemsize + 2 * storage_bytes(spec, dim, torch.float32)


def least_step_bytes(
    spec: str, shapes: list[Shape], passes: int, dtype: torch.dtype, factor_dtype: torch.dtype
) -> int:
    """So many passes over d_o × d_i, and both factors once."""
    return sum(
        passes * s.d_o * s.d_i * dtype.itemsize
        + storage_bytes(spec, s.d_i, factor_dtype)
        + storage_bytes(spec, s.d_o, factor_dtype)
        for s in shapes
    )


def adamw_bytes(shapes: list[Shape], dtype: torch.dtype) -> int:
    """Fused AdamW reads W, G and two moments and writes W and the moments."""
    return sum(7 * s.d_o * s.d_i * dtype.itemsize for s in shapes)


def layer(spec: str, s: Shape, dtype: torch.dtype, factor_dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters, gradient and factors near the identity, without the cost of random ones."""
    ramp = torch.linspace(-1, 1, s.d_o * s.d_i).view(s.d_o, s.d_i)
    return {
        "weight": ramp.to(dtype, copy=True),
        "momentum": ramp.flip(0).to(dtype),
        "gradient": ramp.flip(1).to(dtype),
        "K": calls.StructuredMatrix.eye(spec, s.d_i, factor_dtype).data,
        "C": calls.StructuredMatrix.eye(spec, s.d_o, factor_dtype).data,
        "skipped": torch.zeros((), dtype=torch.int64),
    }


def step_arguments(spec: str, layers: list[dict[str, Tensor]]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of `ops.preconditioned_update_` for layers without bias."""
    empty = [torch.empty(0) for _ in layers]

    def of(name: str) -> list[Tensor]:
        return [one[name] for one in layers]

    positional = [
        of("weight"), empty, of("momentum"), empty, of("skipped"), of("gradient"), empty, of("K"),
        of("C"), spec, spec,
    ]  # fmt: skip
    options = {
        "lr": torch.tensor(0.01, dtype=torch.float64), "momentum": 0.9, "weight_decay": 0.01,
        "outcomes": torch.empty(len(layers), dtype=torch.int64),
        "workspace": torch.empty(0, dtype=torch.uint8),
    }  # fmt: skip
    return positional, options
