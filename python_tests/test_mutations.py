"""The tests go red where a kernel is broken: a barrier removed, an index shifted, a bias dropped.

Every mutation is compiled into a library of its own, on which the short list of test_emulation.py
has to fail.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import backends
import pytest
from torch.utils.cpp_extension import library_paths

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "cmake"))
import cuda_build  # noqa: E402

OBJECTS = sorted(ROOT.glob("build/temp*/singd_ext._emulation"))


@dataclass(frozen=True)
class Mutation:
    """A text in a file of csrc/cuda that is replaced once, and the kernel files it is part of."""

    name: str
    file: str
    old: str
    new: str
    kernels: tuple[str, ...]
    tests: str  # what of test_emulation.py is run


BARRIER = "__syncthreads();"
MUTATIONS = [
    Mutation(
        "no barrier between staging and multiplying a Gram tile",
        "gram_tile.cuh",
        f"      wait_for_copies<kRing - 2>();\n      {BARRIER}",
        "      wait_for_copies<kRing - 2>();",
        ("gram_block", "gram_bordered"),
        "test_statistics and bf16",
    ),
    Mutation(
        "a Gram tile is multiplied while it is on its way",
        "gram_tile.cuh",
        "wait_for_copies<kRing - 2>",
        "wait_for_copies<kRing>",
        ("gram_block", "gram_bordered"),
        "test_statistics and bf16",
    ),
    Mutation(
        "a Gram tile takes the place of one that is being read",
        "gram_tile.cuh",
        "      free = stage;",
        "      free = (stage + kRing - 1) % kRing;",
        ("gram_block", "gram_bordered"),
        "ring and bf16",
    ),
    Mutation(
        "no bias column",
        "rows.cuh",
        "column == rows.features ? static_cast<compute_t<T>>(rows.ones)",
        "column == rows.features ? compute_t<T>(0)",
        ("gram_block",),
        "test_statistics and block",
    ),
    Mutation(
        "column sums in the wrong column",
        "row_kernels.cu",
        "partial[row_lane][lane * S::kPiece + e] = sum[e]",
        "partial[row_lane][(lane * S::kPiece + e + 1) % S::kColumns] = sum[e]",
        ("row_kernels",),
        "test_statistics and diagonal",
    ),
    Mutation(
        "no barrier between staging and multiplying a strip of thin rows",
        "thin_strip.cuh",
        f"    {BARRIER}\n    if (border.end - k > kDepth)",
        "    if (border.end - k > kDepth)",
        ("thin_products",),
        "test_parameter_updates and rank",
    ),
    Mutation(
        "no barrier between the sums of warps that share a strip of G",
        "matrix_products.cu",
        f"      {BARRIER}\n      if (split < half) for_each",
        "      if (split < half) for_each",
        ("matrix_products",),
        "test_parameter_updates and rank",
    ),
    Mutation(
        "no barrier between staging and multiplying a tile of G",
        "matrix_tile.cuh",
        f"      stage_gradient();\n      {BARRIER}",
        "      stage_gradient();",
        ("matrix_update",),
        "test_parameter_updates and block",
    ),
    Mutation(
        "no barrier before Z is multiplied",
        "matrix_tile.cuh",
        f"        if (active) store_z(p);\n        {BARRIER}",
        "        if (active) store_z(p);",
        ("matrix_update",),
        "test_parameter_updates and block",
    ),
    Mutation(
        "no barrier before Z of other columns takes its place",
        "matrix_tile.cuh",
        f"        if (n > 0) {BARRIER}\n",
        "",
        ("matrix_update",),
        "test_parameter_updates and block",
    ),
    Mutation(
        "the smallest planes are left out",
        "matrix_tile.cuh",
        "p + q < S::kPlanes;",
        "p + q < S::kPlanes - 1;",
        ("matrix_update",),
        "test_parameter_updates and block and f32",
    ),
    Mutation(
        "weight decay forgotten",
        "step.cuh",
        "unscale * p + weight_decay * weight + momentum",
        "unscale * p + momentum",
        ("stream_update",),
        "test_parameter_updates and diagonal",
    ),
    Mutation(
        "an infinity that was found is not heeded",
        "step_work.cuh",
        "read(a.found_inf) != 0",
        "false",
        ("stream_update",),
        "infinity and diagonal",
    ),
    Mutation(
        "gradient scale forgotten",
        "step.cuh",
        "1.0 / read(a.grad_scale)",
        "1.0",
        # Functions that are not inlined are shared.
        ("stream_update", "tiled_update", "matrix_update"),
        "scales and diagonal",
    ),
    Mutation(
        "no barrier in a norm",
        "factor_norms.cu",
        f"shares + threadIdx.x, share);\n  {BARRIER}",
        "shares + threadIdx.x, share);",
        ("factor_norms",),
        "test_factor_updates and rank",
    ),
]


def mutated_sources(mutation: Mutation, folder: Path) -> Path:
    """A copy of csrc with the mutation."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    file = sources / "cuda" / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) >= 1, f"{mutation.file} has no '{mutation.old}' to replace"
    file.write_text(text.replace(mutation.old, mutation.new, 1))
    return sources


def build(mutation: Mutation, folder: Path) -> None:
    """Compile what the mutation touches, and link it with the other objects of the emulator."""
    toolkit = cuda_build.find_toolkit()
    assert toolkit is not None
    sources = mutated_sources(mutation, folder)
    objects = {path.name: path for path in OBJECTS[0].rglob("*.o")}
    for kernel in mutation.kernels:
        name = f"{kernel}_kernels.o"
        assert name in objects, f"{name} is not part of the emulator"
        objects[name] = folder / name
        run("g++", "-x", "c++", "-std=c++17", "-O1", "-fPIC", "-DSINGD_EMULATION",
            f"-I{toolkit.home / 'include'}", "-Wno-unknown-pragmas",
            "-c", str(sources / "cuda" / f"{kernel}.cu"), "-o", str(folder / name))  # fmt: skip
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    libraries = [f"-L{path}" for path in library_paths()]
    run("g++", "-shared", *map(str, objects.values()), *libraries, "-lc10", "-ltorch",
        "-ltorch_cpu", "-ltorch_python", "-o", str(folder / f"_emulation{suffix}"))  # fmt: skip


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def short_list(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", tests]
    return subprocess.run(
        [*command, str(ROOT / "python_tests" / "test_emulation.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "SINGD_EMULATION_FOLDER": str(folder), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(
    backends.missing("cuda-emulated") is not None, reason=str(backends.missing("cuda-emulated"))
)
@pytest.mark.skipif(not OBJECTS, reason="the emulator was not built in this folder")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_broken_kernel_is_found(mutation: Mutation, tmp_path: Path) -> None:
    build(mutation, tmp_path)
    result = short_list(tmp_path, mutation.tests)
    assert result.returncode == 1, result.stdout + result.stderr
    assert " failed" in result.stdout
