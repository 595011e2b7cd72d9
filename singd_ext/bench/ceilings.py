"""The two ceilings of a machine, measured: how fast it copies, and how fast it multiplies matrices.

An operator cannot be faster than its least bytes at the first and its products at the second.
Operands that fit into a cache of a CPU may exceed the first, which is that of memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from . import timing
from .results import (
    BYTES_PER_SECOND,
    FLOP_PER_SECOND,
    Figure,
    Row,
    measured,
)

GROUP = "ceilings"


@dataclass(frozen=True)
class Ceilings:
    """Rates in bytes per second, and in floating-point operations per second by dtype."""

    copy: float
    product: Mapping[str, float]
    rows: Sequence[Row]


def measure(
    device: torch.device, dtypes: Sequence[torch.dtype], rounds: int, small: bool = False
) -> Ceilings:
    """Measure both ceilings; `small` takes operands that only show that it runs."""
    copy = _copy(device, rounds, small)
    rows = [copy]
    rates = {}
    for dtype in dtypes:
        row = _product(device, dtype, rounds, small)
        rows.append(row)
        rates[row.labels["dtype"]] = row.figures["rate"].value
    return Ceilings(copy.figures["rate"].value, rates, rows)


def _copy(device: torch.device, rounds: int, small: bool) -> Row:
    """A copy far larger than a cache: a byte copied is a byte read and a byte written."""
    size = (1 << 20) if small else (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _row(
        "copy", {"shape": f"{size >> 20} MiB"}, lambda: target.copy_(source), 2 * size,
        BYTES_PER_SECOND, device, rounds,
    )  # fmt: skip


def _product(device: torch.device, dtype: torch.dtype, rounds: int, small: bool) -> Row:
    """A square product: 2 n³ operations."""
    n = 128 if small else 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    labels = {"shape": f"{n} x {n} x {n}", "dtype": str(dtype).removeprefix("torch.")}
    return _row(
        "matrix product", labels, lambda: torch.mm(a, b, out=out), 2 * n**3,
        FLOP_PER_SECOND, device, rounds,
    )  # fmt: skip


def _row(
    name: str,
    labels: dict[str, str],
    call: timing.Call,
    work: int,
    unit: str,
    device: torch.device,
    rounds: int,
) -> Row:
    samples = timing.kernels({name: [call]}, rounds, device)[name]
    seconds, spread = timing.median(samples), timing.spread(samples)
    figures: dict[str, Figure] = {
        "time": measured(seconds, "s"),
        "rate": measured(work / seconds, unit),
    }
    return Row(GROUP, name, labels, figures, {"time": spread, "rate": spread})
