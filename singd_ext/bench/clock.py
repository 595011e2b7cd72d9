"""Marks in time, for parts of a call: the host's clock, or events in the stream of a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import torch

Mark = float | torch.cuda.Event
Span = tuple[Mark, Mark]


class Clock:
    """Marks on one device. A mark never waits for the device; `seconds` does."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"

    def mark(self) -> Mark:
        """Return the present moment."""
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, spans: Sequence[Span]) -> float:
        """Return the mean length of spans."""
        return fmean(self._between(start, end) for start, end in spans)

    @staticmethod
    def _between(start: Mark, end: Mark) -> float:
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
