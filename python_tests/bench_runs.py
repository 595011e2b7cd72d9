"""Runs of the bench of training in its smallest form, for its tests."""

import torch

from singd_ext.bench import presets, rivals, training
from singd_ext.bench.contender import Contender, Setting
from singd_ext.bench.training import TrainingOptions

CPU = torch.device("cpu")
QUICK = {"small": True, "rounds": 2, "steps": 1, "periods": (1, 2), "structures": ("diagonal",)}


def quick(**changes) -> TrainingOptions:
    return TrainingOptions(**(QUICK | changes))


def run(**changes) -> tuple[list, list[str]]:
    """Rows and notes of a quick run."""
    notes: list[str] = []
    return training.run(quick(**changes), note=notes.append), notes


def setting(preset: str = "tiny", dtype: str = "fp32") -> Setting:
    return Setting(presets.preset(preset, small=True), dtype, CPU, seed=0)


def contender(name: str, structure: str = "") -> Contender:
    """One optimizer on the small form of "tiny"."""
    start = setting()
    wanted = ("sgd", "muon", "singd")
    chosen, _ = rivals.rivals(wanted, [structure or "diagonal"], list(start.start.parameters()))
    return Contender(next(r for r in chosen if r.name == name), start)
