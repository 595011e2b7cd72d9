"""What is built: the list of sources, and the choice of a CUDA toolkit."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "cmake"))
import cuda_build  # noqa: E402
from cuda_build import Toolkit  # noqa: E402


def toolkit(folder: Path, version: tuple[int, int] = (13, 0)) -> Toolkit:
    """A toolkit of two empty files; its nvcc says its version and architectures."""
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    (folder / "bin").mkdir()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -V ]; then echo "release {version[0]}.{version[1]}, V"; '
        "else echo sm_80; echo sm_90; fi\n"
    )
    nvcc.chmod(0o755)
    return Toolkit(folder, version)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing about CUDA, and no toolkit to be found."""
    for name in ("SINGD_CUDA", "FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_build, "find_toolkit", lambda: None)
    return monkeypatch


def test_every_source_file_is_listed_once() -> None:
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    listed = [line.split()[1] for line in lines if line and not line.startswith("#")]
    files = [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.cu")]
    names = [str(file.relative_to(ROOT / "csrc")) for file in files]
    assert sorted(listed) == sorted(name for name in names if not name.startswith("tests/"))


def test_without_a_toolkit_the_build_says_what_is_left_out(
    nowhere: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cuda_build.requested_toolkit("13.0") is None
    printed = capsys.readouterr().out
    assert "building without CUDA kernels, though torch has CUDA 13.0: set CUDA_HOME" in printed


@pytest.mark.parametrize("name", ["SINGD_CUDA", "FORCE_CUDA"])
def test_cuda_that_is_asked_for_and_not_there_stops_the_build(
    nowhere: pytest.MonkeyPatch, name: str
) -> None:
    nowhere.setenv(name, "1")
    with pytest.raises(SystemExit, match=r"CUDA kernels need nvcc 12\.1 or later"):
        cuda_build.requested_toolkit(None)


def test_a_misspelt_choice_is_named(nowhere: pytest.MonkeyPatch) -> None:
    nowhere.setenv("SINGD_CUDA", "yes")
    with pytest.raises(SystemExit, match="SINGD_CUDA is 'yes'; allowed are auto, 1 and 0"):
        cuda_build.requested_toolkit(None)


def test_cuda_can_be_left_out(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere.setattr(cuda_build, "find_toolkit", lambda: toolkit(tmp_path))
    nowhere.setenv("SINGD_CUDA", "0")
    assert cuda_build.requested_toolkit("13.0") is None


def test_a_toolkit_that_does_not_fit_torch_is_refused(
    nowhere: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = toolkit(tmp_path)
    nowhere.setattr(cuda_build, "find_toolkit", lambda: found)
    with pytest.raises(SystemExit, match=r"nvcc 13.0 and torch's CUDA 12.6 do not fit together"):
        cuda_build.requested_toolkit("12.6")
    assert cuda_build.requested_toolkit("13.2") == found
    assert cuda_build.requested_toolkit(None) == found


def test_a_home_without_headers_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "good").mkdir()
    good = toolkit(tmp_path / "good")
    monkeypatch.setenv("CUDA_HOME", str(good.home))
    assert cuda_build.find_toolkit() == good
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    other = cuda_build.find_toolkit()
    assert other is None or other.home != tmp_path / "empty"


def test_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of ours that nvcc knows, with PTX of the last; or those that are asked for."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    found = toolkit(tmp_path)
    assert found.architectures() == ["8.0", "9.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a+PTX")
    assert found.architectures() == ["8.6", "9.0a+PTX"]
    assert cuda_build.gencode(found.architectures()) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST names 'Hopper'"):
        cuda_build.gencode(["Hopper"])


def test_a_kernel_that_does_not_compile_stops_the_build(tmp_path: Path) -> None:
    found = toolkit(tmp_path)
    found.nvcc.write_text(
        "#!/bin/sh\nif [ $1 = --list-gpu-code ]; then echo sm_80; else exit 1; fi"
    )
    kernel = tmp_path / "broken.cu"
    kernel.touch()
    with pytest.raises(SystemExit, match=r"nvcc failed on .*broken.cu"):
        found.compile([str(kernel)], [], tmp_path / "objects")
