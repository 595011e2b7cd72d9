"""What is trained: a model, its batches, its loss, and which parameters the optimizers share.

Every optimizer trains the same parameters, those that SINGD preconditions: of transformers the
linear layers inside the blocks, of ResNet the convolutions and the classifier, of a model of the
user's all supported layers. All other parameters are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..construction import supported_parameters
from .models import GPT, ManyLayers, ResNet, ViT

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model and how it is trained.

    Attributes:
        model: The network.
        batch: Returns a new batch: what the model takes, and the targets.
        loss: From the model's output and the targets, a mean as `loss_average` says.
        description: Model and batch in words.
        loss_average: SINGD's option: "batch", "batch+sequence" or None.
        trained: Modules whose parameters are trained. None: all that SINGD supports.
    """

    model: nn.Module
    batch: Callable[[], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    description: str
    loss_average: str | None = "batch"
    trained: Sequence[nn.Module] | None = None

    def trained_names(self) -> list[str]:
        """Return the names of the trained parameters.

        Raises:
            ValueError: If there are none.
        """
        if self.trained is None:
            ids = {id(p) for p in supported_parameters(self.model) if p.requires_grad}
        else:
            ids = {id(p) for m in self.trained for p in m.parameters() if p.requires_grad}
        names = [name for name, p in self.model.named_parameters() if id(p) in ids]
        if not names:
            raise ValueError(f"{self.description}: no layer that SINGD trains (Linear, Conv)")
        return names


@dataclass(frozen=True)
class GPTSize:
    """Sizes of a GPT and of its batch."""

    vocabulary: int
    blocks: int
    width: int
    heads: int
    sequence: int
    batch: int

    def task(self) -> Task:
        """Return next-token prediction on random tokens."""
        model = GPT(self.vocabulary, self.sequence, self.blocks, self.width, self.heads)

        def batch() -> Batch:
            tokens = torch.randint(self.vocabulary, (self.batch, self.sequence + 1))
            return tokens[:, :-1], tokens[:, 1:]

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

        description = (
            f"GPT, {self.blocks} blocks of width {self.width}, batch of {self.batch} × "
            f"{self.sequence} random tokens; trained: the blocks' linear layers"
        )
        linears = _linears(model.blocks)
        return Task(model, batch, loss, description, "batch+sequence", linears)


@dataclass(frozen=True)
class ViTSize:
    """Sizes of a ViT and of its batch."""

    image: int
    patch: int
    blocks: int
    width: int
    heads: int
    classes: int
    batch: int

    def task(self) -> Task:
        """Return classification of random images."""
        model = ViT(self.image, self.patch, self.blocks, self.width, self.heads, self.classes)
        description = (
            f"ViT, {self.blocks} blocks of width {self.width}, batch of {self.batch} random images "
            f"of {self.image} × {self.image}; trained: the blocks' linear layers"
        )
        batch = _images(self.batch, self.image, self.classes)
        return Task(model, batch, _classification, description, trained=_linears(model.blocks))


@dataclass(frozen=True)
class ResNetSize:
    """Sizes of a ResNet and of its batch."""

    image: int
    stages: tuple[int, ...]
    width: int
    classes: int
    batch: int

    def task(self) -> Task:
        """Return classification of random images."""
        model = ResNet(self.stages, self.width, self.classes)
        description = (
            f"ResNet, stages of {', '.join(map(str, self.stages))} blocks, batch of {self.batch} "
            f"random images of {self.image} × {self.image}; trained: convolutions and classifier"
        )
        batch = _images(self.batch, self.image, self.classes)
        return Task(model, batch, _classification, description)


@dataclass(frozen=True)
class ManyLayersSize:
    """Sizes of a network of small layers, whose kernels take no time, and of its batch."""

    layers: int
    width: int
    batch: int

    def task(self) -> Task:
        """Return classification of random vectors."""
        model = ManyLayers(self.layers, self.width)
        description = (
            f"{self.layers} linear layers of {self.width} × {self.width}, batch of {self.batch}"
        )

        def batch() -> Batch:
            return torch.randn(self.batch, self.width), torch.randint(self.width, (self.batch,))

        return Task(model, batch, _classification, description)


Size = GPTSize | ViTSize | ResNetSize | ManyLayersSize

PRESETS: dict[str, Size] = {
    "tiny": GPTSize(vocabulary=256, blocks=2, width=64, heads=4, sequence=32, batch=4),
    "gpt2-small": GPTSize(50257, blocks=12, width=768, heads=12, sequence=1024, batch=8),
    "gpt2-medium": GPTSize(50257, blocks=24, width=1024, heads=16, sequence=1024, batch=8),
    "vit-b": ViTSize(224, 16, blocks=12, width=768, heads=12, classes=1000, batch=64),
    "resnet50": ResNetSize(224, (3, 4, 6, 3), width=64, classes=1000, batch=64),
    "many-layers": ManyLayersSize(layers=100, width=8, batch=4),
}

# The same networks so small that they only show that everything runs.
SMALL: dict[str, Size] = {
    "tiny": GPTSize(32, blocks=1, width=16, heads=2, sequence=6, batch=2),
    "gpt2-small": GPTSize(40, blocks=2, width=24, heads=2, sequence=8, batch=2),
    "gpt2-medium": GPTSize(40, blocks=3, width=32, heads=4, sequence=8, batch=2),
    "vit-b": ViTSize(16, 8, blocks=2, width=24, heads=2, classes=10, batch=2),
    "resnet50": ResNetSize(32, (1, 1), width=4, classes=10, batch=2),
    "many-layers": ManyLayersSize(layers=5, width=4, batch=2),
}


def preset(name: str, *, small: bool = False, batch: int | None = None) -> Task:
    """Return a preset's task.

    Args:
        name: One of `PRESETS`.
        small: The same network, so small that it only shows that everything runs.
        batch: Sequences or images a step, instead of the preset's.

    Raises:
        ValueError: For an unknown name, or a batch < 1.
    """
    sizes = SMALL if small else PRESETS
    if name not in sizes:
        raise ValueError(f"there is no preset '{name}'; presets are {', '.join(PRESETS)}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    return (sizes[name] if batch is None else replace(sizes[name], batch=batch)).task()


def build(
    name: str, model: str | None, *, small: bool, batch: int | None, seed: int
) -> tuple[str, Task]:
    """Return title and task of a preset, or of a user's factory if `model` names one.

    Weights are those of the seed; torch's own generator stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model is not None:
            return model, load(model)
        title = name + (", small form" if small else "") + (f", batch {batch}" if batch else "")
        return title, preset(name, small=small, batch=batch)


def load(spec: str) -> Task:
    """Return the task of a user's factory.

    Args:
        spec: "module:factory". The factory takes no arguments and returns (model, batch, loss):
            the network; a function without arguments that returns a new (input, target), where the
            first dimension of the input is the batch; a function (output, target) → loss, a mean
            over the batch. Or it returns a `Task`, which says more.

    Raises:
        ValueError: If spec, factory or what it returns is not like this.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"--model is '{spec}'; it must be like 'module:factory'")
    try:
        factory = getattr(import_module(module_name), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # found, but it needs something that is not there
        raise ValueError(f"--model {spec}: there is no module '{error.name}'") from error
    except AttributeError as error:
        raise ValueError(f"--model {spec}: '{module_name}' has no '{name}'") from error
    made = factory()
    if isinstance(made, Task):
        return made
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module)):
        raise ValueError(
            f"--model {spec}: the factory must return (model, batch, loss) or a "
            f"singd_ext.bench.presets.Task, not {type(made).__name__}"
        )
    model, batch, loss = made
    return Task(model, batch, loss, f"{type(model).__name__} of {spec}")


def _linears(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _images(batch: int, size: int, classes: int) -> Callable[[], Batch]:
    return lambda: (torch.randn(batch, 3, size, size), torch.randint(classes, (batch,)))


def _classification(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)
