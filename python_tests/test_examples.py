"""Every example runs in its quick mode, moves every parameter of its model and learns something.

The bars are far above chance (10 %, ten classes) and below what the runs reach: they find an
optimizer that does not train, not one that trains a little worse.
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
EXAMPLES = REPOSITORY / "examples"
# Name, options, packages it needs, lowest test accuracy in percent.
CASES = [
    ("plain_pytorch", [], ["sklearn"], 35),
    ("plain_pytorch", ["--two-optimizers"], ["sklearn"], 35),
    ("lightning_digits", [], ["sklearn", "lightning"], 50),
    ("hf_trainer", [], ["sklearn", "transformers", "accelerate"], 35),
    ("accelerate_digits", [], ["sklearn", "mlxtend", "accelerate"], 75),
    ("timm_digits", [], ["sklearn", "torchvision", "timm"], 35),
    ("graph_digits", [], ["sklearn", "torch_geometric"], 80),
]


def missing(packages: list[str]) -> str:
    """Say which of the packages cannot be imported, and why; "" if all can."""
    for package in packages:
        try:
            importlib.import_module(package)
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
            return f"{package} does not import: {error}"
    return ""


@pytest.mark.parametrize(
    ("name", "options", "packages", "bar"), CASES, ids=[" ".join([c[0], *c[1]]) for c in CASES]
)
def test_example_trains(
    name: str, options: list[str], packages: list[str], bar: float, tmp_path: Path
) -> None:
    if reason := missing(packages):
        pytest.skip(reason)
    script = [REPOSITORY / "python_tests" / "run_example.py", EXAMPLES / f"{name}.py"]
    run = subprocess.run(
        [sys.executable, *script, "--quick", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    fates = json.loads(run.stdout.splitlines()[-1])
    assert fates["moved"]
    assert not fates["unmoved"]
    assert not fates["not finite"]
    assert "does not train" not in run.stderr  # the warning of SINGD
    accuracy = re.findall(r"test accuracy ([\d.]+) %", run.stdout)[-1]
    assert float(accuracy) >= bar, run.stdout


def test_tuning_prints_its_table(tmp_path: Path) -> None:
    if reason := missing(["mlxtend", "matplotlib", "rich"]):
        pytest.skip(reason)
    run = subprocess.run(
        [sys.executable, EXAMPLES / "tuning.py", "--quick"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [row.split("|") for row in run.stdout.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["starting point", "T=1"]
    assert all(float(row[2]) < 60 for row in rows)  # percent of errors after 40 steps; 90 is chance


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {case[0] for case in CASES} | {"digits", "tuning", "mnist_cnn"}  # `make demo`
