"""Builds the extension `singd_ext._C`; the project's metadata is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:
    sys.exit(
        "singd_ext compiles against the torch of your environment: install torch first, then run "
        "`pip install --no-build-isolation .`"
    )

ROOT = Path(__file__).parent
OLDEST, BEYOND = (2, 11), (2, 15)


def torch_release() -> tuple[int, int]:
    """The minor release of torch, which the binary is tied to."""
    major, minor = map(int, torch.__version__.split(".")[:2])
    if not OLDEST <= (major, minor) < BEYOND:
        sys.exit(
            f"singd_ext supports torch {OLDEST[0]}.{OLDEST[1]} to {BEYOND[0]}.{BEYOND[1] - 1}, "
            f"but torch {torch.__version__} is installed: install one of these and build again"
        )
    return major, minor


def sources() -> list[str]:
    """Every file that csrc/sources.txt lists, relative to this folder."""
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    return [f"csrc/{line.split()[1]}" for line in lines if line and not line.startswith("#")]


def headers() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")]


major, minor = torch_release()
compile_args = ["/O2"] if sys.platform == "win32" else ["-O3", "-fno-math-errno", "-Wall"]
setup(
    # The binary works with the torch minor release that it was compiled against, and no other.
    install_requires=[f"torch~={major}.{minor}.0"],
    ext_modules=[
        CppExtension(
            "singd_ext._C",
            sources(),
            depends=headers(),
            define_macros=[("SINGD_TORCH_VERSION", torch.__version__)],
            extra_compile_args=compile_args,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
