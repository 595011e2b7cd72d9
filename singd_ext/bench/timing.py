"""Clocks: rivals in interleaved rounds, and short kernels.

Rivals run in one process, in rounds in which each has one turn, in an order drawn anew each round:
a machine that slows down slows all of them, and none always follows the same other.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle

import torch
from torch.utils.benchmark import Timer

Call = Callable[[], object]

# The buffers of a kernel are together so many times as large as a GPU's L2 cache, so that what a
# call reads was last touched long ago; more buffers than MOST_COPIES make no difference, since
# something so large is also read before every call.
BEYOND_L2 = 2
MOST_COPIES = 16
# A sample on the CPU lasts at least so long, in seconds: a thousand times the clock's resolution.
SAMPLE_SECONDS = 1e-3


def interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    device: torch.device | str,
    before: Call | None = None,
) -> dict[str, list[float]]:
    """Time whole steps: one call a turn, after one untimed call of each.

    On CUDA by events, with the device synchronised once a round only, so that the host may run
    ahead as in a training loop.

    A call must do the same work each time. Of an optimizer that does more in every T-th step, time
    these steps as another name's, or T steps in one call.

    Args:
        calls: By name.
        rounds: Samples of each.
        device: Where they run.
        before: Called, untimed, before each of them.

    Returns:
        Seconds per call, one for each round, by name.
    """
    one_round = _cuda_round if torch.device(device).type == "cuda" else _cpu_round
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for order in _orders(calls, rounds):
        for name, seconds in one_round({name: calls[name] for name in order}, before).items():
            samples[name].append(seconds)
    return samples


def kernels(
    calls: Mapping[str, Sequence[Call]], rounds: int, device: torch.device | str
) -> dict[str, list[float]]:
    """Time short calls, in interleaved rounds.

    On CPU by `torch.utils.benchmark`, as many calls a sample as a millisecond needs: operands that
    fit into a cache are there. On CUDA by events around one call, with a cold cache: buffers take
    turns, and before each call, outside the events, a larger one is read, which also lets the host
    run ahead, so that launches are not waited for.

    Args:
        calls: By name, the same call on so many buffers as `copies` says.
        rounds: Samples of each.
        device: Where they run.

    Returns:
        Seconds per call, one for each round, by name.
    """
    turns = {name: _take_turns(list(same)) for name, same in calls.items()}
    if torch.device(device).type == "cuda":
        other = torch.zeros(4 * BEYOND_L2 * _l2_bytes(device), dtype=torch.uint8, device=device)
        return interleaved(turns, rounds, device, before=other.max)
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        for name, call in turns.items()
    }
    numbers = {name: _calls_per_sample(call) for name, call in turns.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for order in _orders(calls, rounds):
        for name in order:
            # timeit warms up by itself, since the rival's turn has filled the caches.
            samples[name].append(timers[name].timeit(numbers[name]).median)
    return samples


def copies(nbytes: int, device: torch.device | str) -> int:
    """Return on how many buffers of so many bytes a kernel is called: 1 on CPU."""
    if torch.device(device).type != "cuda":
        return 1
    return min(MOST_COPIES, 2 + BEYOND_L2 * _l2_bytes(device) // max(nbytes, 1))


def median(samples: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(samples)


def spread(samples: Sequence[float]) -> float:
    """Return the interquartile range over the median, of at least two samples."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def ratio_spread(samples: Sequence[float], base: Sequence[float]) -> float:
    """Return the spread of the ratios within the rounds, in which a slow machine cancels."""
    return spread([ours / theirs for ours, theirs in zip(samples, base, strict=True)])


def _orders(calls: Mapping[str, object], rounds: int) -> Iterator[list[str]]:
    """An order for each round, the same in every run."""
    generator = random.Random(0)
    for _ in range(rounds):
        yield generator.sample(list(calls), len(calls))


def _cpu_round(calls: Mapping[str, Call], before: Call | None) -> dict[str, float]:
    seconds = {}
    for name, call in calls.items():
        if before:
            before()
        start = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - start
    return seconds


def _cuda_round(calls: Mapping[str, Call], before: Call | None) -> dict[str, float]:
    torch.cuda.synchronize()
    marks = {}
    for name, call in calls.items():
        if before:
            before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        marks[name] = start, end
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in marks.items()}


def _l2_bytes(device: torch.device | str) -> int:
    return torch.cuda.get_device_properties(torch.device(device)).L2_cache_size


def _take_turns(calls: list[Call]) -> Call:
    turns = cycle(calls)
    return lambda: next(turns)()


def _calls_per_sample(call: Call) -> int:
    call()
    start = time.perf_counter()
    call()
    return max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))
