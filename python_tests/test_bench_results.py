"""What a bench run is saved as, shown as and compared by."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from singd_ext.bench import compare, plots, report, schema
from singd_ext.bench.results import (
    PEAK_MEMORY,
    RATIO_TO_ADAMW,
    STATE,
    Figure,
    Result,
    Row,
    counted,
    implied,
    load_json,
    measured,
)


def make_result(time: float = 1.5e-3, spread: float = 0.1, state: int = 2048) -> Result:
    labels = {"preset": "tiny", "T": "10"}
    ours = Row(
        "training step",
        "SINGD",
        labels | {"structure": "diagonal"},
        {
            "time": measured(time, "s"),
            RATIO_TO_ADAMW: measured(1.25, "x"),
            STATE: counted(state, "B"),
            PEAK_MEMORY: measured(3 << 20, "B"),
            "rate": implied(2.5e9, "B/s"),
        },
        {"time": spread},
    )
    rival = Row("training step", "AdamW", labels, {"time": measured(1.2e-3, "s")}, {"time": 0.02})
    return Result({"processor": "P", "torch": "2"}, ["--small"], [ours, rival], ["no Muon here"])


def test_json_round_trip(tmp_path: Path) -> None:
    result, path = make_result(), tmp_path / "run.json"
    result.save_json(path)
    assert load_json(path) == result
    assert json.loads(path.read_text())["schema"] == schema.VERSION


def edited(path: Path, edit: str) -> None:
    """Apply a statement on `data` to a saved run."""
    data = json.loads(path.read_text())
    exec(edit, {"data": data})
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        ("del data['rows']", "the file has no 'rows'"),
        ("data['schema'] = 99", "the file.schema is 99"),
        ("data['rows'][1]['figures']['time']['kind'] = 'felt'", r"rows\[1\].figures.time.kind is"),
        ("data['rows'][0]['figures']['time']['unit'] = 'h'", r"rows\[0\].figures.time.unit is"),
        ("data['rows'][0]['figures']['time']['value'] = '1'", "'number' is expected"),
        ("data['rows'][0]['figures']['time']['value'] = True", "'number' is expected"),
        ("data['rows'][0]['figures']['time']['value'] = float('nan')", "JSON does not have"),
        ("data['rows'][0]['spread']['time'] = -1", "less than 0"),
        ("data['rows'][0]['colour'] = 'red'", "unknown 'colour'"),
        ("data['machine']['torch'] = 2", "'string' is expected"),
    ],
)
def test_files_that_are_not_of_the_schema_are_refused(
    tmp_path: Path, edit: str, place: str
) -> None:
    path = tmp_path / "run.json"
    make_result().save_json(path)
    edited(path, edit)
    with pytest.raises(ValueError, match=place):
        load_json(path)


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_json(path)


def test_figures_are_finite_and_of_a_known_kind_and_unit() -> None:
    with pytest.raises(ValueError, match="felt"):
        Figure(1.0, "s", "felt")
    with pytest.raises(ValueError, match="'h'"):
        Figure(1.0, "h", "measured")
    with pytest.raises(ValueError, match="nan"):
        measured(float("nan"), "s")


def test_csv_has_a_line_a_figure(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    make_result().save_csv(path)
    lines = list(csv.DictReader(path.open()))
    assert len(lines) == 6
    assert lines[0] == {
        "group": "training step", "name": "SINGD", "preset": "tiny", "T": "10",
        "structure": "diagonal", "figure": "time", "value": "0.0015", "unit": "s",
        "kind": "measured", "spread": "0.1",
    }  # fmt: skip
    assert lines[-1]["name"] == "AdamW" and lines[-1]["structure"] == ""


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (measured(0.0123456, "s"), "12.3 ms"),
        (measured(3e-10, "s"), "0.3 ns"),
        (measured(61.0, "s"), "61 s"),
        (counted(1536, "B"), "1.5 KiB"),
        (counted(0, "B"), "0 B"),
        (implied(3.02e12, "B/s"), "3,020 GB/s"),
        (implied(7.93e14, "FLOP/s"), "793 TFLOP/s"),
        (implied(71.44, "%"), "71.4 %"),
        (measured(1.25, "x"), "1.25 x"),
        (counted(123456, ""), "123,456"),
        (counted(0.975, ""), "0.975"),
    ],
)
def test_figures_in_readable_units(figure: Figure, text: str) -> None:
    assert report.text_of(figure) == text


def shown(result: Result) -> str:
    stream = io.StringIO()
    report.show(result, stream)
    return stream.getvalue()


def test_plain_text_says_of_each_figure_what_it_is() -> None:
    text = shown(make_result())
    assert "\x1b" not in text
    assert "training step, tiny, 10\n" in text  # labels that all rows share
    heading, kinds, ours, rival = text.split("training step, tiny, 10\n")[1].split("\n")[:4]
    assert heading.split() == ["structure", "time", "ratio", "to", "AdamW", "state", "peak",
                               "memory", "rate"]  # fmt: skip
    assert kinds.split() == ["measured", "measured", "counted", "measured", "implied"]
    assert ours.split() == ["SINGD", "diagonal", "1.5", "ms", "±10%", "1.25", "x", "2", "KiB", "3",
                            "MiB", "2.5", "GB/s"]  # fmt: skip
    assert rival.split() == ["AdamW", "1.2", "ms", "±2%", "-", "-", "-", "-"]
    assert "Note: no Muon here." in text and report.LEGEND in text


def test_a_figure_of_another_kind_than_its_column_is_marked() -> None:
    rows = [
        Row("g", "a", {}, {"bytes": counted(10, "B")}),
        Row("g", "b", {}, {"bytes": implied(20, "B")}),
        Row("g", "c", {}, {"bytes": counted(30, "B")}),
    ]
    lines = [line.split() for line in shown(Result({}, [], rows)).split("\n")]
    table = lines[lines.index(["g"]) :][:6]
    assert table[1:] == [["bytes"], ["counted"], ["a", "10", "B"], ["b", "20", "B", "(implied)"],
                         ["c", "30", "B"]]  # fmt: skip


def test_a_terminal_gets_a_table_by_rich() -> None:
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    report.show(make_result(), stream)
    assert "─" in stream.getvalue() and "±10%" in stream.getvalue()
    with report.progress(stream) as progress:
        progress("first")
        progress("[2/3] second")
    assert "[2/3] second" in stream.getvalue()


def test_progress_without_a_terminal_is_lines() -> None:
    stream = io.StringIO()
    with report.progress(stream) as progress:
        progress("first")
    assert stream.getvalue() == "... first\n"


def test_without_rich_a_terminal_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert shown(make_result()).count("measured") > 1


def test_compare_tells_changes_from_noise() -> None:
    found = compare.compare(make_result(), make_result(time=1.6e-3))
    assert not found.beyond_noise()  # 6.7% is within 10%
    found = compare.compare(make_result(), make_result(time=1.7e-3))
    assert [(c.row.name, c.figure) for c in found.beyond_noise()] == [("SINGD", "time")]
    assert found.beyond_noise()[0].relative == pytest.approx(0.1333, abs=1e-3)
    found = compare.compare(make_result(), make_result(time=1.7e-3, spread=0.5))
    assert not found.beyond_noise()  # the larger spread of both


def test_compare_takes_every_change_of_a_counted_figure() -> None:
    found = compare.compare(make_result(), make_result(state=2049))
    assert [c.figure for c in found.beyond_noise()] == [STATE]


def test_compare_names_what_is_gone_and_new_and_another_machine() -> None:
    old, new = make_result(), make_result()
    new.rows[1] = Row("training step", "Muon", {}, {"time": measured(1, "s")})
    new.machine = {"processor": "Q", "torch": "2"}
    found = compare.compare(old, new)
    assert found.gone == ["training step: AdamW (preset tiny, T 10): time"]
    assert found.added == ["training step: Muon: time"]
    assert found.machine == ["processor: P -> Q"]
    stream = io.StringIO()
    report.show_comparison(found, stream)
    assert "The machine differs: processor: P -> Q" in stream.getvalue()
    assert "0 of 5 figures changed beyond the spread; 1 are gone, 1 are new." in stream.getvalue()


def test_compare_does_not_take_a_measured_figure_for_an_implied_one() -> None:
    old, new = make_result(), make_result()
    new.rows[1].figures["time"] = implied(1.2e-3, "s")
    found = compare.compare(old, new)
    assert len(found.changes) == 5 and len(found.gone) == len(found.added) == 1


def test_compare_shows_a_table() -> None:
    stream = io.StringIO()
    report.show_comparison(compare.compare(make_result(), make_result(time=3e-3)), stream)
    assert "1.5 ms  3 ms  +100.0%  ±10.0%  measured" in stream.getvalue()


def test_plot_writes_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.png"
    plots.save(make_result(), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_without_figures_says_so(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no figures to draw"):
        plots.save(Result({}, []), tmp_path / "run.png")


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"singd_ext\[bench\]"):
        plots.require()
