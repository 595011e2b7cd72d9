"""How much memory PyTorch's allocators hand out while something runs."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Memory:
    """Bytes in use above those in use before: the most, and at the end."""

    peak: int = 0
    end: int = 0


@contextmanager
def measure(device: torch.device) -> Iterator[Memory]:
    """Measure a block; the result is filled in at its end.

    On CUDA by the allocator's statistics. On CPU by the profiler's record of every allocation of a
    tensor: what a kernel allocates by other means (a few rows of scratch) is not seen.
    """
    gc.collect()  # what was dropped before would be freed in the block, and be taken from its peak
    memory = Memory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield memory
        torch.cuda.synchronize(device)
        memory.peak = torch.cuda.max_memory_allocated(device) - before
        memory.end = torch.cuda.memory_allocated(device) - before
        return
    quiet_profiler()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield memory
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        memory.end += event.nbytes()
        memory.peak = max(memory.peak, memory.end)


def quiet_profiler() -> None:
    """Keep the profiler's log of its own stages off the terminal."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
