"""`--traffic`: what the CUDA kernels move, counted by the emulator, and the time that implies.

Nothing here is measured. Bytes, sectors and launches are *counted* while the emulator runs the
kernels on the CPU; DRAM bytes are those behind a cache of 32 MiB, less than an A100 or an H100 has.
Times are *implied* by these bytes and a given bandwidth, as if nothing else took time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _C, StructuredMatrix, ops
from .results import Figure, Row

CACHE = 32 << 20
ADAMW_PASSES = 7  # reads W, G and two moments, writes W and the moments
# Structures whose step is fused, with its passes over d_o × d_i (docs/cuda.md).
PASSES = {
    "diagonal": 5,
    "block_diagonal:30": 5,
    "block_diagonal:32": 5,
    "rank_triu:1": 6,
    "rank_tril:1": 6,
    "hierarchical:16,16": 6,
}


@dataclass(frozen=True)
class Shape:
    """A linear layer without bias: W is d_o × d_i."""

    d_o: int
    d_i: int


@dataclass(frozen=True)
class Stack:
    """Equal transformer blocks, known by the linear layers of one."""

    blocks: int
    shapes: tuple[Shape, ...]


def transformer(blocks: int, width: int) -> Stack:
    """Attention (one layer for q, k and v) and a feed-forward part of four times the width."""
    sizes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    return Stack(blocks, tuple(Shape(d_o, d_i) for d_o, d_i in sizes))


STACKS = {
    "tiny": transformer(2, 64),
    "gpt2-small": transformer(12, 768),
    "gpt2-medium": transformer(24, 1024),
    "vit-b": transformer(12, 768),
}


@dataclass(frozen=True)
class TrafficOptions:
    """What to count: layers, rows of X (tokens) at T, and the bandwidth of implied times."""

    preset: str = "gpt2-medium"
    structures: Sequence[str] = tuple(PASSES)
    tokens: int = 8192
    T: int = 10
    bandwidth: float = 3.0e12  # bytes per second

    def __post_init__(self) -> None:
        if self.preset not in STACKS:
            raise ValueError(f"--traffic knows the presets {list(STACKS)}, not '{self.preset}'")
        for spec in self.structures:
            if spec not in PASSES:
                raise ValueError(
                    f"--traffic counts the structures {list(PASSES)}, whose step is fused; of "
                    f"'{spec}' most is done by ATen's kernels"
                )


def emulation() -> ModuleType:
    """Return the emulator's library.

    Raises:
        ImportError: If it was not built, with the command that builds it.
    """
    if find_spec("singd_ext._emulation") is None:
        raise ImportError(
            "the emulator of the CUDA kernels was not built; in singd_ext's source folder, with a "
            "CUDA toolkit: `SINGD_EMULATION=1 python setup.py build_ext --inplace`"
        )
    return import_module("singd_ext._emulation")


@contextmanager
def counting() -> Iterator[dict[str, Any]]:
    """Run operators on the emulator and count; the result is filled in at the end.

    Its keys are the kernels and "total"; docs/cuda.md names the counts.
    """
    library, before = emulation(), ops._ops
    result: dict[str, Any] = {}
    library.set_seed(0)
    library.start_counting(CACHE)
    ops._ops = torch.ops.singd_emulated
    try:
        yield result
    finally:
        ops._ops = before
        result.update(library.stop_counting())


def dram_bytes(counts: dict[str, Any]) -> int:
    return int(counts["total"]["dram_bytes_read"] + counts["total"]["dram_bytes_written"])


def sector_efficiency(counts: dict[str, Any]) -> float:
    """The fewest 32-byte sectors that could hold the bytes asked for, over those that moved."""
    total = counts["total"]
    least = total["least_sectors_read"] + total["least_sectors_written"]
    return float(least / (total["sectors_read"] + total["sectors_written"]))


def storage_bytes(spec: str, dim: int, dtype: torch.dtype) -> int:
    return _C.storage_size(spec, dim) * dtype.itemsize


def least_statistic_bytes(spec: str, rows: int, dim: int, dtype: torch.dtype) -> int:
    """X once, the float32 statistic read and written."""
    return rows * dim * dtype.itemsize + 2 * storage_bytes(spec, dim, torch.float32)


def least_step_bytes(
    spec: str, shapes: Sequence[Shape], dtype: torch.dtype, factor_dtype: torch.dtype
) -> int:
    """The passes over d_o × d_i that the structure needs, and both factors once."""
    return sum(
        PASSES[spec] * s.d_o * s.d_i * dtype.itemsize
        + storage_bytes(spec, s.d_i, factor_dtype)
        + storage_bytes(spec, s.d_o, factor_dtype)
        for s in shapes
    )


def adamw_bytes(shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    """A step of fused AdamW, parameters and moments of this dtype."""
    return sum(ADAMW_PASSES * s.d_o * s.d_i * dtype.itemsize for s in shapes)


def count_statistic(spec: str, rows: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Count one call of `accumulate_statistic_` on rows [1, rows, dim], with K = I in float32."""
    x = torch.linspace(-1, 1, rows * dim).to(dtype).view(1, rows, dim)
    k = StructuredMatrix.eye(spec, dim, torch.float32).data
    statistic = torch.zeros_like(k)
    with counting() as counts:
        ops.accumulate_statistic_(statistic, x, k, dim, spec)
    assert statistic.any(), f"accumulate_statistic_ ('{spec}') left the statistic at zero"
    return counts


