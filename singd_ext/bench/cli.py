"""The command line of the bench."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _C
from . import (
    compare,
    goals,
    kernels,
    machine,
    plots,
    presets,
    profiling,
    report,
    scaling,
    traffic,
    training,
)
from .cases import OPERATORS, Shape
from .results import Result, load_json

Say = Callable[[str], None]

DESCRIPTION = """\
What SINGD costs on this machine. Without a mode: the training step and the optimizer step of a
preset, SINGD and its rivals interleaved in one run."""

# Which options a mode takes, beside --json and the like. Any other one is an error.
_TAKES = {
    "training": "preset model small batch structures T dtypes rivals rounds steps seconds device "
    "seed",
    "goals": "width structures dtypes rounds steps seconds device seed small",
    "scaling": "structures dtypes rounds device small",
    "kernels": "operators structures shapes dtypes rounds device small",
    "traffic": "preset structures T tokens bandwidth",
    "profile": "preset model small batch structures T dtypes rounds device seed",
    "show": "",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser; options that were not given are absent from its result."""
    p = argparse.ArgumentParser(
        prog="python -m singd_ext.bench",
        description=DESCRIPTION,
        argument_default=argparse.SUPPRESS,
    )
    modes = p.add_argument_group("modes").add_mutually_exclusive_group()
    modes.add_argument(
        "--goals", action="store_true", help="speed goals of the CPU, and whether they are met here"
    )
    modes.add_argument(
        "--scaling", action="store_true", help="how times grow with d, k, m and layers, and Table 2"
    )
    modes.add_argument(
        "--kernels", action="store_true", help="every operator, beside plain PyTorch"
    )
    modes.add_argument(
        "--traffic",
        action="store_true",
        help="bytes that the CUDA kernels move, counted by the emulator; needs no GPU",
    )
    modes.add_argument(
        "--profile",
        type=Path,
        nargs="?",
        const=Path("trace.json"),
        metavar="TRACE.json",
        help="time by phase; writes a trace for chrome://tracing (default: trace.json)",
    )
    modes.add_argument(
        "--show", type=Path, metavar="RUN.json", help="show a saved run instead of a new one"
    )
    _add_what(p.add_argument_group("what to run"))
    _add_output(p.add_argument_group("output"))
    return p


