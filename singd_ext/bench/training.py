"""The optimizer step and the whole training step, of SINGD and of its rivals in one run.

Every optimizer trains its own copy of the same model, on the same batches, by real gradients. The
rivals take turns in rounds (`timing.interleaved`). A sample of SINGD with period T is whole cycles
of one step with an update of the factors and T - 1 steps without, so that the time per step has the
update's share. Where a cycle takes too long, fewer of the steps without are timed and count for
all: such a time is marked as implied. What the hooks of SINGD do during backward is in the training
step alone.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, inf

from . import presets, timing
from .clock import Clock, Span
from .contender import Contender, Setting, check_dtypes, checked_device
from .memory import measure
from .results import (
    BYTES,
    PEAK_MEMORY,
    RATIO,
    RATIO_TO_ADAMW,
    SECONDS,
    STATE,
    TIME,
    Figure,
    Row,
    counted,
    implied,
    measured,
)
from .rivals import ADAMW, PYPI, STRUCTURES, Rival, pair, rivals

Say = Callable[[str], None]

TRAINING_STEP, OPTIMIZER_STEP = "training step", "optimizer step"
LEAST_SAMPLES = 3  # the first warms up, the others have a spread


@dataclass(frozen=True)
class TrainingOptions:
    """What to compare.

    Attributes:
        preset: One of `presets.PRESETS`.
        model: "module:factory" of a model of the user's, instead of the preset.
        small: The preset's network so small that it only shows that everything runs.
        batch: Sequences or images a step, instead of the preset's.
        structures: Of SINGD; "dense/diagonal" has different ones for K and C.
        periods: T, steps from one update of the factors to the next.
        dtypes: Of "fp32", "bf16", "autocast".
        rivals: Of "sgd", "muon", "singd", beside fused AdamW.
        rounds: Samples of each, at least 2.
        steps: Training steps a sample has, rounded up to cycles of T, as far as `seconds` allows.
        seconds: About how long a sample may take; None: a quarter of a second for the preset
            "tiny" and 4 s otherwise.
        device: "cpu", "cuda", "cuda:1".
        seed: Of weights and batches.

    Raises:
        ValueError: For a bad value, naming it.
    """

    preset: str = "tiny"
    model: str | None = None
    small: bool = False
    batch: int | None = None
    structures: tuple[str, ...] = STRUCTURES
    periods: tuple[int, ...] = (1, 10, 50)
    dtypes: tuple[str, ...] = ("fp32",)
    rivals: tuple[str, ...] = ("sgd", "muon", "singd")
    rounds: int = 5
    steps: int = 10
    seconds: float | None = None
    device: str = "cpu"
    seed: int = 0

    @property
    def sample_seconds(self) -> float:
        """About how long a sample may take."""
        if self.seconds is not None:
            return self.seconds
        return 0.25 if self.model is None and self.preset == "tiny" else 4.0

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise ValueError(f"rounds is {self.rounds}; a spread needs at least 2")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}; it must be more than 0")
        if any(T < 1 for T in self.periods) or not self.periods:
            raise ValueError(f"T is {self.periods}; each must be at least 1")
        check_dtypes(self.dtypes)
        for structure in self.structures:
            pair(structure)
        checked_device(self.device)
        if self.model is not None and (self.small or self.batch is not None):
            raise ValueError("small and batch are of the presets: a factory has its own sizes")


@dataclass(frozen=True)
class Plan:
    """What one sample is: cycles of one step that updates the factors and some that do not."""

    cycles: int
    others: int

    @classmethod
    def of(cls, T: int, update: float, other: float, steps: int, seconds: float) -> Plan:
        """Plan for a period, given the seconds of a step with an update of the factors and without.

        The first step of a cycle is never left out.
        """
        cycle = update + (T - 1) * other
        if T == 1 or cycle <= seconds:
            wanted, possible = ceil(steps / T), int(seconds / cycle)
            return cls(max(1, min(wanted, possible)), T - 1)
        return cls(1, min(T - 1, max(1, int((seconds - update) / other))))


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: an optimizer, at one T, and its seconds per step each round."""

    contender: Contender
    T: int
    plan: Plan
    state: Figure
    peak: Figure
    training: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Name, structure and T."""
        rival = self.contender.rival
        return f"{rival.label}, T = {self.T}" if rival.has_period else rival.label

    @property
    def time(self) -> Callable[[float, str], Figure]:
        """The kind of its times."""
        return measured if self.plan.others == self.T - 1 else implied


def _silent(text: str) -> None:
    """Say nothing."""


def run(options: TrainingOptions, progress: Say = _silent, note: Say = _silent) -> list[Row]:
    """Time all optimizers in every dtype.

    Args:
        options: What to compare.
        progress: Told what is being done.
        note: Told what is missing and why, and what else the reader must know.

    Returns:
        Rows of the groups "training step" and "optimizer step".

    Raises:
        AssertionError: If an optimizer left a parameter where it was, or training went wrong; see
            `Contender.check`.
    """
    said: set[str] = set()

    def once(text: str) -> None:
        if text not in said:
            said.add(text)
            note(text)

    with warnings.catch_warnings():
        # PyPI says so where a structure has no code of its own for a product: the time shows it.
        warnings.filterwarnings("ignore", message="Calling naive implementation")
        return [
            row
            for dtype in dict.fromkeys(options.dtypes)
            for row in _compare(dtype, options, progress, once)
        ]


def _compare(dtype: str, options: TrainingOptions, progress: Say, note: Say) -> list[Row]:
    """Time all optimizers in one dtype."""
    gc.collect()  # what is left of another dtype would show in the memory of this one
    title, task = presets.build(
        options.preset, options.model, small=options.small, batch=options.batch, seed=options.seed
    )
    setting = Setting(task, dtype, checked_device(options.device), options.seed)
    note(f"{title}: {task.description}; everything else is frozen")
    trained = [setting.start.get_parameter(name) for name in setting.trained]
    chosen, reasons = rivals(options.rivals, options.structures, trained)
    for reason in reasons:
        note(reason)
    periods = dict.fromkeys(options.periods)
    turns = [(rival, tuple(periods) if rival.has_period else (1,)) for rival in chosen]
    entries = sampled(turns, setting, options, lambda text: progress(f"{dtype}: {text}"), note)
    labels = {"preset": title, "dtype": dtype, "device": options.device}
    base = next(entry for entry in entries if entry.contender.rival.name == ADAMW)
    return [row for entry in entries for row in rows_of(entry, base, labels)]


def sampled(
    turns: Sequence[tuple[Rival, Sequence[int]]],
    setting: Setting,
    options: TrainingOptions,
    progress: Say,
    note: Say,
    limit: float = inf,
) -> list[Entry]:
    """Build the contenders, let them take turns, and check that they all trained.

    Args:
        turns: Optimizers, each with the T of its entries.
        setting: What they train.
        options: Rounds, steps and seconds of the samples.
        progress, note: As of `run`.
        limit: Seconds after which an entry that has the least number of samples sits out, and
            that a single training step of PyPI `singd` may take, or it is left out.
    """
    clock = Clock(setting.device)
    entries: list[Entry] = []
    for rival, periods in turns:
        progress(f"{rival.label}, memory")
        try:
            entries += _entries(rival, periods, setting, options, clock, limit)
        except Exception as error:
            if rival.name != PYPI:
                raise
            note(f"{rival.label}, {setting.dtype}, is absent: {type(error).__name__}: {error}")
    calls = {entry.title: _sample(entry, clock, progress, limit) for entry in entries}
    timing.interleaved(calls, options.rounds, setting.device)
    for entry in entries:
        entry.contender.check()
    return entries


def _entries(
    rival: Rival,
    periods: Sequence[int],
    setting: Setting,
    options: TrainingOptions,
    clock: Clock,
    limit: float,
) -> list[Entry]:
    """Build a contender, measure its memory in steps that update the factors, and plan."""
    with measure(setting.device) as memory:
        contender = Contender(rival, setting)
        contender.steps.begin_cycle(1)
        for _ in range(2):
            seconds = clock.seconds([contender.train_step().whole])
            if rival.name == PYPI and seconds > limit:
                raise TimeoutError(f"a training step takes {seconds:.0f} s; --seconds is too short")
    state = counted(contender.steps.state_bytes(), BYTES)
    peak = measured(memory.peak + setting.frozen_bytes(), BYTES)
    contender.steps.begin_cycle(2)
    update, other = (clock.seconds([contender.train_step().whole]) for _ in range(2))
    return [
        Entry(
            contender,
            T,
            Plan.of(T, update, other, options.steps, options.sample_seconds),
            state,
            peak,
        )
        for T in periods
    ]


def _sample(entry: Entry, clock: Clock, progress: Say, limit: float = inf) -> Callable[[], None]:
    """Return a call that takes one sample and notes the seconds per step."""
    stride = 1 + entry.plan.others
    steps = entry.plan.cycles * stride

    def per_step(spans: list[Span]) -> float:
        updates = spans[::stride]
        others = [span for index, span in enumerate(spans) if index % stride != 0]
        other = clock.seconds(others) if others else 0.0
        return (clock.seconds(updates) + (entry.T - 1) * other) / entry.T

    def call() -> None:
        taken = entry.training
        if len(taken) >= LEAST_SAMPLES and steps * sum(taken) > limit:
            return
        progress(entry.title)
        entry.contender.steps.begin_cycle(entry.T)
        marks = [entry.contender.train_step() for _ in range(steps)]
        entry.training.append(per_step([m.whole for m in marks]))
        entry.optimizer.append(per_step([m.optimizer for m in marks]))

    return call


def rows_of(entry: Entry, base: Entry, labels: dict[str, str]) -> list[Row]:
    """Return the rows of the training step and, where there is an optimizer, of its step."""
    rival = entry.contender.rival
    if rival.has_period:
        labels = labels | {"structure": rival.structure, "T": str(entry.T)}
    figures, spread = _times(entry, entry.training, base.training)
    figures |= {STATE: entry.state} if rival.trains else {}
    figures[PEAK_MEMORY] = entry.peak
    rows = [Row(TRAINING_STEP, rival.name, labels, figures, spread)]
    if rival.trains:
        figures, spread = _times(entry, entry.optimizer, base.optimizer)
        rows.append(Row(OPTIMIZER_STEP, rival.name, labels, figures | {STATE: entry.state}, spread))
    return rows


def _times(
    entry: Entry, samples: list[float], base: list[float]
) -> tuple[dict[str, Figure], dict[str, float]]:
    """Return median and ratio of medians, and their spreads."""
    ratio, ratio_spread = compared(samples, base)
    samples = samples[1:]
    figures = {
        TIME: entry.time(timing.median(samples), SECONDS),
        RATIO_TO_ADAMW: entry.time(ratio, RATIO),
    }
    return figures, {TIME: timing.spread(samples), RATIO_TO_ADAMW: ratio_spread}


def compared(samples: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Return the ratio of the medians over the rounds that both have, and its spread.

    The first turn of each, which warms up, is left out.
    """
    count = min(len(samples), len(base))
    samples, base = samples[1:count], base[1:count]
    return timing.median(samples) / timing.median(base), timing.ratio_spread(samples, base)