def count_step(
    spec: str, shapes: Sequence[Shape], dtype: torch.dtype, factor_dtype: torch.dtype
) -> dict[str, Any]:
    """Count one call of `preconditioned_update_` on layers of these shapes, with K = C = I."""

    def ramps(sign: float) -> list[Tensor]:
        return [
            (sign * torch.linspace(-1, 1, s.d_o * s.d_i)).to(dtype).view(s.d_o, s.d_i)
            for s in shapes
        ]

    def identities(dims: list[int]) -> list[Tensor]:
        return [StructuredMatrix.eye(spec, dim, factor_dtype).data for dim in dims]

    weights, empty = ramps(1), [torch.empty(0) for _ in shapes]
    before = [w.clone() for w in weights]
    skipped = [torch.zeros((), dtype=torch.int64) for _ in shapes]
    K, C = identities([s.d_i for s in shapes]), identities([s.d_o for s in shapes])
    with counting() as counts:
        ops.preconditioned_update_(
            weights, empty, ramps(-1), empty, skipped, ramps(0.5), empty, K, C, spec, spec,
            lr=torch.tensor(0.1), momentum=0.9, weight_decay=0.1,
        )  # fmt: skip
    for shape, old, new in zip(shapes, before, weights, strict=True):
        assert not torch.equal(old, new), (
            f"preconditioned_update_ ('{spec}') left {shape} as it was"
        )
    return counts


def run(options: TrafficOptions, progress: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Count statistic and step of every structure in bfloat16, factors in float32."""
    dtype, factor_dtype = torch.bfloat16, torch.float32
    stack = STACKS[options.preset]
    # Three blocks have more gradients than the cache holds, as all of them have.
    counted = min(3, stack.blocks)
    adamw = adamw_bytes(stack.shapes, dtype) * stack.blocks
    rows = [_adamw_row(options, adamw)]
    for spec in options.structures:
        progress(f"step, {spec}")
        counts = count_step(spec, list(stack.shapes) * counted, dtype, factor_dtype)
        least = least_step_bytes(spec, stack.shapes, dtype, factor_dtype) * stack.blocks
        share = stack.blocks / counted
        rows.append(_row("step", spec, options, counts, share, least, adamw))
        progress(f"statistic, {spec}")
        rows.append(_statistics_row(spec, options, stack, dtype, adamw))
    return rows


def _statistics_row(
    spec: str, options: TrafficOptions, stack: Stack, dtype: torch.dtype, adamw: int
) -> Row:
    """All statistics of a step, over T."""
    dims = [dim for s in stack.shapes for dim in (s.d_i, s.d_o)]
    total: dict[str, int] = {}
    for dim in sorted(set(dims)):
        counts = count_statistic(spec, options.tokens, dim, dtype)
        for key, value in counts["total"].items():
            if isinstance(value, int):
                total[key] = total.get(key, 0) + value * dims.count(dim)
    least = sum(least_statistic_bytes(spec, options.tokens, dim, dtype) for dim in dims)
    share = stack.blocks / options.T
    return _row(
        f"statistics / {options.T}", spec, options, {"total": total}, share, least * share, adamw
    )


def _row(
    name: str,
    spec: str,
    options: TrafficOptions,
    counts: dict[str, Any],
    share: float,
    least: float,
    adamw: int,
) -> Row:
    moved = dram_bytes(counts) * share
    return Row(
        group="traffic",
        name=name,
        labels={"structure": spec, "preset": options.preset, "dtype": "bfloat16"},
        figures={
            "DRAM bytes": Figure(moved, "B", "counted"),
            "over the minimum": Figure(moved / least, "", "counted"),
            "of fused AdamW": Figure(moved / adamw, "", "counted"),
            "sector efficiency": Figure(sector_efficiency(counts), "", "counted"),
            "launches": Figure(counts["total"]["launches"], "", "counted"),
            "time": Figure(moved / options.bandwidth, "s", "implied"),
        },
        spread={},
    )


def _adamw_row(options: TrafficOptions, moved: int) -> Row:
    return Row(
        group="traffic",
        name="step",
        labels={"structure": "fused AdamW", "preset": options.preset, "dtype": "bfloat16"},
        figures={
            "DRAM bytes": Figure(moved, "B", "implied"),
            "of fused AdamW": Figure(1.0, "", "implied"),
            "time": Figure(moved / options.bandwidth, "s", "implied"),
        },
        spread={},
    )
