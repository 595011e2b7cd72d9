"""Finds the CUDA toolkit and compiles the kernels; used by setup.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

OLDEST = (12, 1)  # kernels take up to 32 KB of arguments
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")
FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC", "-Xptxas=-warn-spills"]


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit with nvcc and headers."""

    home: Path
    version: tuple[int, int]

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def libraries(self) -> Path:
        return self.home / ("lib64" if (self.home / "lib64").exists() else "lib")

    def architectures(self) -> list[str]:
        """`TORCH_CUDA_ARCH_LIST`, or what this nvcc knows of ours and PTX for newer devices."""
        given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
        if names := [name for name in given.split(";") if name]:
            return names
        listed = _output(str(self.nvcc), "--list-gpu-code")
        known = [a for a in DEFAULT_ARCHITECTURES if f"sm_{a.replace('.', '')}\n" in listed]
        return [*known[:-1], f"{known[-1]}+PTX"]

    def description(self) -> str:
        """What the built library says about itself: version and architectures."""
        return f"{self.version[0]}.{self.version[1]},{','.join(self.architectures())}"

    def compile(self, kernels: list[str], headers: list[str], folder: Path) -> list[str]:
        """Compile what is older than its sources; return the object files."""
        folder.mkdir(parents=True, exist_ok=True)
        flags = [*FLAGS, *gencode(self.architectures())]
        stamp = folder / "flags"
        same = stamp.exists() and stamp.read_text() == " ".join(flags)
        newest_header = max((Path(h).stat().st_mtime for h in headers), default=0.0)
        objects = [folder / f"{Path(kernel).stem}.o" for kernel in kernels]
        commands = [
            [str(self.nvcc), *flags, "-c", kernel, "-o", str(object_file)]
            for kernel, object_file in zip(kernels, objects, strict=True)
            if not same
            or not object_file.exists()
            or object_file.stat().st_mtime < max(Path(kernel).stat().st_mtime, newest_header)
        ]
        stamp.unlink(missing_ok=True)
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            list(pool.map(_run, commands))
        stamp.write_text(" ".join(flags))
        return [str(o) for o in objects]


def requested_toolkit(torch_cuda: str | None) -> Toolkit | None:
    """The toolkit to build CUDA kernels with, as SINGD_CUDA and FORCE_CUDA say."""
    wanted = os.environ.get("SINGD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"SINGD_CUDA is '{wanted}'; allowed are auto, 1 and 0")
    if os.environ.get("FORCE_CUDA") == "1":
        wanted = "1"
    if wanted == "0":
        print("singd_ext: building without CUDA kernels, as SINGD_CUDA=0 says")
        return None
    toolkit = find_toolkit()
    if toolkit is None or toolkit.version < OLDEST or sys.platform == "win32":
        needed = (
            f"CUDA kernels need nvcc {OLDEST[0]}.{OLDEST[1]} or later with its headers, on Linux"
        )
        if wanted == "1":
            sys.exit(f"{needed}: set CUDA_HOME to a CUDA toolkit, or SINGD_CUDA=0")
        hint = f", though torch has CUDA {torch_cuda}: set CUDA_HOME" if torch_cuda else ""
        print(f"singd_ext: building without CUDA kernels{hint} ({needed})")
        return None
    if torch_cuda and int(torch_cuda.split(".")[0]) != toolkit.version[0]:
        sys.exit(
            f"nvcc {toolkit.version[0]}.{toolkit.version[1]} and torch's CUDA {torch_cuda} do not "
            f"fit together: set CUDA_HOME to a CUDA {torch_cuda.split('.')[0]} toolkit, or "
            "SINGD_CUDA=0 to build without CUDA kernels"
        )
    print(
        f"singd_ext: building CUDA kernels with nvcc {toolkit.version[0]}.{toolkit.version[1]} for "
        f"{', '.join(toolkit.architectures())}"
    )
    return toolkit


def find_toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME, of the nvcc on PATH, or of the usual place."""
    on_path = shutil.which("nvcc")
    places = [
        os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"),
        # nvcc on PATH may be a script that stands elsewhere, hence the check for headers below.
        str(Path(on_path).resolve().parent.parent) if on_path else None,
        "/usr/local/cuda",
    ]
    for place in places:
        if place is None:
            continue
        home = Path(place)
        if (home / "include" / "cuda_runtime.h").exists() and (home / "bin" / "nvcc").exists():
            version = re.search(r"release (\d+)\.(\d+)", _output(str(home / "bin/nvcc"), "-V"))
            if version is not None:
                return Toolkit(home, (int(version[1]), int(version[2])))
    return None


def gencode(architectures: list[str]) -> list[str]:
    """nvcc's options for architectures in torch's notation."""
    options = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+[af]?", number):
            sys.exit(f"TORCH_CUDA_ARCH_LIST names '{name}'; write numbers such as 8.0;9.0+PTX")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def wrappers(kernels: list[str], folder: Path) -> list[str]:
    """A C++ file for every kernel file, which includes it: the emulator's compiler is a C++ one."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kernel in kernels:
        file = folder / f"{Path(kernel).stem}_kernels.cpp"
        text = f'#include "{Path(kernel).resolve()}"\n'
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        files.append(str(file))
    return files


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(f"singd_ext: nvcc failed on {command[-3]}")


if __name__ == "__main__":  # for make: 1 where the emulator can be built
    print(int(find_toolkit() is not None))
