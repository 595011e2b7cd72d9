"""What users see when the library does not build or does not load."""

import os
import runpy
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import singd_ext

ROOT = Path(__file__).parents[1]
PACKAGE = Path(singd_ext.__file__).parent


def run_setup() -> None:
    runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")


def test_setup_without_torch_says_so_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="install torch first, then run `pip install --no-build-"):
        run_setup()


@pytest.mark.parametrize("version", ["2.10.0", "1.13.1", "2.15.0.dev1", "3.0.0"])
def test_setup_refuses_a_torch_that_is_not_supported(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(SystemExit, match=rf"torch 2\.11 to 2\.14, but torch {version}"):
        run_setup()


# An editable install would find the missing library in the original package.
IMPORT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import singd_ext
"""


def import_copy(folder: Path, edit_library: bytes | None) -> str:
    """Import a copy of the package, its library replaced by these bytes or removed."""
    ignore = shutil.ignore_patterns("__pycache__", "_C*.so", "_C*.pyd")
    shutil.copytree(PACKAGE, folder / "singd_ext", ignore=ignore)
    if edit_library is not None:
        (folder / "singd_ext" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(edit_library)
    run = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    return run.stderr.splitlines()[-1]


def test_a_missing_library_says_how_to_build(tmp_path: Path) -> None:
    message = import_copy(tmp_path, None)
    assert message.startswith("ImportError: singd_ext's compiled library has not been built")
    assert f"torch {torch.__version__} was found" in message
    assert "pip install --no-build-isolation" in message


def test_a_broken_library_names_both_versions(tmp_path: Path) -> None:
    text = b"\0singd_ext built with torch 2.12.1+cu130\0"
    message = import_copy(tmp_path, b"\x7fELF" + text)
    assert "was built with torch 2.12.1+cu130" in message
    assert f"torch {torch.__version__} was found" in message
    assert "pip install --no-build-isolation" in message
    assert "The original error:" in message


def test_a_library_of_another_torch_release_is_refused(
    tmp_path: Path,
) -> None:
    """A library that loads, but was compiled against another minor release."""
    library = next(p for p in PACKAGE.iterdir() if p.name.startswith("_C") and "pyi" not in p.name)
    built = singd_ext._C.build_info()["torch"]
    other = "9.99" + built[4:]
    assert len(other) == len(built)
    patched = library.read_bytes().replace(
        f"built with torch {built}".encode(), f"built with torch {other}".encode()
    )
    message = import_copy(tmp_path, patched)
    assert f"was built with torch {other}, but torch {torch.__version__} was found" in message
    assert "pip install --no-build-isolation" in message


def test_info_prints_the_facts_of_a_bug_report() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "singd_ext.info"], capture_output=True, text=True, check=True
    )
    for fact in ("singd_ext", "torch", "compiler", "CUDA", "processor", "kernels for cpu"):
        assert fact in run.stdout
    assert torch.__version__ in run.stdout
