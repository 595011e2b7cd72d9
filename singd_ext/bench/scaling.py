"""`--scaling`: how the time of statistic, factor update and step grows, beside the paper's Table 2.

Each operator is timed alone while one of d, k, m and the number of layers changes (k: the block or
the border). The exponent is the slope of a line through the larger half of the points in a log-log
plot; Table 2's is that of its formula through the same points, so that logarithms and lower terms
count. Small sizes show overheads. Calls take turns on copies of the operands that no cache holds
together, as training leaves them: else a size at which they leave a cache would show as growth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .. import _C
from . import cases, timing
from .cases import OPERATORS, Setting, Shape
from .contender import checked_device
from .kernels import DTYPES
from .results import NUMBER, SECONDS, TIME, Figure, Row, given, implied, measured

Say = Callable[[str], None]

GROUP, EXPONENTS = "scaling", "scaling: exponents"
EXPONENT, PAPER, PAPER_EXPONENT = "exponent", "Table 2", "Table 2's exponent"
STATISTIC, UPDATE, STEP = "accumulate_statistic_", "update_factors_", "preconditioned_update_"
BEYOND_CACHES, MOST_COPIES = 64 << 20, 128  # bytes, and copies of operands
STRUCTURES = (
    "diagonal",
    "rank_triu:1",
    "block_diagonal:32",
    "hierarchical:16,16",
    "triu_toeplitz",
    "dense",
)


@dataclass(frozen=True)
class Point:
    """What is timed: layers of d × d with m rows of X, and blocks or a border of k."""

    d: int
    k: int
    m: int
    layers: int

    def of(self, variable: str) -> int:
        """Return d, k, m or layers by name."""
        return int(getattr(self, variable))


@dataclass(frozen=True)
class Sweep:
    """One variable and its values; the others stay as in `base`."""

    variable: str
    values: tuple[int, ...]
    base: Point
    operators: tuple[str, ...]

    def points(self) -> list[Point]:
        """Return the points, in the order of the values."""
        b = {name: self.base.of(name) for name in ("d", "k", "m", "layers")}
        return [Point(**(b | {self.variable: value})) for value in self.values]


ALL = (STATISTIC, UPDATE, STEP)
SWEEPS = (
    Sweep("d", (128, 256, 512, 1024, 2048), Point(0, 32, 512, 1), ALL),
    Sweep("k", (8, 16, 32, 64, 128), Point(1024, 0, 512, 1), ALL),
    Sweep("m", (128, 256, 512, 1024, 2048, 4096), Point(512, 32, 0, 1), (STATISTIC,)),
    Sweep("layers", (1, 2, 4, 8, 16), Point(512, 32, 128, 0), (UPDATE, STEP)),
)
SMALL_SWEEPS = (
    Sweep("d", (16, 32, 48), Point(0, 8, 16, 1), ALL),
    Sweep("k", (2, 4, 8), Point(32, 0, 16, 1), ALL),
    Sweep("m", (16, 32, 64), Point(32, 8, 0, 1), (STATISTIC,)),
    Sweep("layers", (1, 2, 3), Point(32, 8, 16, 0), (UPDATE, STEP)),
)


@dataclass(frozen=True)
class ScalingOptions:
    """What to time.

    Attributes:
        structures: For d, m and layers as they are; k varies in those that have a size.
        dtypes: Of "fp32", "bf16", "fp16", "fp64".
        rounds: Samples of each point, at least 2.
        device: "cpu", "cuda", "cuda:1".
        small: Sizes that only show that everything runs.

    Raises:
        ValueError: For a bad value, naming it.
    """

    structures: Sequence[str] = STRUCTURES
    dtypes: Sequence[str] = ("fp32",)
    rounds: int = 5
    device: str = "cpu"
    small: bool = False

    def __post_init__(self) -> None:
        for name in self.dtypes:
            if name not in DTYPES:
                raise ValueError(f"--scaling takes the dtypes {', '.join(DTYPES)}, not '{name}'")
        if self.rounds < 2:
            raise ValueError(f"rounds is {self.rounds}; a spread needs at least 2")
        for spec in self.structures:
            _C.canonical_spec(spec)  # raises ValueError
        checked_device(self.device)


def run(
    options: ScalingOptions,
    progress: Say = lambda _: None,
    note: Say = lambda _: None,
) -> list[Row]:
    """Time all points.

    Returns:
        Fitted exponents, then the times that they are fitted to.
    """
    exponents: list[Row] = []
    times: list[Row] = []
    for sweep in SMALL_SWEEPS if options.small else SWEEPS:
        for structure in _structures(options.structures, sweep.variable):
            for dtype in dict.fromkeys(options.dtypes):
                for operator in sweep.operators:
                    progress(f"{operator} against {sweep.variable}, {structure}, {dtype}")
                    rows = _time(operator, sweep, structure, dtype, options)
                    exponents.append(_exponents(operator, sweep, structure, dtype, rows))
                    times += rows
    note(
        "a factor update starts from the statistic; Table 2 has both in one term, k m d for a "
        "structure of size k, of which the update is k² d"
    )
    return exponents + sorted(times, key=lambda row: row.group)


def _structures(structures: Sequence[str], variable: str) -> list[str]:
    """Return canonical specs, or for k the families that have a size."""
    specs = dict.fromkeys(_C.canonical_spec(spec) for spec in structures)
    if variable != "k":
        return list(specs)
    return list(dict.fromkeys(spec.partition(":")[0] for spec in specs if ":" in spec))


def spec_at(structure: str, k: int) -> str:
    """Return the spec of a family's name with its size k; other specs as they are."""
    if structure == "hierarchical":
        return f"hierarchical:{k // 2},{k - k // 2}"
    return f"{structure}:{k}" if _has_size(structure) else structure


