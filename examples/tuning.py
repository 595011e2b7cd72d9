"""One option of SINGD changed at a time: the table of docs/tuning.md.

    OMP_NUM_THREADS=1 python examples/tuning.py --epochs 4 --seeds 2

Network, data, schedule and starting point are those of mnist_cnn.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import mean

import torch
from mnist_cnn import load_digits, train
from torch import nn
from torch.optim import AdamW, Optimizer

from singd_ext import SINGD

START = {
    "lr": 1e-2,
    "lr_cov": 0.05,
    "damping": 0.03,
    "weight_decay": 0.05,
    "T": 5,
    "structures": ("hierarchical:8,8", "hierarchical:8,8"),
    "kfac_approx": "reduce",
    "normalize_lr_cov": True,
}


def decaying(step: int) -> float:
    """β₁ from 0.2 to 0.01 within 150 steps."""
    return max(0.01, 0.2 * 0.98**step)


CHANGES = {
    "starting point": {},
    "T=1": {"T": 1},
    "T=20": {"T": 20},
    "lr_cov=0.01": {"lr_cov": 0.01},
    "lr_cov=0.2": {"lr_cov": 0.2},
    "lr_cov=0.2, then 0.01": {"lr_cov": decaying},
    "damping=0.003": {"damping": 0.003},
    "damping=0.3": {"damping": 0.3},
    "lr=0.003": {"lr": 3e-3},
    "lr=0.03": {"lr": 3e-2},
    "lr=0.1": {"lr": 1e-1},
    "weight_decay=0": {"weight_decay": 0.0},
    "normalize_lr_cov=False": {"normalize_lr_cov": False},
    "T=1, lr=0.003": {"T": 1, "lr": 3e-3},
    "T=1, damping=0.3": {"T": 1, "damping": 0.3},
    "lr=0.03, damping=0.3": {"lr": 3e-2, "damping": 0.3},
}


def contenders() -> dict[str, Callable[[nn.Module], Optimizer]]:
    """Name -> function that makes the optimizer of a network."""
    singd = {name: partial(SINGD, **{**START, **change}) for name, change in CHANGES.items()}
    adamw = {
        f"AdamW, lr={lr}": lambda net, lr=lr: AdamW(net.parameters(), lr=lr)
        for lr in (1e-3, 3e-3, 1e-2)
    }
    return {**singd, "SINGD, all defaults": SINGD, **adamw}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the first two rows, one epoch")
    args = parser.parse_args()
    rows, epochs, seeds = list(contenders().items()), args.epochs, args.seeds
    if args.quick:
        rows, epochs, seeds = rows[:2], 1, 1

    images, labels = load_digits(torch.float32)
    print("| changed | test error, % | training loss | seconds |\n|---|---|---|---|")
    for name, make_optimizer in rows:
        runs = [
            list(train(make_optimizer, images, labels, seed, epochs))[-1] for seed in range(seeds)
        ]
        errors = ", ".join(f"{run.errors[-1]:.1f}" for run in runs)
        loss, seconds = mean(r.losses[-1] for r in runs), mean(r.seconds for r in runs)
        print(f"| {name} | {errors} | {loss:.4f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
