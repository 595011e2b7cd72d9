"""The CPU kernels of every instruction set, and the threads they run in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from singd_ext import _C

ROOT = Path(__file__).parents[1]
CAPABILITIES = {"default": "plain", "avx2": "avx2", "avx512": "avx512"}
ORDER = ["DEFAULT", "AVX2", "AVX512"]


def run(*command: str, capability: str | None = None, threads: int = 1, **more: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **more}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def skip_unless_available(capability: str) -> None:
    own = torch.backends.cpu.get_cpu_capability()
    if own not in ORDER or ORDER.index(own) < ORDER.index(capability.upper()):
        pytest.skip(f"this processor runs {own}, not {capability}")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_instruction_set_is_torchs(capability: str) -> None:
    skip_unless_available(capability)
    code = "from singd_ext import _C; print(_C.cpu_instructions())"
    assert (
        run(sys.executable, "-c", code, capability=capability).strip() == CAPABILITIES[capability]
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bfloat16_instructions_are_those_of_avx512(capability: str) -> None:
    skip_unless_available(capability)
    code = "from singd_ext import _C; print(_C.cpu_bfloat16_instructions())"
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("only Linux lists what a processor has")
    expected = capability == "avx512" and "avx512_bf16" in flags.read_text()
    assert run(sys.executable, "-c", code, capability=capability).strip() == str(expected)


def test_instructions_for_bfloat16_are_used_if_onednn_may() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("only Linux lists what a processor has")
    names = set(flags.read_text().split())
    own = torch.backends.cpu.get_cpu_capability() == "AVX512"
    products = own and "avx512_bf16" in names
    tiles = products and {"amx_tile", "amx_bf16"} <= names
    code = "from singd_ext import _C; print(_C.cpu_bfloat16_instructions(), _C.cpu_tiles())"
    for most, wanted in {
        "DEFAULT": (products, tiles),
        "AVX512_CORE_AMX": (products, tiles),
        "avx512_core_bf16": (products, False),
        "AVX512_CORE_FP16": (products, False),
        "AVX512_CORE": (False, False),
        "AVX2_VNNI_2": (False, False),
    }.items():
        printed = run(sys.executable, "-c", code, ONEDNN_MAX_CPU_ISA=most).split()
        assert printed == [str(use) for use in wanted], most


@pytest.mark.filterwarnings("ignore:TF32")  # of torch's flags, whatever is set
def test_onednn_multiplies_where_mkl_uses_no_avx512() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("only Linux lists what a processor has")
    words = set(cpuinfo.read_text().split())
    faster = "avx512bw" in words and "GenuineIntel" not in words
    code = "import torch; from singd_ext import _C; print(_C.cpu_onednn_products())"
    for most, wanted in {"DEFAULT": faster, "AVX512_CORE": faster, "AVX2": False}.items():
        assert run(sys.executable, "-c", code, ONEDNN_MAX_CPU_ISA=most).strip() == str(wanted), most
    with torch.backends.mkldnn.flags(enabled=False):
        assert not _C.cpu_onednn_products()


@pytest.mark.parametrize("most", ["AVX512_CORE_BF16", "AVX512_CORE"])
def test_operators_without_instructions_for_bfloat16(most: str) -> None:
    """Without tiles, and without any."""
    if not (_C.cpu_tiles() if most.endswith("BF16") else _C.cpu_bfloat16_instructions()):
        pytest.skip("all other tests use none")
    names = ["step_sizes", "bfloat16", "stores", "large_products"]
    if most.endswith("BF16"):  # without any, rows are converted as under all instruction sets
        names.append("many_rows")
    files = [f"python_tests/test_{name}.py" for name in names]
    chosen = ["-k", "not emulated and not cuda and not is_stable", "-p", "no:cacheprovider"]
    run(sys.executable, "-m", "pytest", "-q", "-x", *chosen, *files, ONEDNN_MAX_CPU_ISA=most)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_operators_with_the_instruction_set(capability: str) -> None:
    skip_unless_available(capability)
    if CAPABILITIES[capability] == _C.cpu_instructions():
        pytest.skip("all other tests use this one")
    files = [
        f"python_tests/test_{name}.py"
        for name in (
            "step_sizes",
            "many_rows",
            "transactions",
            "trajectories",
            "whole_factors",
            "stores",
        )
    ]
    # Rows beyond a panel of the CUDA kernels are no edge here, and their reference takes long.
    chosen = "not emulated and not cuda and not step_of_many_rows"
    options = ["-q", "-x", "-k", chosen, "-p", "no:cacheprovider"]
    run(sys.executable, "-m", "pytest", *options, *files, capability=capability)


@pytest.mark.parametrize("threads", [1, 2])
def test_operators_run_in_torchs_threads(threads: int) -> None:
    code = (
        "import torch; from singd_ext import _C; before = _C.cpu_threads(); "
        "torch.set_num_threads(3); print(before, _C.cpu_threads())"
    )
    assert run(sys.executable, "-c", code, threads=threads).split() == [str(threads), "3"]


@pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("nm")), reason="needs the g++ and nm of GNU"
)
@pytest.mark.parametrize("instructions", ["plain", "avx2", "avx512", "bfloat16", "amx"])
def test_instruction_sets_share_no_functions(instructions: str, tmp_path: Path) -> None:
    """Of inline functions in several objects the linker keeps any one: perhaps that of AVX-512."""
    if os.uname().machine != "x86_64" and instructions != "plain":
        pytest.skip("an instruction set of x86-64")
    target = tmp_path / "kernels.o"
    source = f"csrc/cpu/simd_{instructions}.cpp"
    # Less is inlined than in the build, which takes four times as long.
    run("g++", "-std=c++17", "-O1", "-fno-math-errno", "-c", source, "-o", str(target))
    symbols = run("nm", "-C", str(target)).splitlines()
    assert any(re.search(rf"{instructions}::\w*kernels", line) for line in symbols)
    shared = [line for line in symbols if any(f" {kind} " in line for kind in "WVu")]
    assert shared == []
