"""`--kernels`: every operator, checked against plain PyTorch and then timed beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from .. import _C, info
from . import cases, ceilings, timing
from .cases import OPERATORS, Case, Setting, Shape
from .ceilings import Ceilings
from .plain import Dense, Toeplitz
from .results import Figure, Row, counted, implied, measured
from .rivals import STRUCTURES

GROUP = "kernels"
SHAPES = {
    "cpu": (Shape(1024, 768, 768, 2),),
    "cuda": (Shape(8192, 1024, 1024, 24), Shape(8192, 4096, 1024, 24)),
}
SMALL_SHAPE = Shape(64, 40, 70, 2)
DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
}  # fmt: skip
# Of the largest number of a result: roundings of the result's dtype that are allowed, and roundings
# of the dtype in which sums run (over a thousand terms).
ROUNDINGS, SUM_ROUNDINGS = 4, 512


class WrongOperator(Exception):
    """An operator's results are not those of plain PyTorch."""


@dataclass(frozen=True)
class KernelOptions:
    """What to time; empty means all, or the device's default."""

    operators: Sequence[str] = ()
    structures: Sequence[str] = ()
    shapes: Sequence[Shape] = ()
    dtypes: Sequence[str] = ("fp32", "bf16")
    rounds: int = 9
    device: str = "cpu"
    small: bool = False

    def __post_init__(self) -> None:
        for name in self.operators:
            if name not in OPERATORS:
                raise ValueError(f"'{name}' is no operator; these are: {', '.join(OPERATORS)}")
        for name in self.dtypes:
            if name not in DTYPES:
                raise ValueError(f"--kernels takes the dtypes {', '.join(DTYPES)}, not '{name}'")
        if self.rounds < 2:
            raise ValueError(f"rounds is {self.rounds}; a spread needs at least 2")
        for spec in self.structures:
            _C.canonical_spec(spec)  # raises ValueError