def _add_what(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    known = ", ".join(presets.PRESETS)
    add("--preset", metavar="NAME", help=f"{known} (default: tiny; --traffic: gpt2-medium)")
    add("--model", metavar="MODULE:FACTORY", help="a model of your own (docs/benchmarks.md)")
    add("--small", action="store_true", help="tiny sizes: shows that it runs, not how fast")
    add("--batch", type=int, help="sequences or images a step (default: the preset's)")
    add("--structures", nargs="+", metavar="SPEC", help="default: every structure")
    add("--T", nargs="+", type=int, help="steps between factor updates (default: 1 10 50)")
    words = "fp32, bf16, autocast; --kernels: fp16, fp64 too, not autocast"
    add("--dtypes", nargs="+", type=_dtype, metavar="DTYPE", help=words)
    add("--width", nargs="+", type=int, help="of --goals: of the GPT (default: 256 768)")
    add("--rivals", nargs="*", metavar="NAME", help="sgd, muon, singd, beside fused AdamW")
    add("--rounds", type=int, help="samples of each")
    add("--steps", type=int, help="training steps that a sample has at least")
    add("--seconds", type=float, help="about how long a sample may take at most")
    add("--device", help="cpu, cuda (default: cuda where it can be used)")
    add("--seed", type=int, help="of weights and batches")
    add("--operators", nargs="+", metavar="NAME", help=f"of --kernels: {', '.join(OPERATORS)}")
    add("--shapes", nargs="+", type=_shape, metavar="ROWSxD_OxD_IxLAYERS", help="of --kernels")
    add("--tokens", type=int, help="of --traffic: rows of X")
    add("--bandwidth", type=float, metavar="GB/S", help="of --traffic: of implied times")


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--json", type=Path, metavar="FILE", help="save the run")
    add("--csv", type=Path, metavar="FILE", help="save the run, a line a figure")
    add("--plot", type=Path, metavar="FILE.png", help="roofline, ratios to AdamW, memory")
    add("--compare", type=Path, metavar="OLD.json", help="what changed beyond the spread")


def _dtype(text: str) -> str:
    """A dtype by the bench's name, or by PyTorch's."""
    names = {name: short for short, dtype in kernels.DTYPES.items() for name in _names(dtype)}
    return names.get(text, text)


def _names(dtype: torch.dtype) -> tuple[str, ...]:
    return str(dtype), str(dtype).removeprefix("torch.")


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    p = parser()
    given = vars(p.parse_args(words))
    try:
        _run(words, given)
    except (ValueError, ImportError, OSError) as error:
        print(f"{p.prog}: {error}", file=sys.stderr)
        return 2
    except (kernels.WrongOperator, AssertionError) as error:
        print(f"{p.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _run(words: list[str], given: dict[str, Any]) -> None:
    # What can fail for a reason known beforehand fails before the run.
    outputs = {name: given.pop(name, None) for name in ("json", "csv", "plot", "compare")}
    old = load_json(outputs["compare"]) if outputs["compare"] else None
    for name in ("json", "csv", "plot"):
        if outputs[name] and not outputs[name].parent.is_dir():
            raise ValueError(f"--{name}: there is no folder {outputs[name].parent}")
    if outputs["plot"]:
        plots.require()
    result = load_json(given["show"]) if "show" in given else _measure(words, given)
    if outputs["json"]:
        result.save_json(outputs["json"])
    if outputs["csv"]:
        result.save_csv(outputs["csv"])
    report.show(result)
    if old:
        report.show_comparison(compare.compare(old, result))
    if outputs["plot"]:
        plots.save(result, outputs["plot"])


def _measure(words: list[str], given: dict[str, Any]) -> Result:
    modes = ("goals", "scaling", "kernels", "traffic", "profile")
    mode = next((name for name in modes if name in given), "training")
    trace = given.pop(mode, None)
    for name in given:
        if name not in _TAKES[mode].split():
            raise ValueError(f"--{name} is no option of {_title(mode)}")
    if "device" in _TAKES[mode].split():
        given.setdefault("device", _default_device())
    result = Result(machine.describe(given.get("device", "cpu")), words)
    if mode != "traffic" and (busy := machine.busy()):
        result.notes.append(busy)
    with report.progress() as progress:
        result.rows += _MODES[mode](given, trace, progress, result.notes.append)
    return result


def _title(mode: str) -> str:
    return "a training run" if mode == "training" else f"--{mode}"


def _default_device() -> str:
    has_kernels = "cuda" in _C.build_info()["devices"].split()
    return "cuda" if has_kernels and torch.cuda.is_available() else "cpu"


def _tuples(given: dict[str, Any]) -> dict[str, Any]:
    """Options as the dataclasses take them."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if "T" in options:
        options["periods"] = options.pop("T")
    return options


def _training(given: dict[str, Any], _: object, progress: Say, note: Say) -> list[Any]:
    return training.run(training.TrainingOptions(**_tuples(given)), progress, note)


def _goals(given: dict[str, Any], _: object, progress: Say, note: Say) -> list[Any]:
    return goals.run(goals.GoalOptions(**_tuples(given)), progress, note)


def _scaling(given: dict[str, Any], _: object, progress: Say, note: Say) -> list[Any]:
    return scaling.run(scaling.ScalingOptions(**_tuples(given)), progress, note)


def _kernels(given: dict[str, Any], _: object, progress: Say, note: Say) -> list[Any]:
    return kernels.run(kernels.KernelOptions(**_tuples(given)), progress, note)


def _traffic(given: dict[str, Any], _: object, progress: Say, note: Say) -> list[Any]:
    options = dict(given)
    if "T" in options:
        if len(options["T"]) != 1:
            raise ValueError("--traffic takes one T")
        options["T"] = options["T"][0]
    if "bandwidth" in options:
        options["bandwidth"] *= 1e9
    return traffic.run(traffic.TrafficOptions(**options), progress)


def _profile(given: dict[str, Any], trace: Path, progress: Say, note: Say) -> list[Any]:
    options = profiling.ProfilingOptions(**_tuples(given), trace=trace)
    return profiling.run(options, progress, note)


_MODES = {
    "training": _training,
    "goals": _goals,
    "scaling": _scaling,
    "kernels": _kernels,
    "traffic": _traffic,
    "profile": _profile,
}
