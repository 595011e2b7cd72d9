"""`python -m singd_ext.info`: what a bug report needs to know about this installation."""

from __future__ import annotations

import platform

import torch

from . import _C, __version__

OPERATORS = (
    "project",
    "project_gram",
    "extract",
    "to_dense",
    "structured_matmul",
    "structured_product",
    "factor_gram",
    "accumulate_statistic_",
    "update_factors_",
    "preconditioned_update_",
)


def collect() -> dict[str, str]:
    """Return the facts, one line of text each."""
    build = _C.build_info()
    cuda = torch.version.cuda or "not in this torch"
    bfloat16 = "with" if _C.cpu_bfloat16_instructions() else "without"
    tiles = "with" if _C.cpu_tiles() else "without"
    facts = {
        "singd_ext": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (built with {build['torch']})",
        "compiler": f"{build['compiler']}, C++ {build['c++']}",
        "processor": f"{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}, "
        f"singd_ext {_C.cpu_instructions()} {bfloat16} bfloat16 instructions, {tiles} AMX tiles",
        "float32 products": "oneDNN's" if _C.cpu_onednn_products() else "those of torch.mm",
        "threads": f"torch has {torch.get_num_threads()}, singd_ext uses {_C.cpu_threads()}",
        "CUDA of torch": cuda,
        "CUDA device": _cuda_device(),
        "CUDA kernels": _cuda_kernels(build.get("cuda")),
    }
    for device in build["devices"].split():
        facts[f"kernels for {device}"] = ", ".join(kernels(device))
    return facts


def kernels(device: str) -> list[str]:
    """Return the operators that have a kernel for a device type."""
    key = device.upper()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in OPERATORS if has_kernel(f"singd_ext::{name}", key)]


def _cuda_kernels(build: str | None) -> str:
    """Say what "13.0,8.0,9.0+PTX" means."""
    if build is None:
        return "none: built without CUDA kernels"
    toolkit, *architectures = build.split(",")
    return f"built with CUDA {toolkit} for {', '.join(architectures)}"


def _cuda_device() -> str:
    if not torch.cuda.is_available():
        return "none visible"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}"


def main() -> None:
    """Print the facts."""
    facts = collect()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:{width}}  {fact}")


if __name__ == "__main__":
    main()
