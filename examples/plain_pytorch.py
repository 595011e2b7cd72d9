"""A transformer in plain PyTorch: SINGD for its matrices, AdamW for norms and embeddings.

    python examples/plain_pytorch.py                    # AdamW inside SINGD: fallback="adamw"
    python examples/plain_pytorch.py --two-optimizers   # AdamW beside SINGD

Digits of 8 × 8 pixels are read as sequences of 8 rows.
"""

from __future__ import annotations

import argparse

import torch
from digits import accuracy, digits, loaders
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from singd_ext import SINGD


class Transformer(nn.Module):
    """Rows of pixels to class scores."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.zeros(8, width))
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.embed(images.squeeze(1)) + self.position
        return self.head(self.encoder(rows).mean(1))


SINGD_OPTIONS = {
    "lr": 1e-2,
    "lr_cov": 0.05,
    "damping": 0.03,
    "weight_decay": 0.05,
    "T": 1,
    "structures": ("block_diagonal:16", "block_diagonal:16"),
    "normalize_lr_cov": True,
}


def make_optimizers(model: nn.Module, two: bool) -> list[Optimizer]:
    """One optimizer that trains the whole model, or SINGD and AdamW side by side."""
    if not two:
        return [SINGD(model, **SINGD_OPTIONS, fallback="adamw")]
    singd = SINGD(model, **SINGD_OPTIONS, warn_unsupported=False)
    taken = {id(p) for group in singd.param_groups for p in group["params"]}
    return [singd, AdamW(p for p in model.parameters() if id(p) not in taken)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--two-optimizers", action="store_true")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="3 epochs")
    args = parser.parse_args()
    epochs = 3 if args.quick else args.epochs

    torch.manual_seed(0)
    model = Transformer()
    training, _ = loaders(batch_size=64)
    optimizers = make_optimizers(model, args.two_optimizers)
    steps = epochs * len(training)
    schedulers = [LambdaLR(optimizer, lambda step: 1 - step / steps) for optimizer in optimizers]
    for epoch in range(epochs):
        for images, labels in training:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")
    print(f"test accuracy {accuracy(model, *digits()[1].tensors):.1f} %")


if __name__ == "__main__":
    main()
