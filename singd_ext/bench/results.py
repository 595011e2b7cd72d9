"""What a bench run found: rows of figures, each of which says how it came about.

    measured   by a clock or by an allocator, on this machine
    counted    exact and repeatable: bytes, sectors, launches, state
    implied    computed from figures of both kinds, or from a bandwidth that was given
    given      not found but wanted, or what the paper says

A figure that could not be had is absent, and a note says why. A `Result` is saved as JSON of the
schema in `schema.py`, or as CSV with a line a figure.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import schema

# Names of figures that more than one module reads or writes.
TIME = "time"  # s
RATIO_TO_ADAMW = "ratio to AdamW"  # of medians, 1 for fused AdamW itself
OF_ADAMW = "of fused AdamW"  # of the bytes that a step moves
STATE = "state"  # B, the optimizer's own tensors between steps
PEAK_MEMORY = "peak memory"  # B
MEASURED = "ratio"  # x, beside the goal that is given

# Units. The report brings them to a readable size; a ratio has "x", a bare number none.
SECONDS, BYTES, BYTES_PER_SECOND, FLOP_PER_SECOND = "s", "B", "B/s", "FLOP/s"
RATIO, PERCENT, NUMBER, YES_NO = "x", "%", "", "yes/no"


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        value: Finite, in `unit` (never scaled: seconds, bytes).
        unit: "s", "B", "B/s", "FLOP/s", "%", "x" for a ratio, "yes/no" for 1 and 0, "" for a bare
            number.
        kind: "measured", "counted", "implied" or "given".
    """

    value: float
    unit: str
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in schema.KINDS:
            raise ValueError(f"a figure is one of {schema.KINDS}, not '{self.kind}'")
        if self.unit not in schema.UNITS:
            raise ValueError(f"a figure's unit is one of {schema.UNITS}, not '{self.unit}'")
        if not math.isfinite(self.value):
            raise ValueError(f"a figure must be finite, not {self.value}; leave it out with a note")


def measured(value: float, unit: str) -> Figure:
    """Return a figure by a clock or an allocator."""
    return Figure(value, unit, "measured")


def counted(value: float, unit: str) -> Figure:
    """Return a figure that is exact and repeatable."""
    return Figure(value, unit, "counted")


def implied(value: float, unit: str) -> Figure:
    """Return a figure computed from others."""
    return Figure(value, unit, "implied")


def given(value: float, unit: str) -> Figure:
    """Return a figure that is a goal, or the paper's."""
    return Figure(value, unit, "given")


Key = tuple[str, str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Row:
    """Figures about one thing.

    Attributes:
        group: The table it belongs to, such as "kernels" or "training step".
        name: What it is about, such as an operator or an optimizer.
        labels: Under which circumstances: structure, shape, dtype, preset, T.
        figures: By name.
        spread: Interquartile range over the median, of figures of the same name.
    """

    group: str
    name: str
    labels: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What identifies the row in another run."""
        return self.group, self.name, tuple(sorted(self.labels.items()))


@dataclass
class Result:
    """A whole run.

    Attributes:
        machine: Hardware and software, in words.
        command: The command's arguments.
        rows: In the order in which they are shown.
        notes: What is missing and why, and what the reader must know.
        schema: Version of the JSON.
    """

    machine: dict[str, str]
    command: list[str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    schema: int = schema.VERSION

    def groups(self) -> dict[str, list[Row]]:
        """Return the rows by group, in order."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        return groups

    def save_json(self, path: Path) -> None:
        """Write the run as JSON."""
        data = asdict(self)
        schema.check(data)
        path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")

    def save_csv(self, path: Path) -> None:
        """Write the run as CSV: a line a figure, a column a label."""
        labels = list(dict.fromkeys(name for row in self.rows for name in row.labels))
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["group", "name", *labels, *CSV_COLUMNS])
            for row in self.rows:
                known = [row.labels.get(name, "") for name in labels]
                for name, figure in row.figures.items():
                    spread = row.spread.get(name, "")
                    number = [name, figure.value, figure.unit, figure.kind, spread]
                    writer.writerow([row.group, row.name, *known, *number])


CSV_COLUMNS = ("figure", "value", "unit", "kind", "spread")


def load_json(path: Path) -> Result:
    """Read a run that `Result.save_json` wrote.

    Raises:
        ValueError: If the file is not JSON of the schema; the message names the place.
    """
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        schema.check(data)
    except ValueError as error:
        raise ValueError(f"{path} is not a result of the bench: {error}") from error
    return Result(**(data | {"rows": [_row(row) for row in data["rows"]]}))


def _row(data: Mapping[str, Any]) -> Row:
    figures = {name: Figure(**figure) for name, figure in data["figures"].items()}
    return Row(**(dict(data) | {"figures": figures}))
