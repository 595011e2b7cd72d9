"""A model and an optimizer of its own that trains it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .clock import Clock, Mark, Span
from .presets import Batch, Task
from .rivals import Rival

DTYPES = ("fp32", "bf16", "autocast")
BATCHES = 4
Ranges = Callable[[str], AbstractContextManager[object]]


class Setting:
    """A task in a dtype on a device: the model that all contenders start from, and the batches.

    Args:
        task: Its model is moved, and all parameters but the trained ones are frozen.
        dtype: "fp32", "bf16" (parameters and activations) or "autocast" (fp32 parameters).
        device: Where to train.
        seed: Of the batches, several of which take turns.

    Raises:
        ValueError: For an unknown dtype, or a model without layers to train.
    """

    def __init__(self, task: Task, dtype: str, device: torch.device, seed: int) -> None:
        check_dtypes([dtype])
        self.task, self.dtype, self.device = task, dtype, device
        self.tensor_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.trained = task.trained_names()
        names = set(self.trained)
        for name, parameter in task.model.named_parameters():
            parameter.requires_grad_(name in names)
        self.start = task.model.to(device=device, dtype=self.tensor_dtype).train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.batches = [self._moved(task.batch()) for _ in range(BATCHES)]

    def _moved(self, batch: Batch) -> Batch:
        inputs, targets = (t.to(self.device) for t in batch)
        return inputs.to(self.tensor_dtype) if inputs.is_floating_point() else inputs, targets

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of the forward pass."""
        if self.dtype != "autocast":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def copy(self) -> nn.Module:
        """Return the model with trained parameters of its own; it shares the frozen ones."""
        frozen = {id(p): p for p in self.start.parameters() if not p.requires_grad}
        return copy.deepcopy(self.start, frozen)

    def frozen_bytes(self) -> int:
        """Return the bytes that copies share."""
        frozen = [p for p in self.start.parameters() if not p.requires_grad]
        return sum(p.numel() * p.element_size() for p in frozen)


class StepMarks(NamedTuple):
    """Moments of one training step."""

    begin: Mark
    backward: Mark  # its end, where the optimizer's step begins
    end: Mark

    @property
    def whole(self) -> Span:
        """The training step."""
        return self.begin, self.end

    @property
    def optimizer(self) -> Span:
        """The optimizer's step."""
        return self.backward, self.end


class Contender:
    """An optimizer on its own copy of the model."""

    def __init__(self, rival: Rival, setting: Setting) -> None:
        self.rival, self._setting = rival, setting
        self.model = setting.copy()
        parameters = dict(self.model.named_parameters())
        self._trained = {name: parameters[name] for name in setting.trained}
        self.steps = rival.build(
            self.model, list(self._trained.values()), setting.task.loss_average
        )
        self._clock = Clock(setting.device)
        self._done = 0
        self._loss: Tensor | None = None

    def train_step(self, ranges: Ranges = lambda _: nullcontext()) -> StepMarks:
        """Make one training step."""
        begin = self._clock.mark()
        inputs, targets = self._setting.batches[self._done % len(self._setting.batches)]
        self.steps.zero_grad()
        with ranges("forward"), self._setting.autocast():
            loss = self._setting.task.loss(self.model(inputs), targets)
        with ranges("backward"):
            loss.backward()
        backward = self._clock.mark()
        with ranges("step"):
            self.steps.step()
        end = self._clock.mark()
        self._loss, self._done = loss.detach(), self._done + 1
        return StepMarks(begin, backward, end)

    def check(self) -> None:
        """Check that what was timed is training.

        Raises:
            AssertionError: Naming the optimizer, and the parameters that stayed as they were at
                the start, or the layers that singd_ext left out, or a loss that is not finite.
        """
        label = self.rival.label
        assert self._loss is not None and bool(self._loss.isfinite()), (
            f"{label}: the loss is {self._loss}, not finite"
        )
        left_out = self.steps.rejections()
        assert not left_out, f"{label}: updates were not finite in the layers {list(left_out)}"
        if self.rival.trains:
            start = dict(self._setting.start.named_parameters())
            same = [name for name, p in self._trained.items() if torch.equal(p, start[name])]
            assert not same, f"{label}: the parameters {same} did not move in {self._done} steps"


def check_dtypes(names: Sequence[str]) -> None:
    """Raise ValueError for the name of a dtype that a model is not trained in."""
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"dtype is '{name}'; it must be one of {', '.join(DTYPES)}")


def checked_device(name: str) -> torch.device:
    """Return the device.

    Raises:
        ValueError: If it is no device, or none of this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is '{name}', which torch does not know") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is '{name}'; the bench runs on cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is '{name}', but torch finds no CUDA device")
    return device
