"""Small nets with odd sizes, their data, and the one training loop of the trajectory tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MicroBatches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A net and the shape of its input; ``samples`` is None for one without batch dimension.

    The scales are such that weights and factors move by some tenths of themselves in 20 steps of
    the tests' options, and that no step of a factor reaches the default step cap.
    """

    layers: Callable[[], list[nn.Module]]
    samples: int | None
    features: tuple[int, ...]
    loss_scale: float = 3.0
    input_scale: float = 1.0

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*self.layers()).double()

    def batch(self, seed: int, samples: int | None = None) -> tuple[Tensor, Tensor]:
        """A random input with correlated features, and a random target."""
        generator = torch.Generator().manual_seed(seed)
        batch_shape = () if self.samples is None else (samples or self.samples,)

        def random(*shape: int) -> Tensor:
            numbers = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
            return numbers.to(torch.get_default_device())

        x = random(*batch_shape, *self.features)
        x = self.input_scale * (x + 0.5 * x.roll(1, -1) + 0.3)
        with torch.no_grad():
            shape = self.model()(x).shape
        return x, random(*shape)

    def steps(self, count: int, sizes: Sequence[int | None] = (None,)) -> list[MicroBatches]:
        """Micro-batches of the given sizes for every step."""
        return [
            [self.batch(1000 * step + i, size) for i, size in enumerate(sizes)]
            for step in range(1, count + 1)
        ]


def linear_layers() -> list[nn.Module]:
    return [nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 5, bias=False)]


def conv1d_layers() -> list[nn.Module]:
    return [
        nn.Conv1d(3, 6, 3, stride=2, padding=2, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv1d(6, 4, 2, groups=2, dilation=2, bias=False),
    ]


def conv2d_layers() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 6, (3, 2), padding="same"),
        nn.Tanh(),
        nn.Conv2d(6, 4, 2, stride=2, groups=2, bias=False),
        nn.Flatten(-3),
        nn.Linear(24, 5),
    ]


def conv2d_reflect_layers() -> list[nn.Module]:
    return [
        nn.Conv2d(2, 5, 3, padding=(2, 1), dilation=(2, 1), padding_mode="reflect", bias=False),
        nn.Tanh(),
        nn.Conv2d(5, 3, (1, 3), padding="valid"),
    ]


def conv3d_layers() -> list[nn.Module]:
    return [
        nn.Conv3d(2, 4, (2, 3, 2), padding=1, padding_mode="replicate"),
        nn.Tanh(),
        nn.Conv3d(4, 3, (1, 2, 2), stride=(1, 2, 1), bias=False),
    ]


class UsedTwice(nn.Module):
    """One linear layer used twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.shared(x)))


class SometimesUnused(nn.Module):
    """A residual branch taken in about half of the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch = nn.Linear(11, 7), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return h + self.branch(h) if x.mean() > 0.3 else h


CASES = {
    "linear": Case(linear_layers, 9, (11,)),
    "linear_1d": Case(linear_layers, None, (11,), 0.5, 0.5),
    "linear_3d": Case(linear_layers, 5, (4, 11)),
    "linear_4d": Case(linear_layers, 4, (3, 2, 11)),
    "conv1d": Case(conv1d_layers, 4, (3, 11)),
    "conv2d": Case(conv2d_layers, 5, (3, 5, 6), 2.0),
    "conv2d_reflect": Case(conv2d_reflect_layers, 3, (2, 5, 6)),
    "conv2d_unbatched": Case(conv2d_layers, None, (3, 5, 6), 0.3, 0.5),
    "conv3d": Case(conv3d_layers, 3, (2, 3, 4, 3)),
    "used_twice": Case(lambda: [nn.Linear(11, 7), UsedTwice()], 6, (11,)),
    "used_twice_3d": Case(lambda: [nn.Linear(11, 7), UsedTwice()], 6, (3, 11)),
    "sometimes_unused": Case(lambda: [SometimesUnused(), nn.Linear(7, 5)], 6, (11,)),
}


def train(
    model: nn.Module, optimizer, steps: Sequence[MicroBatches], loss_scale: float = 3.0
) -> None:
    """Scaled mean squared error; the micro-batches of a step add up to the loss of their union.

    The optimizer is one of torch's, or the oracle, which wants to start backward passes itself.
    """
    backward = getattr(optimizer, "backward", Tensor.backward)
    for micro_batches in steps:
        optimizer.zero_grad()
        weight = loss_scale / sum(y.numel() for _, y in micro_batches)
        for x, y in micro_batches:
            backward((model(x) - y).square().sum() * weight)
        optimizer.step()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
