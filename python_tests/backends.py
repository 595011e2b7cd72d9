"""The implementations of the operators that tests run on.

`cpu` is the CPU twin; `cuda-emulated` are the launchers and kernels of csrc/cuda, run on the CPU by
csrc/emulation; `cuda` the same on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from singd_ext import _C, ops
from singd_ext.incidents import Incidents

BACKENDS = ("cpu", "cuda-emulated", "cuda")


def _load_emulation() -> ModuleType | None:
    """The library of the emulator; SINGD_EMULATION_FOLDER names another build of it."""
    if folder := os.environ.get("SINGD_EMULATION_FOLDER"):
        (library,) = Path(folder).rglob("_emulation*.so")
        spec = spec_from_file_location("_emulation", library)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if find_spec("singd_ext._emulation") is None:
        return None
    return import_module("singd_ext._emulation")


emulation = _load_emulation()


def missing(backend: str) -> str | None:
    """Why tests cannot run on this backend, or None."""
    if backend == "cuda-emulated" and emulation is None:
        return "built without SINGD_EMULATION=1, which needs the headers of the CUDA toolkit"
    if backend == "cuda" and "cuda" not in _C.build_info()["devices"].split():
        return "built without CUDA kernels"
    if backend == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return None


@contextmanager
def use(backend: str, seed: int = 1) -> Iterator[None]:
    """Let `singd_ext.ops`, and all that is built on it, run on a backend.

    New tensors are on its device. `seed` shuffles the emulated threads.
    """
    before = ops._ops
    if backend == "cuda-emulated":
        ops._ops = torch.ops.singd_emulated
        emulation.set_seed(seed)
    if backend == "cuda":
        torch.set_default_device("cuda")
        Incidents.wait = True
    try:
        yield
    finally:
        Incidents.wait = False
        ops._ops = before
        torch.set_default_device(None)
