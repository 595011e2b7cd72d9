"""A narrow ResNet of timm, trained with SINGD; nothing is downloaded.

    python examples/timm_digits.py

timm needs torchvision, which must fit the installed build of torch.
"""

from __future__ import annotations

import argparse

import timm
import torch
from digits import accuracy, digits, loaders
from timm.scheduler import CosineLRScheduler
from torch.nn.functional import cross_entropy

from singd_ext import SINGD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="3 epochs")
    args = parser.parse_args()
    epochs = 3 if args.quick else args.epochs

    torch.manual_seed(0)
    model = timm.create_model(
        "resnet10t",
        in_chans=1,
        num_classes=10,
        stem_width=16,
        channels=(16, 32, 64, 128),
    )
    optimizer = SINGD(
        model,
        lr=1e-2,
        lr_cov=0.05,
        damping=0.03,
        weight_decay=0.05,
        T=5,
        structures=("block_diagonal:16", "block_diagonal:16"),
        kfac_approx="reduce",
        normalize_lr_cov=True,
        fallback="adamw",
    )
    training, _ = loaders(batch_size=64)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs)
    for epoch in range(epochs):
        for images, labels in training:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        scheduler.step(epoch + 1)
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")
    print(f"test accuracy {accuracy(model, *digits()[1].tensors):.1f} %")


if __name__ == "__main__":
    main()
