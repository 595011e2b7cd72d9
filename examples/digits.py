"""The handwritten digits of scikit-learn: 1,797 images of 8 × 8, for the examples here."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TRAINING_IMAGES = 1437


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return (training set, test set) of images [1, 8, 8] in [0, 1] and labels, always the same."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    targets = torch.tensor(labels)[order]
    n = TRAINING_IMAGES
    return TensorDataset(images[:n], targets[:n]), TensorDataset(images[n:], targets[n:])


def loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Return (training batches, shuffled; test batches)."""
    training, test = digits()
    return DataLoader(training, batch_size, shuffle=True), DataLoader(test, batch_size)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of rightly classified images, in percent."""
    was_training = model.training
    model.eval()
    right = (model(images).argmax(1) == labels).float().mean().item()
    model.train(was_training)
    return 100 * right
