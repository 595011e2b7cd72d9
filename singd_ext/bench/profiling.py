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

from .. import ops
from . import presets, timing
from .clock import Clock, Mark
from .contender import Contender, Setting, check_dtypes, checked_device
from .memory import quiet_profiler
from .results import NUMBER, PERCENT, SECONDS, TIME, Row, counted, measured
from .rivals import ours, pair

Say = Callable[[str], None]

GROUP, WHOLE, REST = "profile", "training step", "rest"
# What a phase is called, and the operator that is its phase. A phase inside another is not counted
# as part of that one.
OPERATORS = {
    "statistic": "accumulate_statistic_",
    "factor update": "update_factors_",
    "parameter update": "preconditioned_update_",
}
PHASES = ("forward", "backward", "statistic", "step", "factor update", "parameter update")


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
    """Let the operators of `OPERATORS` run in ranges.

    Those of layers are called from C++. So all are exchanged for operators of another namespace,
    whose kernels are in Python, as the emulator exchanges them for its own.
    """
    before = ops._ops

    def inside(phase: str, operator: torch._ops.OpOverload) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            with ranges(phase):
                operator(*args, **kwargs)

        return call

    with torch.library._scoped_library("singd_profiled", "DEF") as own:
        for phase, name in OPERATORS.items():
            operator = getattr(before, name).default
            own.define(str(operator._schema).removeprefix(f"{before.name}::"))
            own.impl(name, inside(phase, operator), "CompositeExplicitAutograd")
        ops._ops = torch.ops.singd_profiled
        try:
            yield
        finally:
            ops._ops = before


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
    for dtype in dict.fromkeys(options.dtypes):
        title, task = presets.build(
            options.preset, options.model, small=options.small, batch=options.batch,
            seed=options.seed,
        )  # fmt: skip
        setting = Setting(task, dtype, checked_device(options.device), options.seed)
        if not rows:
            note(f"{title}: {task.description}; everything else is frozen")
            note("a phase excludes the phases inside it; times are per step, without the profiler")
            note("step: what is in none of the others, such as K Kᵀ of dense factors, kept for T")
        for rival in ours(options.structures):
            contender = Contender(rival, setting)
            for T in dict.fromkeys(options.periods):
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


def _table(
    contender: Contender, T: int, rounds: int, clock: Clock, labels: dict[str, str]
) -> list[Row]:
    """Time cycles of T steps by phase."""
    samples: dict[str, list[float]] = {phase: [] for phase in (*PHASES, REST, WHOLE)}
    calls: dict[str, int] = {}
    for _ in range(1 + rounds):  # the first one warms up
        ranges = Ranges(clock)
        contender.steps.begin_cycle(T)
        with wrapped(ranges):
            marks = [contender.train_step(ranges) for _ in range(T)]
        seconds, calls = ranges.exclusive_seconds(), ranges.calls()
        whole = clock.seconds([m.whole for m in marks])
        for phase in PHASES:
            samples[phase].append(seconds.get(phase, 0.0) / T)
        samples[REST].append(whole - sum(samples[phase][-1] for phase in PHASES))
        samples[WHOLE].append(whole)
    contender.check()
    medians = {phase: timing.median(times[1:]) for phase, times in samples.items()}
    return [
        Row(
            GROUP,
            phase,
            labels,
            {
                TIME: measured(medians[phase], SECONDS),
                "share": measured(100 * (medians[phase] / medians[WHOLE]), PERCENT),
                "calls": counted(calls.get(phase, T) / T, NUMBER),
            },
            {TIME: timing.spread(times[1:])},
        )
        for phase, times in samples.items()
        if medians[phase] > 0
    ]


def _write_trace(path: Path, profiled: Sequence[tuple[str, Contender, int]]) -> None:
    """Write a trace of a step with an update of the factors and, if T > 1, of one without."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    quiet_profiler()
    with profile(activities=activities) as record, wrapped(record_function):
        for label, contender, T in profiled:
            contender.steps.begin_cycle(T)
            with record_function(label):
                for _ in range(min(T, 2)):
                    contender.train_step(record_function)
    record.export_chrome_trace(str(path))
