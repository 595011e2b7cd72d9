"""`--profile` in a small form: the phases add up, and the trace has their names."""

import json
from collections import Counter
from pathlib import Path

import pytest

from singd_ext import ops
from singd_ext.bench import profiling
from singd_ext.bench.contender import DTYPES
from singd_ext.bench.profiling import GROUP, PHASES, REST, WHOLE, ProfilingOptions, Ranges
from singd_ext.bench.results import TIME

QUICK = {"small": True, "rounds": 2}


class Scripted:
    """A clock that ticks once a mark."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        self.now += 1
        return self.now

    def seconds(self, spans) -> float:
        return sum(end - start for start, end in spans)


def run(**changes) -> list:
    return profiling.run(ProfilingOptions(**(QUICK | changes)))


@pytest.mark.parametrize("preset", ["tiny", "vit-b", "resnet50"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_phases_add_up_to_the_training_step(preset: str, dtype: str) -> None:
    rows = run(preset=preset, dtypes=(dtype,), structures=("diagonal", "dense"), periods=(1, 3))
    assert {row.group for row in rows} == {GROUP}
    for structure in ("diagonal", "dense"):
        for T in (1, 3):
            labels = {"structure": structure, "T": str(T)}
            phases = {r.name: r.figures for r in rows if labels.items() <= r.labels.items()}
            assert {*PHASES, WHOLE} <= phases.keys() <= {*PHASES, REST, WHOLE}
            # Medians of three samples need not add up as each sample does.
            parts = sum(f["share"].value for name, f in phases.items() if name != WHOLE)
            assert 50 < parts < 150
            assert phases[WHOLE]["share"].value == 100
            calls = {name: figures["calls"].value for name, figures in phases.items()}
            assert calls["forward"] == calls["backward"] == calls["step"] == 1
            assert calls["factor update"] == 1 / T and calls["parameter update"] == 1
            assert all(figures[TIME].kind == "measured" for figures in phases.values())
            assert all(figures["calls"].kind == "counted" for figures in phases.values())


def test_each_layer_has_two_statistics() -> None:
    rows = {row.name: row.figures["calls"].value for row in run(periods=(1,))}
    assert rows["statistic"] == 8  # K and C of four layers


def test_a_phase_excludes_the_phases_inside_it() -> None:
    ranges = Ranges(Scripted())
    with ranges("backward"):  # from 1 to 8
        with ranges("step"), ranges("statistic"):  # from 2 to 5, from 3 to 4
            pass
        with ranges("statistic"):  # from 6 to 7
            pass
    assert ranges.exclusive_seconds() == {"backward": 7 - 3 - 1, "step": 3 - 1, "statistic": 2}
    assert Counter(ranges.calls()) == Counter(backward=1, step=1, statistic=2)


def test_a_range_ends_with_an_error() -> None:
    ranges = Ranges(Scripted())
    with pytest.raises(RuntimeError, match="inside"), ranges("forward"), ranges("step"):
        raise RuntimeError("inside")
    assert ranges.exclusive_seconds() == {"forward": 2, "step": 1}


def test_trace_has_the_named_ranges(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    run(trace=trace, structures=("diagonal",), periods=(2,))
    events = json.loads(trace.read_text())["traceEvents"]
    spans = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            spans.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert set(PHASES) <= spans.keys()
    # An update of the factors, and a step without: two steps, one factor update.
    count = {name: len(spans[name]) for name in PHASES}
    assert count == {
        "forward": 2, "backward": 2, "step": 2, "parameter update": 2, "factor update": 1,
        "statistic": 8,
    }  # fmt: skip
    for inner, outer in (("statistic", "backward"), ("factor update", "step")):
        assert all(
            any(begin <= start and end <= stop for begin, stop in spans[outer])
            for start, end in spans[inner]
        ), f"{inner} is not inside {outer}"
    assert "fp32: singd_ext diagonal, T = 2" in spans


def test_operators_are_as_before() -> None:
    before = ops._ops
    run()
    assert ops._ops is before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 1}, "rounds is 1"),
        ({"periods": (0,)}, "T is"),
        ({"dtypes": ("fp8",)}, "dtype is 'fp8'"),
        ({"structures": ("round",)}, "round"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"trace": Path("/no/such/folder/trace.json")}, "no folder /no/such/folder"),
    ],
)
def test_a_bad_option_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProfilingOptions(**(QUICK | change))
