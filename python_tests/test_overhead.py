"""What a layer adds to a step outside the kernels, as counts: Python calls and operator calls."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from singd_ext import SINGD


class OperatorCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def python_calls(function: Callable[[], Any]) -> int:
    count = 0

    def see(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


class Training:
    def __init__(self, layers: int, observed: bool = True, T: int = 10) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        self.optimizer = SINGD(self.model, structures=("diagonal", "diagonal"), T=T, lr_cov=1e-3)
        if not observed:
            self.optimizer.remove_hooks()
        for _ in range(2):  # the first steps create state; the second is not due
            self.passes()
            self.optimizer.step()

    def passes(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 4)).square().mean().backward()


def per_layer(count: Callable[[int], int]) -> float:
    return (count(60) - count(20)) / 40


def test_python_calls_of_a_step_that_is_not_due() -> None:
    def count(layers: int) -> int:
        training = Training(layers)
        training.passes()
        return python_calls(training.optimizer.step)

    assert per_layer(count) <= 60


def test_python_calls_of_hooks_in_a_pass_that_is_not_due() -> None:
    def count(layers: int, observed: bool) -> int:
        return python_calls(Training(layers, observed).passes)

    hooks = per_layer(lambda n: count(n, True)) - per_layer(lambda n: count(n, False))
    assert hooks <= 20


@pytest.mark.parametrize("due", [True, False])
def test_a_step_calls_each_operator_once_however_many_layers(due: bool) -> None:
    names = []
    for layers in (5, 25):
        training = Training(layers, T=1 if due else 10)
        training.passes()
        with OperatorCalls() as calls:
            training.optimizer.step()
        names.append([name for name in calls.names if name.startswith("singd_ext")])
    update = ["singd_ext.update_factors_.default"] if due else []
    assert names[0] == names[1] == [*update, "singd_ext.preconditioned_update_.default"]


def test_other_calls_of_a_step_that_is_not_due_do_not_grow_with_the_layers() -> None:
    names = []
    for layers in (5, 25):
        training = Training(layers)
        training.passes()
        with OperatorCalls() as calls:
            training.optimizer.step()
        names.append(calls.names)
    assert names[0] == names[1]


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("T", [1, 10])
def test_python_calls_of_a_step_of_one_layer(T: int, scheduled: bool) -> None:
    """After a backward pass each is a wait for memory. A scheduler's new lr is checked alone."""
    training = Training(1, T=T)
    training.passes()
    if scheduled:
        training.optimizer.param_groups[0]["lr"] = 0.01
    assert python_calls(training.optimizer.step) <= (52 if scheduled else 25)
