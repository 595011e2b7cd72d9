"""`--plot`: one PNG of what a run has: roofline, ratios to AdamW, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import ceilings, goals, kernels, profiling, rivals, scaling
from .results import MEASURED, OF_ADAMW, PEAK_MEMORY, RATIO_TO_ADAMW, STATE, TIME, Result, Row

Panel = Callable[[Any], None]
COLOURS = ("#3b6ea8", "#d98032", "#5a9a5a", "#a85a8c", "#b8a23a", "#5f6f7f")
RIVAL_COLOURS = {rivals.OURS: COLOURS[0], rivals.PYPI: COLOURS[1]}
OTHER_COLOUR = "#8f8f8f"


def require() -> None:
    """Raise ImportError, saying what to install, if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'singd_ext[bench]'")


def save(result: Result, path: Path) -> None:
    """Draw the panels that the run has figures for.

    Raises:
        ValueError: If there is nothing to draw.
    """
    require()
    from matplotlib.figure import Figure

    panels = _panels(result)
    if not panels:
        raise ValueError("--plot: the run has no figures to draw")
    columns = 3 if any(g.startswith(scaling.GROUP) for g in result.groups()) else 2
    columns = min(columns, len(panels))
    heights = [
        max(height for height, _ in panels[i : i + columns]) for i in range(0, len(panels), columns)
    ]
    figure = Figure(
        figsize=((8 if columns < 3 else 5) * columns, sum(heights) + 0.4), layout="constrained"
    )
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).flat
    for axis, (_, draw) in zip(axes, panels, strict=False):
        draw(axis)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    words = (result.machine.get(name, "") for name in ("device", "processor", "torch"))
    device, processor, torch_version = words
    hardware = processor if device == "CPU" else device
    figure.suptitle(f"{hardware}; torch {torch_version}", fontsize=9)
    figure.savefig(path, dpi=150)


def _panels(result: Result) -> list[tuple[float, Panel]]:
    """Heights in inches, and functions that draw."""
    panels: list[tuple[float, Panel]] = []
    operators = [row for row in result.rows if row.group.startswith(kernels.GROUP)]
    dots = [row for row in operators if "products" in row.figures]
    limits = [row for row in result.rows if row.group == ceilings.GROUP]
    if dots:
        panels.append((5.5, lambda axis: _roofline(axis, dots, limits)))
    drawn = set()
    for group, rows in result.groups().items():
        if group.startswith(scaling.GROUP):
            if group != scaling.EXPONENTS:
                panels.append((4.2, _growth(group, rows)))
            continue
        if group.startswith(goals.GROUP):
            panels.append((1.2 + 0.3 * len(rows), _goals(group, rows)))
            continue
        for name, unit, scale in (
            (RATIO_TO_ADAMW, "time over fused AdamW's (1 = as fast)", 1.0),
            (STATE, "optimizer state, MiB", 2.0**20),
            (PEAK_MEMORY, "peak memory, MiB", 2.0**20),
            (TIME, "ms a step", 1e-3),
            (OF_ADAMW, "bytes moved, over fused AdamW's", 1.0),
        ):
            bars = [row for row in rows if name in row.figures]
            if name == TIME and group != profiling.GROUP:
                continue
            if bars and (name != STATE or name not in drawn):  # the state is that of all groups
                drawn.add(name)
                panels.append((1.2 + 0.22 * len(bars), _bars(group, bars, name, unit, scale)))
    return panels


