"""What nvcc makes of the kernels in csrc/cuda: no spills, wide accesses, tensor cores.

Compiling needs nvcc. Looking into the result needs cuobjdump and nvdisasm, which the PyPI packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm bring. Nothing here needs a GPU.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "cmake"))
import cuda_build  # noqa: E402

CSRC = ROOT / "csrc"
SOURCES = sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))

# Registers and threads of one multiprocessor, from compute capability 8.0 to 10.0.
REGISTERS = 65536
# So many threads of a kernel fit on one, to hide the latency of memory; half as many where it
# computes in float64, whose values take two registers.
RESIDENT_THREADS = 512

# Opcodes as disassembled; modifiers such as the cache policy come between.
LOAD_16 = r"LDG\.E\.(\w+\.)*128"
COPY_16 = r"LDGSTS\.E\.BYPASS\.128"  # to shared memory past the registers
STORE_16 = r"STG\.E\.(\w+\.)*128"
TENSOR_CORE = r"HMMA\.16816\.F32"
MATRIX_LOAD = r"LDSM\.16\."  # of operands of the tensor cores
LOCAL_MEMORY = r"(LDL|STL)\b"
FLOAT64 = r"DFMA"

# Template arguments as mangled. The same type again is a reference to the first one.
HALF, BFLOAT16, FLOAT, DOUBLE = "6__half", "13__nv_bfloat16", "f", "d"
LOW_PRECISION, SINGLE = (HALF, BFLOAT16), (HALF, BFLOAT16, FLOAT)
EVERY = (*SINGLE, DOUBLE)
AGAIN = r"S\w*_"
VECTOR_ROWS = r".*9RowAccessE0E"  # rows that can be read 16 bytes at a time
COMPUTE_TYPE = {HALF: FLOAT, BFLOAT16: FLOAT, FLOAT: FLOAT, DOUBLE: DOUBLE}


@dataclass(frozen=True)
class Expected:
    """Kernels by name and a pattern of their first template arguments, and what they consist of."""

    kernel: str
    arguments: str
    opcodes: tuple[str, ...]

    def matches(self, symbol: str) -> bool:
        return bool(re.search(f"{len(self.kernel)}{self.kernel}I{self.arguments}", symbol))

    def __str__(self) -> str:
        return f"{self.kernel}<{self.arguments}>"


def elements(dtype: str) -> str:
    """The template argument of the step's kernels: compute type and type in memory."""
    return f".*ElementsI{COMPUTE_TYPE[dtype]}{dtype}E"


EXPECTED = [
    *(Expected("scatter_entries", t, (STORE_16,)) for t in EVERY),
    # The statistic: rows are read once, 16 bytes at a time.
    *(Expected("load_rows_kernel", t + VECTOR_ROWS, (LOAD_16, STORE_16)) for t in EVERY),
    *(Expected("column_sums_kernel", t + VECTOR_ROWS, (LOAD_16,)) for t in EVERY),
    *(
        Expected("border_product_kernel", t + VECTOR_ROWS, (LOAD_16,))
        for t in (HALF, FLOAT, DOUBLE)
    ),
    *(Expected("border_product_narrow_kernel", t, (LOAD_16,)) for t in EVERY),
    Expected("border_product_bfloat16_kernel", VECTOR_ROWS, (LOAD_16, TENSOR_CORE)),
    Expected("border_product_bfloat16_kernel", "", (TENSOR_CORE, MATRIX_LOAD)),
    *(Expected("block_gram_kernel", t + VECTOR_ROWS, (COPY_16,)) for t in EVERY),
    *(Expected("bordered_gram_kernel", t + AGAIN + VECTOR_ROWS, (COPY_16,)) for t in LOW_PRECISION),
    *(Expected("bordered_gram_kernel", 2 * t + VECTOR_ROWS, (COPY_16,)) for t in (FLOAT, DOUBLE)),
    *(Expected("block_gram_kernel", t, (TENSOR_CORE, MATRIX_LOAD)) for t in LOW_PRECISION),
    *(
        Expected("bordered_gram_kernel", t + AGAIN, (TENSOR_CORE, MATRIX_LOAD))
        for t in LOW_PRECISION
    ),
    # The step.
    *(Expected("stream_update_kernel", elements(t), (LOAD_16, STORE_16)) for t in EVERY),
    *(
        Expected("matrix_update_kernel", elements(t), (LOAD_16, STORE_16, TENSOR_CORE))
        for t in SINGLE
    ),
    *(
        Expected("matrix_update_kernel", elements(t) + blocks, (MATRIX_LOAD,))
        for t in SINGLE
        for blocks in (".*TileKindILb1", ".*TileKindILb0ELb1")
    ),
    *(Expected("matrix_products_kernel", elements(t), (LOAD_16, TENSOR_CORE)) for t in SINGLE),
    *(Expected("tiled_update_kernel", elements(t), (LOAD_16, STORE_16)) for t in EVERY),
    *(Expected("thin_products_kernel", elements(t), (LOAD_16,)) for t in EVERY),
    *(Expected("thin_row_products_kernel", t, (LOAD_16,)) for t in (FLOAT, DOUBLE)),
]


