"""The machine of a run, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from .. import __version__


def describe(device: str) -> dict[str, str]:
    """Return the facts that figures depend on, one line of text each."""
    facts = {
        "device": _gpu() if torch.device(device).type == "cuda" else "CPU",
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "singd_ext": __version__,
    }
    if torch.version.cuda:
        facts["CUDA"] = torch.version.cuda
    return facts


def busy() -> str | None:
    """Return a warning if other programs were running, which makes times long and uneven."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < 0.5 * cores:
        return None
    return f"the load before the run was {load:.1f} on {cores} cores: other programs may cost time"


def _processor() -> str:
    """The model's name, as Linux knows it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str:
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory, l2 = facts.total_memory / 2**30, facts.L2_cache_size / 2**20
    return (
        f"{facts.name}, sm_{facts.major}{facts.minor}, {memory:.0f} GiB, L2 cache of {l2:.0f} MiB"
    )