def _has_size(structure: str) -> bool:
    """Whether this is the bare name of a family with a size."""
    return ":" not in structure and ":" in _C.canonical_spec(structure)


def formula(operator: str, spec: str, p: Point) -> float:
    """Return the operations that Table 2 counts, for d_i = d_o = d; without m for an update."""
    family, _, sizes = spec.partition(":")
    k = sum(int(size) for size in sizes.split(",") if size) or 1
    d, m, log = p.d, p.m, math.log2(p.d)
    once: dict[str, float]
    if family in ("dense", "triu", "tril"):
        once = {STATISTIC: m * d**2 + d**3, UPDATE: 2 * d**3, STEP: 2 * d**3}
    elif family.endswith("toeplitz"):
        once = {STATISTIC: m * d * log, UPDATE: 2 * d * log, STEP: 2 * d * d * log}
    else:
        once = {STATISTIC: k * m * d, UPDATE: 2 * k * k * d, STEP: k * d * d}
    return once[operator] if operator == STATISTIC else p.layers * once[operator]


def words(operator: str, spec: str) -> str:
    """Return the formula of Table 2 in words."""
    family = spec.partition(":")[0]
    if family in ("dense", "triu", "tril"):
        return {STATISTIC: "m d² + d³", UPDATE: "d³", STEP: "d_i² d_o + d_o² d_i"}[operator]
    if family.endswith("toeplitz"):
        both = {STATISTIC: "m d log d", UPDATE: "d log d", STEP: "d_i d_o log(d_i d_o)"}
        return both[operator]
    if spec in ("diagonal", "rank_triu:1", "rank_tril:1"):
        return {STATISTIC: "m d", UPDATE: "d", STEP: "d_i d_o"}[operator]
    return {STATISTIC: "k m d", UPDATE: "k² d", STEP: "k d_i d_o"}[operator]


def _time(
    operator: str, sweep: Sweep, structure: str, dtype: str, options: ScalingOptions
) -> list[Row]:
    """Time one operator at all points of a sweep, in interleaved rounds."""
    device, points = torch.device(options.device), sweep.points()
    calls, operands, specs = {}, [], {}
    for point in points:
        value = str(point.of(sweep.variable))
        specs[value] = spec_at(structure, point.k)
        shape = Shape(point.m, point.d, point.d, point.layers)
        case = OPERATORS[operator](Setting(specs[value], shape, DTYPES[dtype], device))
        number = 1 if options.small else _copies(case.operands)
        copies = [case.operands, *(cases.clone(case.operands) for _ in range(number - 1))]
        calls[value] = [partial(case.ours, copy) for copy in copies]
        operands += copies
    samples = timing.kernels(calls, options.rounds, device)
    for changed in operands:  # a call on infinities may do less
        finite = all(t.isfinite().all() for t in cases.tensors(changed))
        assert finite, f"{operator} for '{structure}' did not stay finite"
    rows = []
    for point in points:
        value = str(point.of(sweep.variable))
        figures = {
            TIME: measured(timing.median(samples[value]), SECONDS),
            PAPER: given(formula(operator, specs[value], point), NUMBER),
        }
        labels = {"structure": structure, "dtype": dtype, sweep.variable: value}
        group = f"{GROUP}: {operator} against {sweep.variable}"
        rows.append(Row(group, operator, labels, figures, {TIME: timing.spread(samples[value])}))
    return rows


def _copies(operands: cases.Operands) -> int:
    """Return how many copies exceed the caches, or are enough to be sure where they are small."""
    nbytes = sum(t.numel() * t.element_size() for t in cases.tensors(operands))
    return min(MOST_COPIES, math.ceil(BEYOND_CACHES / nbytes))


def _exponents(operator: str, sweep: Sweep, structure: str, dtype: str, rows: Sequence[Row]) -> Row:
    """Return the fitted exponent beside that of Table 2."""
    values = [float(value) for value in sweep.values]
    figures = {
        EXPONENT: implied(slope(values, [row.figures[TIME] for row in rows]), NUMBER),
        PAPER_EXPONENT: given(slope(values, [row.figures[PAPER] for row in rows]), NUMBER),
    }
    labels = {"against": sweep.variable, "structure": structure, "dtype": dtype}
    labels[PAPER] = words(operator, spec_at(structure, sweep.base.k or 2))
    return Row(EXPONENTS, operator, labels, figures)


def slope(values: Sequence[float], figures: Sequence[Figure]) -> float:
    """Return the slope through the larger half of the points, at least three, in log-log scale."""
    count = max(3, math.ceil(len(values) / 2))
    xs = [math.log(value) for value in values[-count:]]
    ys = [math.log(figure.value) for figure in figures[-count:]]
    x_mean, y_mean = sum(xs) / count, sum(ys) / count
    products = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return products / sum((x - x_mean) ** 2 for x in xs)


def curves(rows: Sequence[Row], variable: str) -> Iterator[tuple[str, list[Row]]]:
    """Yield (structure and dtype, rows in order of the variable) of the rows of one group."""
    names = dict.fromkeys((row.labels["structure"], row.labels["dtype"]) for row in rows)
    for name in names:
        same = [row for row in rows if (row.labels["structure"], row.labels["dtype"]) == name]
        yield " ".join(name), sorted(same, key=lambda row: int(row.labels[variable]))
