"""What a run looks like: tables by rich on a terminal, plain text elsewhere; and its progress.

Every column says whether its figures are measured, counted or implied; a figure of another kind
than its column is marked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, TextIO

from .compare import Change, Comparison
from .results import Figure, Result, Row

_SCALES: dict[str, Sequence[tuple[float, str]]] = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")),
    "B": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")),
    "B/s": ((1e9, "GB/s"), (1e6, "MB/s")),
    "FLOP/s": ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")),
}
LEGEND = (
    "measured: by a clock or an allocator, on this machine. counted: exact and repeatable. "
    "implied: computed from other figures or from a given bandwidth. "
    "given: a goal, or the paper's. "
    "±: interquartile range over the median."
)


def text_of(figure: Figure, spread: float | None = None) -> str:
    """Return a figure in a readable unit, with its spread."""
    noise = "" if spread is None else f" ±{100 * spread:.0f}%"
    value, unit = figure.value, figure.unit
    if unit == "yes/no":
        return "yes" if value else "no"
    for size, scaled in _SCALES.get(unit, ()):
        if abs(value) >= size or size == _SCALES[unit][-1][0]:
            return f"{_digits(value / size)} {scaled}{noise}"
    if unit == "" and value == int(value):
        return f"{int(value):,}{noise}"
    return f"{_digits(value)}{unit and ' '}{unit}{noise}"


def _digits(value: float) -> str:
    """Three significant digits, or all of the integer part."""
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


Table = tuple[str, list[str], list[list[str]], int]
"""Title, headings, cells, and how many columns are words."""


def table_of(group: str, rows: Sequence[Row]) -> Table:
    """Return a group of rows as a table; a figure that a row lacks is a dash.

    Labels that all rows share are in the title.
    """
    labels = list(dict.fromkeys(label for row in rows for label in row.labels))
    common = [label for label in labels if len({row.labels.get(label) for row in rows}) == 1]
    title = ", ".join([group, *_missing(group, [rows[0].labels[label] for label in common])])
    labels = [label for label in labels if label not in common]
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    kinds = {name: [r.figures[name].kind for r in rows if name in r.figures] for name in names}
    usual = {name: max(kinds[name], key=kinds[name].count) for name in names}

    def cell(row: Row, name: str) -> str:
        if name not in row.figures:
            return "-"
        figure = row.figures[name]
        mark = f" ({figure.kind})" if figure.kind != usual[name] else ""
        return text_of(figure, row.spread.get(name)) + mark

    headings = ["", *labels]
    headings += [f"{name}\n{usual[name]}" for name in names]
    cells = [
        [row.name, *(row.labels.get(label, "") for label in labels), *(cell(row, n) for n in names)]
        for row in rows
    ]
    return title, headings, cells, 1 + len(labels)


def _missing(title: str, words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in title]


def table_of_changes(changes: Sequence[Change]) -> Table:
    """Return figures that changed as a table."""
    cells = [
        [
            f"{change.row.group}: {change.row.name}",
            ", ".join(change.row.labels.values()),
            change.figure,
            text_of(change.old),
            text_of(change.new),
            f"{100 * change.relative:+.1f}%",
            f"±{100 * change.noise:.1f}%",
            change.new.kind,
        ]
        for change in changes
    ]
    headings = ["", "of", "figure", "old", "new", "change", "spread", ""]
    return "changes beyond the spread", headings, cells, 3


def show(result: Result, stream: TextIO | None = None) -> None:
    """Print machine, tables and notes."""
    write = _Writer(stream or sys.stdout)
    for name, fact in result.machine.items():
        write.line(f"{name}: {fact}")
    for group, rows in result.groups().items():
        write.table(table_of(group, rows))
    write.line("")
    for note in result.notes:
        write.line(f"Note: {note}.")
    if result.rows:
        write.line(LEGEND)


def show_comparison(comparison: Comparison, stream: TextIO | None = None) -> None:
    """Print what changed beyond the spread."""
    write = _Writer(stream or sys.stdout)
    if comparison.machine:
        write.line("The machine differs: " + "; ".join(comparison.machine))
    changes = comparison.beyond_noise()
    if changes:
        write.table(table_of_changes(changes))
    write.line(
        f"{len(changes)} of {len(comparison.changes)} figures changed beyond the spread; "
        f"{len(comparison.gone)} are gone, {len(comparison.added)} are new."
    )
    for word, names in (("Gone", comparison.gone), ("New", comparison.added)):
        for name in names:
            write.line(f"{word}: {name}")


class _Writer:
    """Prints by rich if it is installed and `stream` is a terminal, else as plain text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console: Any = None
        if stream.isatty() and find_spec("rich"):
            from rich.console import Console

            self._console = Console(file=stream, highlight=False)

    def line(self, text: str) -> None:
        if self._console:
            self._console.print(text, markup=False)
        else:
            print(text, file=self._stream)

    def table(self, table: Table) -> None:
        if self._console:
            self._console.print(_rich_table(table))
        else:
            print("\n" + _plain_table(table), file=self._stream)


def _rich_table(table: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    title, headings, cells, words = table
    style = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "title_justify": "left"}
    rich_table = RichTable(title=title, pad_edge=False, **style)  # type: ignore[arg-type]
    for index, heading in enumerate(headings):
        if index < words:
            rich_table.add_column(Text(heading), no_wrap=True)
        else:
            rich_table.add_column(Text(heading), justify="right", overflow="fold")
    names = [row[0] for row in cells]
    grouped = any(one == other for one, other in pairwise(names))
    for row, next_name in zip(cells, [*names[1:], None], strict=True):
        rich_table.add_row(*map(Text, row), end_section=grouped and row[0] != next_name)
    return rich_table


def _plain_table(table: Table) -> str:
    title, headings, cells, words = table
    lines = [heading.split("\n") for heading in headings]
    height = max(map(len, lines))
    top = [[line[i] if i < len(line) else "" for line in lines] for i in range(height)]
    rows = [row for row in top if any(row)] + cells
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def aligned(row: Sequence[str]) -> str:
        columns = zip(row, widths, range(len(row)), strict=True)
        return "  ".join(c.ljust(w) if i < words else c.rjust(w) for c, w, i in columns).rstrip()

    return "\n".join([title, *map(aligned, rows)])


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what is being done: a bar on a terminal, else lines of text.

    A message "[3/40] words" fills the bar; one without a count leaves it moving to and fro.
    """
    stream = stream or sys.stderr
    if not (stream.isatty() and find_spec("rich")):
        yield lambda message: print(f"... {message}", file=stream, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show_message(message: str) -> None:
            count = re.match(r"\[(\d+)/(\d+)\]", message)
            done, total = map(int, count.groups()) if count else (0, None)
            bar.update(task, description=message, completed=max(done - 1, 0), total=total)

        yield show_message