def _bars(group: str, rows: Sequence[Row], name: str, unit: str, scale: float) -> Panel:
    def draw(axis: Any) -> None:
        varying = [
            label
            for label in dict.fromkeys(label for row in rows for label in row.labels)
            if len({row.labels.get(label) for row in rows}) > 1
        ]
        texts = [
            ", ".join([row.name, *(_label(row, v) for v in varying if row.labels.get(v))])
            for row in rows
        ]
        values = [row.figures[name].value / scale for row in rows]
        errors = [v * row.spread.get(name, 0) / 2 for v, row in zip(values, rows, strict=True)]
        logarithmic = max(values) > 20 * min(values) > 0
        base = 1.0 if logarithmic and name in (RATIO_TO_ADAMW, OF_ADAMW) else 0.0
        colours = [RIVAL_COLOURS.get(row.name, OTHER_COLOUR) for row in rows]
        widths = [value - base for value in values]
        axis.barh(range(len(rows)), widths, left=base, xerr=errors, color=colours, height=0.7)
        for index, (value, error) in enumerate(zip(values, errors, strict=True)):
            axis.text(max(value + error, base), index, f" {value:.3g}", va="center", fontsize=7)
        axis.set_yticks(range(len(rows)), texts, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel(f"{unit} ({rows[0].figures[name].kind})", fontsize=8)
        axis.set_title(f"{group}: {name}", fontsize=9, loc="left")
        if name in (RATIO_TO_ADAMW, OF_ADAMW):
            axis.axvline(1, color="black", linewidth=0.8)
        if logarithmic:
            axis.set_xscale("log")

    return draw


def _label(row: Row, name: str) -> str:
    """A number needs its name."""
    value = row.labels[name]
    return f"{name} = {value}" if value.isdecimal() else value


def _roofline(axis: Any, rows: Sequence[Row], limits: Sequence[Row]) -> None:
    """Operations per second over operations per least byte, below both ceilings."""
    copy = next(row.figures["rate"].value for row in limits if row.name == "copy")

    def intensity(row: Row) -> float:
        seconds = row.figures["time"].value
        return row.figures["products"].value * seconds / row.figures["least bytes"].value

    operators = list(dict.fromkeys(row.name for row in rows))
    markers = dict(zip(operators, "osv^Dp<>", strict=False))
    dtypes = list(dict.fromkeys(row.labels["dtype"] for row in rows))
    for row in rows:
        colour = COLOURS[dtypes.index(row.labels["dtype"]) % len(COLOURS)]
        rate = row.figures["products"].value / 1e9
        axis.plot(intensity(row), rate, markers[row.name], color=colour, markersize=4, alpha=0.7)
    low, high = min(map(intensity, rows)) / 2, max(map(intensity, rows)) * 2
    for dtype, colour in zip(dtypes, COLOURS, strict=False):
        peak = next(r.figures["rate"].value for r in limits if r.labels.get("dtype") == dtype)
        turn = min(max(peak / copy, low), high)
        heights = [min(copy * x, peak) / 1e9 for x in (low, turn, high)]
        axis.plot((low, turn, high), heights, color=colour, linewidth=1, label=f"{dtype} ceiling")
    for name in operators:
        axis.plot([], [], markers[name], color="black", markersize=4, label=name)
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("operations per least byte (counted)", fontsize=8)
    axis.set_ylabel("GFLOP/s (implied by the measured time)", fontsize=8)
    axis.set_title("kernels: roofline", fontsize=9, loc="left")
    axis.legend(fontsize=7)


def _growth(group: str, rows: Sequence[Row]) -> Panel:
    """Times against one variable, and dotted the growth of Table 2 through the last point."""

    def draw(axis: Any) -> None:
        variable = group.rpartition(" ")[2]
        for index, (name, points) in enumerate(scaling.curves(rows, variable)):
            colour = COLOURS[index % len(COLOURS)]
            values = [int(row.labels[variable]) for row in points]
            times = [row.figures[TIME].value * 1e3 for row in points]
            paper = [row.figures[scaling.PAPER].value for row in points]
            axis.plot(values, times, "o-", color=colour, markersize=3, linewidth=1, label=name)
            line = [times[-1] * count / paper[-1] for count in paper]
            axis.plot(values, line, ":", color=colour, linewidth=1)
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(values, map(str, values))
        axis.set_xticks([], minor=True)
        axis.set_xlabel(f"{variable} (dotted: growth by Table 2)", fontsize=8)
        axis.set_ylabel("ms (measured)", fontsize=8)
        axis.set_title(group.partition(": ")[2], fontsize=9, loc="left")
        axis.legend(fontsize=6)

    return draw


def _goals(group: str, rows: Sequence[Row]) -> Panel:
    """Ratios, each with its goal as a mark."""

    def draw(axis: Any) -> None:
        ratios = [row.figures[MEASURED].value for row in rows]
        met = [row.figures[goals.MET].value if goals.MET in row.figures else None for row in rows]
        colours = [OTHER_COLOUR if m is None else COLOURS[2] if m else COLOURS[1] for m in met]
        axis.scatter(ratios, range(len(rows)), color=colours, zorder=2)
        for index, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
            axis.text(ratio, index - 0.15, f" {ratio:.3g}", va="bottom", fontsize=7)
            if goals.GOAL in row.figures:
                axis.plot(row.figures[goals.GOAL].value, index, "k|", markersize=12)
        texts = [f"{row.labels['structure']}: {row.name}" for row in rows]
        axis.set_yticks(range(len(rows)), texts, fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel("ratio (measured); | the goal", fontsize=8)
        axis.set_title(group, fontsize=9, loc="left")

    return draw
