"""`--compare`: which figures of a run differ from an older run by more than their spread."""

from __future__ import annotations

from dataclasses import dataclass

from .results import Figure, Result, Row


@dataclass(frozen=True)
class Change:
    """A figure in two runs.

    Attributes:
        row: The row of the new run.
        figure: Its name.
        old, new: The figure in both.
        noise: The larger spread of the two, 0 for figures without spread.
    """

    row: Row
    figure: str
    old: Figure
    new: Figure
    noise: float

    @property
    def relative(self) -> float:
        """New over old, less 1."""
        if self.old.value == 0:
            return 0.0 if self.new.value == 0 else float("inf")
        return self.new.value / self.old.value - 1

    @property
    def beyond_noise(self) -> bool:
        """Whether the change exceeds the spread; a figure without spread may not change at all."""
        return abs(self.relative) > self.noise


@dataclass(frozen=True)
class Comparison:
    """All that two runs have in common, and what only one of them has.

    Attributes:
        changes: Figures in both.
        gone, added: Figures in the old or the new run only, in words.
        machine: Facts about the machine that differ, in words.
    """

    changes: list[Change]
    gone: list[str]
    added: list[str]
    machine: list[str]

    def beyond_noise(self) -> list[Change]:
        """Return the changes that exceed the spread."""
        return [change for change in self.changes if change.beyond_noise]


def compare(old: Result, new: Result) -> Comparison:
    """Compare two runs figure by figure."""
    before, after = _figures(old), _figures(new)
    changes = [
        Change(row, name, before[key][1], figure, max(_spread(before[key][0], name), noise))
        for key, (row, figure) in after.items()
        if key in before
        for name, noise in [(key[1], _spread(row, key[1]))]
    ]
    facts = sorted(old.machine.keys() | new.machine.keys())
    return Comparison(
        changes,
        [_words(*before[key], key[1]) for key in before if key not in after],
        [_words(*after[key], key[1]) for key in after if key not in before],
        [
            f"{name}: {old.machine.get(name, 'unknown')} -> {new.machine.get(name, 'unknown')}"
            for name in facts
            if old.machine.get(name) != new.machine.get(name)
        ],
    )


def _figures(result: Result) -> dict[tuple[object, str], tuple[Row, Figure]]:
    """By row and name. A figure that changed its unit or its kind is another figure."""
    return {
        ((row.key, figure.unit, figure.kind), name): (row, figure)
        for row in result.rows
        for name, figure in row.figures.items()
    }


def _spread(row: Row, name: str) -> float:
    return row.spread.get(name, 0.0)


def _words(row: Row, figure: Figure, name: str) -> str:
    labels = ", ".join(f"{label} {value}" for label, value in row.labels.items())
    return f"{row.group}: {row.name}{labels and f' ({labels})'}: {name}"