@dataclass(frozen=True)
class Kernel:
    source: str
    symbol: str
    registers: int
    threads: int | None  # of a block, if the kernel declares them
    opcodes: list[str]

    def has(self, opcode: str) -> bool:
        return any(re.match(opcode, name) for name in self.opcodes)


def tool(name: str) -> str:
    """A program of the CUDA toolkit, from its PyPI package, a toolkit or PATH; skips without it."""
    toolkit = cuda_build.find_toolkit()
    folders = [*Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    if toolkit is not None:
        folders.append(toolkit.home / "bin")
    found = shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} was not found: pip install nvidia-cuda-{name}")
    return found


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@dataclass(frozen=True)
class Compilation:
    cubin: Path
    messages: str  # warnings and errors


@pytest.fixture(scope="session")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compilation]:
    """Every kernel file, compiled as setup.py does, but for sm_90 only."""
    toolkit, folder = cuda_build.find_toolkit(), tmp_path_factory.mktemp("cubins")
    if toolkit is None:
        pytest.skip("no CUDA toolkit with nvcc and headers was found")
    flags = [*cuda_build.FLAGS, *cuda_build.gencode(["9.0"]), "-cubin"]

    def compile_one(source: str) -> Compilation:
        cubin = folder / f"{Path(source).stem}.cubin"
        result = subprocess.run(
            [str(toolkit.nvcc), *flags, "-o", str(cubin), str(CSRC / "cuda" / source)],
            capture_output=True,
            text=True,
        )
        return Compilation(cubin, result.stdout + result.stderr)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(SOURCES, pool.map(compile_one, SOURCES), strict=True))


@pytest.fixture(scope="session")
def kernels(compilations: dict[str, Compilation]) -> list[Kernel]:
    cuobjdump = tool("cuobjdump")
    nvdisasm = tool("nvdisasm")
    found: list[Kernel] = []
    for source, compilation in compilations.items():
        if not compilation.cubin.exists():
            continue  # the test below says why
        usage = run(cuobjdump, "-res-usage", compilation.cubin)
        registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", usage))
        threads = declared_threads(run(cuobjdump, "-elf", compilation.cubin))
        for symbol, opcodes in disassembled(run(nvdisasm, "-c", compilation.cubin)).items():
            count = int(registers[symbol])
            found.append(Kernel(source, symbol, count, threads.get(symbol), opcodes))
    return found


def declared_threads(elf: str) -> dict[str, int]:
    """The block size that each kernel declares with __launch_bounds__."""
    threads = {}
    for section in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        bound = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x(\w+)", section)
        if bound:
            threads[section.split(None, 1)[0]] = int(bound[1], 16)
    return threads


def disassembled(text: str) -> dict[str, list[str]]:
    """The opcodes of each kernel, in order."""
    functions = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    instruction = re.compile(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    return {
        symbol: instruction.findall(body)
        for symbol, body in zip(functions[1::2], functions[2::2], strict=True)
    }


@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_warnings_and_spills(
    source: str, compilations: dict[str, Compilation]
) -> None:
    assert compilations[source].cubin.exists(), compilations[source].messages
    assert not compilations[source].messages


def offenders(kernels: list[Kernel], is_bad: Callable[[Kernel], bool]) -> list[str]:
    assert kernels
    return [f"{kernel.source}: {kernel.symbol}" for kernel in kernels if is_bad(kernel)]


def test_no_kernel_uses_local_memory(kernels: list[Kernel]) -> None:
    assert not offenders(kernels, lambda kernel: kernel.has(LOCAL_MEMORY))


def test_registers_leave_room_for_enough_threads(kernels: list[Kernel]) -> None:
    """Every kernel declares its block with __launch_bounds__; registers come in steps of 8."""

    def is_bad(kernel: Kernel) -> bool:
        if kernel.threads is None:
            return True
        allotted = (kernel.registers + 7) // 8 * 8 * kernel.threads
        needed = RESIDENT_THREADS // 2 if kernel.has(FLOAT64) else RESIDENT_THREADS
        return REGISTERS // allotted * kernel.threads < needed

    assert not offenders(kernels, is_bad)


@pytest.mark.parametrize("expected", EXPECTED, ids=str)
def test_kernels_use_wide_accesses_and_tensor_cores(
    expected: Expected, kernels: list[Kernel]
) -> None:
    chosen = [kernel for kernel in kernels if expected.matches(kernel.symbol)]
    assert chosen, f"no kernel matches {expected}"
    for opcode in expected.opcodes:
        lacking = [kernel.symbol for kernel in chosen if not kernel.has(opcode)]
        assert not lacking, f"no {opcode} in {lacking}"