def run(
    options: KernelOptions,
    progress: Callable[[str], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure the ceilings, then check and time every operator.

    Raises:
        WrongOperator: Before anything of a structure, shape and dtype is timed.
    """
    device = torch.device(options.device)
    dtypes = [DTYPES[name] for name in options.dtypes]
    shapes = options.shapes or ((SMALL_SHAPE,) if options.small else SHAPES[device.type])
    progress("copy and matrix product")
    limits = ceilings.measure(device, dtypes, options.rounds, options.small)
    operators = list(options.operators or OPERATORS)
    for name in sorted(set(operators) - set(info.kernels(device.type)), key=operators.index):
        note(f"{name} has no kernel for {device.type} in this build")
        operators.remove(name)
    rows = list(limits.rows)
    settings = list(product(options.structures or STRUCTURES, shapes, dtypes))
    count = len(settings) * len(operators)
    for spec, shape, dtype in settings:
        setting = Setting(spec, shape, dtype, device)
        for name in operators:
            done = 1 + len(rows) - len(limits.rows)
            progress(f"[{done}/{count}] {name}, {spec}, {_name(dtype)}")
            rows.append(_time(name, setting, limits, options.rounds))
    note(
        "plain PyTorch runs in the dtype of its operands, where the operators sum in float32, and "
        "without the checks of a transaction"
    )
    if device.type == "cpu":
        note("operands that fit into a cache may exceed the copy rate, which is that of memory")
    return rows


def check(name: str, case: Case, setting: Setting) -> None:
    """Compare an operator with plain PyTorch in float64 on the same operands.

    Raises:
        WrongOperator: Naming operator, structure, dtype and error.
    """
    ours = case.ours(cases.clone(case.operands))
    truth = case.plain(cases.clone(case.operands, torch.float64))
    if name == "accumulate_statistic_":  # of a statistic, what follows from it counts
        ours = [_curvature(setting, case, ours[0])]
        truth = [_curvature(setting, case, truth[0])]
    for one, other in zip(ours, truth, strict=True):
        error, largest = (one - other).abs().max().item(), other.abs().max().item()
        dtype = setting.dtype if _is_rounded_between(name, setting) else one.dtype
        allowed = _tolerance(dtype, setting.dtype) * largest
        if not error <= allowed:  # NaN is wrong, too
            raise WrongOperator(
                f"{name} for structure '{setting.spec}' ({_name(setting.dtype)}, {case.shape}) is "
                f"off by {error:.3g} from plain PyTorch, where {allowed:.3g} is allowed: nothing "
                f"is timed"
            )


def _curvature(setting: Setting, case: Case, statistic: Tensor) -> Tensor:
    p, factor = setting.K, case.operands["K"]
    return p.curvature(statistic.double(), factor.double()).to(statistic.dtype)


def _is_rounded_between(name: str, setting: Setting) -> bool:
    """Whether X K is rounded to bfloat16 before a statistic is summed up (docs/cpu.md)."""
    if name != "accumulate_statistic_" or not isinstance(setting.K, (Dense, Toeplitz)):
        return False
    of_bfloat16 = setting.dtype == torch.bfloat16 and setting.device.type == "cpu"
    return of_bfloat16 and _C.cpu_bfloat16_gram()


def _tolerance(result: torch.dtype, dtype: torch.dtype) -> float:
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return ROUNDINGS * torch.finfo(result).eps + SUM_ROUNDINGS * torch.finfo(sums).eps


def _time(name: str, setting: Setting, limits: Ceilings, rounds: int) -> Row:
    """Check one operator and time it beside plain PyTorch."""
    case = OPERATORS[name](setting)
    check(name, case, setting)
    nbytes = sum(t.numel() * t.element_size() for t in cases.tensors(case.operands))
    copies = timing.copies(nbytes, setting.device)

    buffers = {
        rival: [cases.clone(case.operands) for _ in range(copies)] for rival in ("ours", "PyTorch")
    }
    calls = {
        "ours": [partial(case.ours, x) for x in buffers["ours"]],
        "PyTorch": [partial(case.plain, x) for x in buffers["PyTorch"]],
    }
    samples = timing.kernels(calls, rounds, setting.device)
    for rival, copied in buffers.items():  # a call on infinities may do less
        if not all(t.isfinite().all() for x in copied for t in cases.tensors(x)):
            raise WrongOperator(f"{name} for '{setting.spec}' by {rival} did not stay finite")
    labels = {"structure": setting.spec, "dtype": _name(setting.dtype), "shape": case.shape}
    figures, spread = _figures(samples, case, limits, labels["dtype"])
    return Row(f"{GROUP}: {setting.spec}, {labels['dtype']}", name, labels, figures, spread)


def _figures(
    samples: dict[str, list[float]], case: Case, limits: Ceilings, dtype: str
) -> tuple[dict[str, Figure], dict[str, float]]:
    ours, rival = samples["ours"], samples["PyTorch"]
    seconds, plain_seconds = timing.median(ours), timing.median(rival)
    rate, work_rate = case.nbytes / seconds, case.flop / seconds
    figures = {
        "time": measured(seconds, "s"),
        "PyTorch": measured(plain_seconds, "s"),
        "ratio to PyTorch": measured(seconds / plain_seconds, "x"),
        "least bytes": counted(case.nbytes, "B"),
        "rate": implied(rate, "B/s"),
        "of copy": implied(100 * rate / limits.copy, "%"),
    }
    spread = dict.fromkeys(("time", "rate", "of copy"), timing.spread(ours))
    spread["PyTorch"] = timing.spread(rival)
    spread["ratio to PyTorch"] = timing.ratio_spread(ours, rival)
    if case.flop:
        figures["products"] = implied(work_rate, "FLOP/s")
        figures["of product"] = implied(100 * work_rate / limits.product[dtype], "%")
        spread |= dict.fromkeys(("products", "of product"), spread["time"])
    return figures, spread


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
