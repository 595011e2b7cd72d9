"""`--goals`: whether the CPU's speed goals are met on this machine, against fused AdamW and PyPI.

All optimizers train a GPT of four blocks in one interleaved run (`training.sampled`): the step is
timed between real backward passes, where the caches hold what these left there, and every trained
parameter must have moved. What the hooks do during backward is in the training step alone, for both
SINGD packages; so PyPI's optimizer step is what its hooks leave for `step()`: the update of the
factors, the preconditioned gradient and the write.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..structured import canonical_spec
from . import rivals, training
from .contender import Setting, check_dtypes, checked_device
from .presets import GPTSize, Task
from .results import (
    BYTES,
    MEASURED,
    PEAK_MEMORY,
    RATIO,
    STATE,
    YES_NO,
    Figure,
    Row,
    counted,
    given,
    implied,
    measured,
)
from .rivals import ADAMW, OURS, PYPI
from .training import Entry, TrainingOptions, compared

Say = Callable[[str], None]

GROUP, MEMORY = "goals", "memory"
GOAL, MET = "goal", "met"

STEP_10 = "optimizer step, T = 10, over AdamW's"
TRAINING_1 = "training step, T = 1, over AdamW's"
PEAK = "peak memory, T = 1, over AdamW's"
PYPI_STEP_1 = "optimizer step, T = 1, PyPI's over ours"
PYPI_STEP_10 = "optimizer step, T = 10, PyPI's over ours"
PYPI_TRAINING_1 = "training step, T = 1, PyPI's over ours"

# By structure: what the ratios should be. None: no goal, for the reader's information.
GOALS: dict[str, dict[str, float | None]] = {
    "diagonal": {
        STEP_10: 0.8, TRAINING_1: 1.03, PEAK: 1.02, PYPI_STEP_1: 5.0, PYPI_TRAINING_1: None,
    },
    "rank_triu:1": {STEP_10: 1.2, TRAINING_1: 1.05, PEAK: 1.02},
    "block_diagonal:30": {
        STEP_10: 2.0, TRAINING_1: 1.12, PEAK: 1.02, PYPI_STEP_1: 8.0, PYPI_TRAINING_1: None,
    },
    "hierarchical:15,15": {
        STEP_10: 3.0, TRAINING_1: 1.15, PEAK: 1.02, PYPI_STEP_1: 8.0, PYPI_TRAINING_1: None,
    },
    "triu_toeplitz": {
        STEP_10: None, TRAINING_1: 3.0, PEAK: None, PYPI_STEP_1: 50.0, PYPI_TRAINING_1: None,
    },
    "dense": {
        STEP_10: None, TRAINING_1: None, PEAK: None, PYPI_STEP_1: 1.15, PYPI_STEP_10: 1.4,
        PYPI_TRAINING_1: None,
    },
}  # fmt: skip


@dataclass(frozen=True)
class GoalOptions:
    """What to compare.

    Attributes:
        width: Widths of the GPT.
        structures: Of those that have goals.
        dtypes: Of "fp32", "bf16", "autocast".
        rounds: Samples of each optimizer and T, at least 2.
        steps: Training steps of a sample at T = 1; one at T = 10 is ten.
        seconds: About how long a sample may take, and how long all of an optimizer's whose samples
            take longer.
        device: "cpu", "cuda", "cuda:1".
        seed: Of weights and batches.
        small: A network so small that it only shows that everything runs.

    Raises:
        ValueError: For a bad value, naming it.
    """

    width: tuple[int, ...] = (256, 768)
    structures: tuple[str, ...] = tuple(GOALS)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    rounds: int = 15
    steps: int = 5
    seconds: float = 15.0
    device: str = "cpu"
    seed: int = 0
    small: bool = False

    def __post_init__(self) -> None:
        check_dtypes(self.dtypes)
        for width in self.width:
            if width < 4 or width % 4 != 0:
                raise ValueError(f"width is {width}; four heads need a multiple of 4")
        for structure in self.structures:
            if canonical_spec(structure) not in GOALS:
                raise ValueError(f"'{structure}' has no goals; these have: {', '.join(GOALS)}")
        self.training()

    def training(self) -> TrainingOptions:
        """Return how samples are taken."""
        return TrainingOptions(
            rounds=self.rounds, steps=self.steps, seconds=self.seconds, device=self.device
        )

    def task(self, width: int) -> Task:
        """Return the GPT of a width on random tokens."""
        blocks, sequence, batch = (1, 6, 2) if self.small else (4, 64, 8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            size = GPTSize(256, blocks, width, heads=4, sequence=sequence, batch=batch)
            return size.task()


def _silent(text: str) -> None:
    """Say nothing."""


def run(options: GoalOptions, progress: Say = _silent, note: Say = _silent) -> list[Row]:
    """Compare with AdamW and PyPI `singd` at every width and dtype.

    Returns:
        Rows of the goals, of memory, and of the times that the ratios are of.

    Raises:
        AssertionError: If an optimizer left a parameter where it was, or training went wrong; see
            `contender.Contender.check`.
    """
    note(
        "optimizer step is `step()` after a real forward and backward pass, the mean over a period "
        "of T steps; what the hooks of both SINGD packages do during backward is in the training "
        "step alone"
    )
    said: set[str] = set()

    def once(text: str) -> None:
        if text not in said:
            said.add(text)
            note(text)

    rows: list[Row] = []
    with warnings.catch_warnings():
        # PyPI says so where a structure has no code of its own for a product: the time shows it.
        warnings.filterwarnings("ignore", message="Calling naive implementation")
        for width in dict.fromkeys(options.width):
            for dtype in dict.fromkeys(options.dtypes):
                rows += _compare(width, dtype, options, progress, once)
    verdicts = [row.figures[MET].value for row in rows if MET in row.figures]
    note(f"{sum(map(int, verdicts))} of {len(verdicts)} goals are met on this machine")
    return rows


def _compare(width: int, dtype: str, options: GoalOptions, progress: Say, note: Say) -> list[Row]:
    """Measure at one width and in one dtype."""
    gc.collect()  # what is left of another one would show in the memory of this one
    task = options.task(width)
    setting = Setting(task, dtype, checked_device(options.device), options.seed)
    note(f"{task.description}; everything else is frozen")
    trained = [setting.start.get_parameter(name) for name in setting.trained]
    chosen, reasons = rivals.rivals(("singd",), options.structures, trained)
    for reason in reasons:
        note(reason)
    turns = [(r, periods) for r in chosen if (periods := _periods(r.name, r.structure))]
    entries = training.sampled(
        turns,
        setting,
        options.training(),
        lambda text: progress(f"width {width}, {dtype}: {text}"),
        note,
        limit=options.seconds,
    )
    found = {(e.contender.rival.name, e.contender.rival.structure, e.T): e for e in entries}
    where = f"width {width}, {dtype}"
    labels = {"preset": f"width {width}", "dtype": dtype}
    rows = []
    for structure in dict.fromkeys(map(canonical_spec, options.structures)):
        rows += _goal_rows(where, structure, found, labels | {"structure": structure})
    rows += [_memory_row(where, e, found, labels) for e in entries if e.T == 1]
    base = found[ADAMW, "", 1]
    return rows + [row for entry in entries for row in training.rows_of(entry, base, labels)]


def _periods(name: str, structure: str) -> tuple[int, ...]:
    """Return the T at which the goals need an optimizer."""
    if name == OURS:
        return (1, 10)
    if name == PYPI:
        return (1, 10) if PYPI_STEP_10 in GOALS[structure] else (1,)
    return (1,) if name == ADAMW else ()


Found = Mapping[tuple[str, str, int], Entry]


def _ratio(criterion: str, structure: str, found: Found) -> tuple[Figure, float | None] | None:
    """Return a ratio and its spread, or None if PyPI `singd` is absent."""
    T = 10 if criterion in (STEP_10, PYPI_STEP_10) else 1
    ours, adamw = found[OURS, structure, T], found[ADAMW, "", 1]
    if criterion == PEAK:
        return measured(ours.peak.value / adamw.peak.value, RATIO), None
    if criterion in (STEP_10, TRAINING_1):
        over, under = ours, adamw
    elif (PYPI, structure, T) in found:
        over, under = found[PYPI, structure, T], ours
    else:
        return None
    whole = criterion in (TRAINING_1, PYPI_TRAINING_1)
    samples: list[Sequence[float]] = [e.training if whole else e.optimizer for e in (over, under)]
    ratio, spread = compared(samples[0], samples[1])
    kinds = {entry.time(1.0, RATIO).kind for entry in (over, under)}
    return (implied if "implied" in kinds else measured)(ratio, RATIO), spread


def _goal_rows(where: str, structure: str, found: Found, labels: dict[str, str]) -> list[Row]:
    rows = []
    for criterion, goal in GOALS[structure].items():
        ratio = _ratio(criterion, structure, found)
        if ratio is None:
            continue
        figure, noise = ratio
        spread = {} if noise is None else {MEASURED: noise}
        figures = {MEASURED: figure}
        name = criterion
        if goal is not None:
            faster = criterion in (PYPI_STEP_1, PYPI_STEP_10)  # than PyPI: more is better
            name += ", at least" if faster else ", at most"
            met = figure.value >= goal if faster else figure.value <= goal
            figures |= {GOAL: given(goal, RATIO), MET: implied(float(met), YES_NO)}
        rows.append(Row(f"{GROUP}: {where}", name, labels, figures, spread))
    return rows


def _memory_row(where: str, entry: Entry, found: Found, labels: dict[str, str]) -> Row:
    """State between steps and the peak of a training step, beside AdamW's."""
    adamw, rival = found[ADAMW, "", 1], entry.contender.rival
    figures = {
        STATE: counted(entry.state.value, BYTES),
        "state over AdamW's": counted(entry.state.value / adamw.state.value, RATIO),
        PEAK_MEMORY: measured(entry.peak.value, BYTES),
        "peak over AdamW's": measured(entry.peak.value / adamw.peak.value, RATIO),
    }
    labels = labels | ({"structure": rival.structure} if rival.structure else {})
    return Row(f"{MEMORY}: {where}", rival.name, labels, figures)
