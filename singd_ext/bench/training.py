"""The optimizer step and the whole training step, of SINGD and of its rivals in one run.

Every optimizer trains its own copy of the same model, on the same batches, by real gradients. The
rivals take turns in rounds (`timing.interleaved`). A sample of SINGD with period T is whole cycles
of one step with an update of the factors and T - 1 steps without, so that the time per step has the
update's share. What the hooks of SINGD do during backward is in the training step alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil

from . import presets, timing
from .clock import Clock
from .contender import DTYPES, Contender, Setting, checked_device
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
    measured,
)
from .rivals import ADAMW, STRUCTURES, Rival, pair, rivals

Say = Callable[[str], None]

TRAINING_STEP, OPTIMIZER_STEP = "training step", "optimizer step"


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
        steps: Training steps a sample has at least; whole cycles of T.
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
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise ValueError(f"rounds is {self.rounds}; a spread needs at least 2")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")
        if any(T < 1 for T in self.periods) or not self.periods:
            raise ValueError(f"T is {self.periods}; each must be at least 1")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ValueError(f"dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}")
        for structure in self.structures:
            pair(structure)
        checked_device(self.device)
        if self.model is not None and (self.small or self.batch is not None):
            raise ValueError("small and batch are of the presets: a factory has its own sizes")


@dataclass
class Samples:
    """Seconds per step of one optimizer at one T, a number a round."""

    training: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """One line of the comparison."""

    contender: Contender
    T: int
    state: Figure
    peak: Figure
    samples: Samples = field(default_factory=Samples)

    @property
    def title(self) -> str:
        """Name, structure and T."""
        rival = self.contender.rival
        return f"{rival.label}, T = {self.T}" if rival.has_period else rival.label


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
    with warnings.catch_warnings():
        # PyPI says so where a structure has no code of its own for a product: the time shows it.
        warnings.filterwarnings("ignore", message="Calling naive implementation")
        return [row for dtype in options.dtypes for row in _compare(dtype, options, progress, note)]


def _compare(dtype: str, options: TrainingOptions, progress: Say, note: Say) -> list[Row]:
    """Time all optimizers in one dtype."""
    title, task = presets.build(
        options.preset, options.model, small=options.small, batch=options.batch, seed=options.seed
    )
    setting = Setting(task, dtype, checked_device(options.device), options.seed)
    note(f"{title}: {task.description}; everything else is frozen")
    shapes = [setting.start.get_parameter(name).shape for name in setting.trained]
    chosen, reasons = rivals(options.rivals, options.structures, shapes)
    for reason in reasons:
        note(reason)
    entries = _sampled(chosen, setting, options, lambda text: progress(f"{dtype}: {text}"))
    labels = {"preset": title, "dtype": dtype, "device": options.device}
    base = next(entry for entry in entries if entry.contender.rival.name == ADAMW)
    return [row for entry in entries for row in _rows(entry, base, labels)]


def _sampled(
    chosen: Sequence[Rival], setting: Setting, options: TrainingOptions, progress: Say
) -> list[Entry]:
    """Build the contenders, let them take turns, and check that they all trained."""
    entries: list[Entry] = []
    for rival in chosen:
        progress(f"{rival.label}, memory")
        contender, state, peak = _built(rival, setting)
        for T in options.periods if rival.has_period else (1,):
            entries.append(Entry(contender, T, state, peak))
    clock = Clock(setting.device)
    calls = {e.title: _sample(e, clock, options.steps, progress) for e in entries}
    timing.interleaved(calls, options.rounds, setting.device)
    for entry in entries:
        entry.contender.check()
    return entries


def _built(rival: Rival, setting: Setting) -> tuple[Contender, Figure, Figure]:
    """Build a contender and make two steps that update the factors.

    Returns:
        It, the bytes of its optimizer's state, and the peak bytes of training with it alone.
    """
    with measure(setting.device) as memory:
        contender = Contender(rival, setting)
        contender.steps.begin_cycle(1)
        for _ in range(2):
            contender.train_step()
    state = counted(contender.steps.state_bytes(), BYTES)
    return contender, state, measured(memory.peak + setting.frozen_bytes(), BYTES)


def _sample(entry: Entry, clock: Clock, steps: int, progress: Say) -> Callable[[], None]:
    """Return a call that makes whole cycles of T steps and notes the seconds per step."""
    cycles = ceil(steps / entry.T)

    def call() -> None:
        progress(entry.title)
        entry.contender.steps.begin_cycle(entry.T)
        start = clock.mark()
        parts = [entry.contender.train_step() for _ in range(cycles * entry.T)]
        end = clock.mark()
        entry.samples.training.append(clock.seconds([(start, end)]) / len(parts))
        entry.samples.optimizer.append(clock.seconds(parts) / len(parts))

    return call


def _rows(entry: Entry, base: Entry, labels: dict[str, str]) -> list[Row]:
    """Return the rows of the training step and, where there is an optimizer, of its step."""
    rival = entry.contender.rival
    if rival.has_period:
        labels = labels | {"structure": rival.structure, "T": str(entry.T)}
    rows = []
    for group, samples, of_base in (
        (TRAINING_STEP, entry.samples.training, base.samples.training),
        (OPTIMIZER_STEP, entry.samples.optimizer, base.samples.optimizer),
    ):
        if group == OPTIMIZER_STEP and not rival.trains:
            continue
        # The first turn of each warms up.
        samples, of_base = samples[1:], of_base[1:]
        figures = {TIME: measured(timing.median(samples), SECONDS)}
        spread = {TIME: timing.spread(samples)}
        figures[RATIO_TO_ADAMW] = measured(timing.median(samples) / timing.median(of_base), RATIO)
        spread[RATIO_TO_ADAMW] = timing.ratio_spread(samples, of_base)
        if rival.trains:
            figures[STATE] = entry.state
        if group == TRAINING_STEP:
            figures[PEAK_MEMORY] = entry.peak
        rows.append(Row(group, rival.name, labels, figures, spread))
    return rows
