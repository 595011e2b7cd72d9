"""A net with parameters that SINGD does not precondition, for the tests of whole models."""

from collections.abc import Sequence
from typing import Any

import torch
from nets import OPTIONS
from torch import Tensor, nn

from singd_ext import SINGD


class Whole(nn.Module):
    """Embedding, bare parameter, norm and two linear layers."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4, sparse=sparse)
        self.position = nn.Parameter(torch.randn(3, 4))
        self.norm = nn.LayerNorm(4)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.norm(self.embedding(x) + self.position))


# Not of a supported layer, in the order of the model's parameters.
OTHERS = ["position", "embedding.weight", "norm.weight", "norm.bias"]


def others(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of `OTHERS`."""
    return [model.get_parameter(name) for name in OTHERS]


def tokens(seed: int, samples: int = 6) -> Tensor:
    """Input of `Whole`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(7, (samples, 3), generator=generator)


def whole_loss(model: nn.Module, seed: int) -> Tensor:
    """Mean over the samples."""
    return (model(tokens(seed)) - 0.7).square().sum(dim=(1, 2)).mean()


def train_whole(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], seeds: Sequence[int]
) -> None:
    """A step of all optimizers on the data of every seed."""
    for seed in seeds:
        for optimizer in optimizers:
            optimizer.zero_grad()
        whole_loss(model, seed).backward()
        for optimizer in optimizers:
            optimizer.step()


def one(**options: Any) -> tuple[Whole, SINGD]:
    """A net and the one optimizer of all of it."""
    model = Whole()
    return model, SINGD(model, **{**OPTIONS, "fallback": "adamw", **options})


def singd_alone(model: nn.Module, **options: Any) -> SINGD:
    """SINGD of the supported layers, as in a run with a second optimizer beside it."""
    return SINGD(model, warn_unsupported=False, **{**OPTIONS, **options})
