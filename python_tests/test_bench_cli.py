"""The command line of the bench, in its tiny forms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import backends
import pytest

from singd_ext import ops
from singd_ext.bench import cli
from singd_ext.bench.results import Result, load_json

KERNELS = ["--kernels", "--small", "--device", "cpu", "--structures", "diagonal", "--rounds", "2"]

TRAINING = ["--small", "--device", "cpu", "--structures", "diagonal", "--T", "2", "--rounds", "2",
            "--steps", "2"]  # fmt: skip
GOALS = ["--goals", "--small", "--device", "cpu", "--structures", "diagonal", "--width", "16",
         "--dtypes", "float32", "--rounds", "2", "--steps", "1"]  # fmt: skip
SCALING = ["--scaling", "--small", "--device", "cpu", "--structures", "block_diagonal:8",
           "--rounds", "2"]  # fmt: skip
PROFILE = ["--profile", "--small", "--device", "cpu", "--T", "2", "--rounds", "2"]


def run(*arguments: str) -> None:
    assert cli.main(arguments) == 0


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a run that is refused says, before it has printed anything else."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def saved(path: Path, *arguments: str) -> Result:
    run(*arguments, "--json", str(path))
    return load_json(path)


def test_kernels_with_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--kernels", "--device", "cpu", "--rounds", "2", "--structures", "diagonal",
                 "block_diagonal:8", "--operators", "project_gram", "extract", "--shapes",
                 "64x40x70x2", "32x30x20x1", "--dtypes", "fp16", "fp64", "--small"]  # fmt: skip
    result = saved(tmp_path / "run.json", *arguments)
    assert len(result.rows) == 3 + 2 * 2 * 2 * 2
    assert result.command == [*arguments, "--json", str(tmp_path / "run.json")]
    captured = capsys.readouterr()
    assert "kernels: block_diagonal:8, float16" in captured.out and "\x1b" not in captured.out
    assert "[16/16] extract, block_diagonal:8, float64" in captured.err
    assert {"processor", "torch", "threads", "device"} <= result.machine.keys()


def test_files_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: str(tmp_path / f"run.{name}") for name in ("json", "csv")}
    run(*KERNELS, "--json", files["json"], "--csv", files["csv"])
    rows = load_json(Path(files["json"])).rows
    lines = Path(files["csv"]).read_text().splitlines()
    assert len(lines) == 1 + sum(len(row.figures) for row in rows)
    capsys.readouterr()

    run("--show", files["json"], "--compare", files["json"])
    assert "0 of " in capsys.readouterr().out
    data = json.loads(Path(files["json"]).read_text())
    data["rows"][-1]["figures"]["least bytes"]["value"] += 1
    Path(files["json"]).write_text(json.dumps(data))
    run(*KERNELS, "--compare", files["json"])
    changes = capsys.readouterr().out.split("changes beyond the spread")[1]
    assert "least bytes" in changes


@pytest.mark.parametrize(
    "mode",
    [KERNELS, TRAINING, PROFILE, GOALS, SCALING],
    ids=["kernels", "training", "profile", "goals", "scaling"],
)
def test_plot(mode: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run(*mode, "--plot", "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_training_with_every_option(tmp_path: Path) -> None:
    arguments = ["--preset", "vit-b", "--small", "--batch", "2", "--structures", "diagonal",
                 "--T", "1", "2", "--dtypes", "fp32", "autocast", "--rivals", "sgd", "--rounds",
                 "2", "--steps", "2", "--seed", "3", "--device", "cpu"]  # fmt: skip
    result = saved(tmp_path / "run.json", *arguments)
    assert set(result.groups()) == {"training step", "optimizer step"}
    assert any("frozen" in note for note in result.notes)


def test_profile_with_every_option(tmp_path: Path) -> None:
    arguments = ["--profile", str(tmp_path / "trace.json"), "--preset", "tiny", "--small",
                 "--batch", "2", "--structures", "diagonal", "--T", "2", "--dtypes", "fp32",
                 "--rounds", "2", "--seed", "3", "--device", "cpu"]  # fmt: skip
    result = saved(tmp_path / "run.json", *arguments)
    assert result.rows
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_goals_with_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*GOALS, "--seconds", "5", "--seed", "1"]
    result = saved(tmp_path / "run.json", *arguments)
    names = ["goals: width 16, fp32", "memory: width 16, fp32", "training step", "optimizer step"]
    assert list(result.groups()) == names  # float32 is fp32
    assert any(line.endswith(("yes", "no")) for line in capsys.readouterr().out.splitlines())


def test_scaling_with_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = saved(tmp_path / "run.json", *SCALING, "--dtypes", "fp64")
    assert "scaling: exponents" in result.groups()
    assert "Table 2's exponent" in capsys.readouterr().out


TRAFFIC = ["--traffic", "--preset", "tiny", "--structures", "diagonal", "rank_triu:1", "--T", "5",
           "--tokens", "64", "--bandwidth", "2000"]  # fmt: skip


@pytest.mark.skipif(
    backends.missing("cuda-emulated") is not None, reason=str(backends.missing("cuda-emulated"))
)
def test_traffic_is_repeatable_to_the_byte(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / f"{i}.json", *TRAFFIC) for i in range(2))
    assert first.rows and first.rows == second.rows
    kinds = {figure.kind for row in first.rows for figure in row.figures.values()}
    assert kinds == {"counted", "implied"}  # nothing is measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "--preset", "tiny"], "--preset is no option of --kernels"),
        (["--operators", "extract"], "--operators is no option of a training run"),
        (["--traffic", "--rounds", "3"], "--rounds is no option of --traffic"),
        (["--kernels", "--structures", "wide"], "structure 'wide'"),
        (["--traffic", "--T", "1", "2"], "--traffic takes one T"),
        (["--preset", "gpt9"], "'gpt9'"),
        (["--kernels", "--json", "nowhere/run.json"], "there is no folder nowhere"),
        (["--show", "nothing.json"], "nothing.json"),
        (["--kernels", "--compare", "nothing.json"], "nothing.json"),
        (["--model", "nowhere:factory"], "nowhere"),
    ],
)
def test_what_cannot_run_is_refused_by_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure(capsys, *arguments).splitlines()[-1]


def test_plot_without_matplotlib_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "singd_ext[bench]" in failure(capsys, "--kernels", "--plot", "run.png")


def test_a_wrong_operator_is_an_error_without_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.structured_matmul
    monkeypatch.setattr(ops, "structured_matmul", lambda *a, **k: 2 * right(*a, **k))
    assert cli.main([*KERNELS, "--json", str(tmp_path / "run.json")]) == 1
    assert "structured_matmul for structure 'diagonal'" in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()


def test_the_module_runs() -> None:
    """As users start it, whose output is not a terminal here."""
    done = subprocess.run(
        [sys.executable, "-m", "singd_ext.bench", *KERNELS, "--operators", "extract"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "kernels: diagonal, bfloat16" in done.stdout


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for options in cli._TAKES.values():
        for name in options.split():
            assert f"--{name}" in text
