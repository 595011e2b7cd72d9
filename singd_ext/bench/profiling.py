"""`--profile`: where a training step with SINGD spends its time.

Ranges are put around the parts of a step from outside, by wrapping the functions that do them while
the profile is taken. The table is from steps without a profiler, which would slow them down; the
trace is from further steps with one, whose times are larger.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .. import curvature, ops
from . import presets, timing
from .clock import Clock, Mark, Span
from .contender import Contender, Setting, check_dtypes, checked_device
from .memory import quiet_profiler
from .results import COUNT, SECONDS, TIME, Row, counted, measured
from .rivals import pair, rivals

Say = Callable[[str], None]

GROUP, WHOLE, REST = "profile", "training step", "rest"
# What a phase is called, and the function that is wrapped. A phase inside another is not counted
# as part of that one.
WRAPPED: dict[str, tuple[Any, str]] = {
    "hook": (curvature, "_accumulate"),
    "statistic": (ops, "accumulate_statistic_"),
    "factor update": (ops, "update_factors_"),
    "parameter update": (ops, "preconditioned_update_"),
}
PHASES = ("forward", "backward", "hook", "statistic", "step", "factor update", "parameter update")


@dataclass(frozen=True)
class ProfilingOptions:
    """What to profile: every combination of structure, T and dtype.

    Attributes:
        trace: File of the trace, for chrome://tracing or Perfetto. None: no trace.
        rounds: Cycles of T steps that are timed, at least 2.
        preset, model, small, batch, structures, periods, dtypes, device, seed: As of
            `training.TrainingOptions`.

    Raises:
        ValueError: For a bad value, naming it.
    """

    trace: Path | None = None
    preset: str = "tiny"
    model: str | None = None
    small: bool = False
    batch: int | None = None
    structures: tuple[str, ...] = ("hierarchical:16,16",)
    periods: tuple[int, ...] = (10,)
    dtypes: tuple[str, ...] = ("fp32",)
    rounds: int = 5
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise ValueError(f"rounds is {self.rounds}; a spread needs at least 2")
        if any(T < 1 for T in self.periods):
            raise ValueError(f"T is {self.periods}; each must be at least 1")
        check_dtypes(self.dtypes)
        for structure in self.structures:
            pair(structure)
        checked_device(self.device)
        if self.trace is not None and not self.trace.absolute().parent.is_dir():
            raise ValueError(f"trace: there is no folder {self.trace.absolute().parent}")


@dataclass
class _Span:
    phase: str
    parent: str
    start: Mark
    end: Mark


@dataclass
class Ranges:
    """Named ranges that may lie in each other; each also shows in a trace.

    One stack is enough: where hooks run in a thread of their own, the main thread waits for it.
    """

    clock: Clock
    spans: list[_Span] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Mark a range."""
        parent = self._open[-1] if self._open else ""
        self._open.append(phase)
        with record_function(phase):
            start = self.clock.mark()
            try:
                yield
            finally:
                self.spans.append(_Span(phase, parent, start, self.clock.mark()))
                self._open.pop()

    def exclusive_seconds(self) -> dict[str, float]:
        """Return the time of each phase without the phases inside it."""
        seconds: dict[str, float] = defaultdict(float)
        for span in self.spans:
            length = self.clock.seconds([(span.start, span.end)])
            seconds[span.phase] += length
            seconds[span.parent] -= length
        del seconds[""]
        return seconds

    def calls(self) -> dict[str, int]:
        """Return how often each phase was entered."""
        return {phase: sum(s.phase == phase for s in self.spans) for phase in PHASES}


@contextmanager
def wrapped(ranges: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
    """Let the functions of `WRAPPED` run in ranges."""
    before = {phase: getattr(owner, name) for phase, (owner, name) in WRAPPED.items()}

    def inside(phase: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with ranges(phase):
                return before[phase](*args, **kwargs)

        return call

    for phase, (owner, name) in WRAPPED.items():
        setattr(owner, name, inside(phase))
    try:
        yield
    finally:
        for phase, (owner, name) in WRAPPED.items():
            setattr(owner, name, before[phase])


def run(
    options: ProfilingOptions, progress: Say = lambda _: None, note: Say = lambda _: None
) -> list[Row]:
    """Profile, and write the trace.

    Args:
        options: What to profile.
        progress: Told what is being done.
        note: Told what the reader must know.

    Returns:
        Rows of the group "profile", one a phase.
    """
    rows: list[Row] = []
    profiled: list[tuple[str, Contender, int]] = []
    for dtype in options.dtypes:
        title, task = presets.build(
            options.preset, options.model, small=options.small, batch=options.batch,
            seed=options.seed,
        )  # fmt: skip
        setting = Setting(task, dtype, checked_device(options.device), options.seed)
        if not rows:
            note(f"{title}: {task.description}; everything else is frozen")
            note("the phases exclude the phases inside them; times are per step, without profiler")
        _, *chosen = [r for r in rivals((), options.structures, ())[0] if r.has_period or False]
        for rival in chosen:
            contender = Contender(rival, setting)
            for T in options.periods:
                label = f"{dtype}: {rival.label}, T = {T}"
                progress(label)
                labels = {
                    "preset": title, "dtype": dtype, "device": options.device,
                    "structure": rival.structure, "T": str(T),
                }  # fmt: skip
                rows += _table(contender, T, options.rounds, Clock(setting.device), labels)
                profiled.append((label, contender, T))
    if options.trace is not None:
        progress(f"trace, {options.trace}")
        _write_trace(options.trace, profiled)
        note(f"the trace of a step with an update and one without is in {options.trace}")
    return rows
