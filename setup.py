"""Builds the extension `singd_ext._C`; the project's metadata is in pyproject.toml.

The environment decides what is built:

    SINGD_CUDA=auto|1|0     CUDA kernels: where nvcc is found (default), always, never; whether a
                            GPU is visible plays no part. FORCE_CUDA=1 means 1.
    CUDA_HOME               the CUDA toolkit, 12.1 or later
    TORCH_CUDA_ARCH_LIST    architectures, as torch reads them: "8.0;9.0+PTX"
    MAX_JOBS                compilers at a time
    SINGD_EMULATION=1       `singd_ext._emulation` instead, which runs the CUDA kernels on a CPU,
                            for tests and the bench; SINGD_SANITIZE=1 adds sanitizers
"""

import os
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
sys.path.insert(0, str(ROOT / "cmake"))
import cuda_build  # noqa: E402

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


def sources(*kinds: str) -> list[str]:
    """The files of these kinds in csrc/sources.txt, relative to this folder."""
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    listed = [line.split() for line in lines if line and not line.startswith("#")]
    return [f"csrc/{name}" for kind, name in listed if kind in kinds]


def headers() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h")]


def extension(toolkit: cuda_build.Toolkit | None) -> CppExtension:
    """`singd_ext._C`, with CUDA kernels where there is a toolkit."""
    ext = CppExtension(
        "singd_ext._C",
        sources("plain", "torch", "simd", "python"),
        depends=headers(),
        define_macros=[("SINGD_TORCH_VERSION", torch.__version__)],
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=LINK_ARGS,
    )
    if toolkit is not None:
        ext.sources += sources("launcher")
        ext.define_macros.append(("SINGD_CUDA", toolkit.description()))
        ext.library_dirs.append(str(toolkit.libraries))
        # Linked in, so that the library also loads beside a torch without CUDA.
        ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
    return ext


def emulation(toolkit: cuda_build.Toolkit | None) -> CppExtension:
    """`singd_ext._emulation`: launchers and kernels as C++ for the CPU."""
    if toolkit is None:
        sys.exit("SINGD_EMULATION=1 needs the headers of the CUDA toolkit: set CUDA_HOME")
    folder = Path("build") / "emulation"
    sanitized = os.environ.get("SINGD_SANITIZE") == "1"
    flags = ["-O1", "-g1", *SANITIZERS, "-fno-omit-frame-pointer"] if sanitized else COMPILE_ARGS
    return CppExtension(
        "singd_ext._emulation",
        [
            *sources("plain", "launcher", "emulation"),
            "csrc/schemas.cpp",
            "csrc/op_checks.cpp",
            "csrc/call_checks.cpp",
            *cuda_build.wrappers(sources("kernel"), folder),
        ],
        depends=headers() + sources("kernel"),
        include_dirs=[str(toolkit.home / "include")],
        define_macros=[("SINGD_EMULATION", None)],
        extra_compile_args=[*flags, "-Wno-unknown-pragmas"],
        extra_link_args=SANITIZERS if sanitized else [],
    )


class Build(BuildExtension):
    """torch's build, after nvcc has compiled the kernels of `singd_ext._C`."""

    def build_extensions(self) -> None:
        if TOOLKIT is not None:
            (ext,) = self.extensions
            ext.extra_objects += TOOLKIT.compile(
                sources("kernel"), headers(), Path(self.build_temp) / "cuda"
            )
        super().build_extensions()

    def build_extension(self, ext: CppExtension) -> None:
        # The two libraries compile some files differently, so their objects lie apart.
        temp = self.build_temp
        self.build_temp = str(Path(temp) / ext.name)
        super().build_extension(ext)
        self.build_temp = temp


COMPILE_ARGS = ["-O3", "-g0", "-fno-math-errno", "-Wall", "-fvisibility=hidden"]
LINK_ARGS = []
if sys.platform == "linux":
    # For at::parallel_for. The runtime is torch's: linking another one would give a second pool.
    COMPILE_ARGS.append("-fopenmp")
    # Static libraries stay private. A compiler may link its C++ library statically: mixed with the
    # one that torch has loaded, it crashed where a message prints a number.
    LINK_ARGS.append("-Wl,--exclude-libs,ALL")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
major, minor = torch_release()
if os.environ.get("SINGD_EMULATION") == "1":
    TOOLKIT = None
    extensions = [emulation(cuda_build.find_toolkit())]
else:
    TOOLKIT = cuda_build.requested_toolkit(torch.version.cuda)
    extensions = [extension(TOOLKIT)]
setup(
    # The binary works with the torch minor release that it was compiled against, and no other.
    install_requires=[f"torch~={major}.{minor}.0"],
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
)
