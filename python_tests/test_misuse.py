"""What users do wrong: the error says what and where, and nothing is changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import OPTIONS, assert_bitwise, backward, inputs, mlp, snapshot
from torch import nn

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]


# -------------------------------------------------------------------- first contact


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m: (m.parameters(),), "model is a generator; SINGD takes the network itself"),
        (lambda m: (list(m.parameters()),), "model is a list; SINGD takes the network itself"),
        (lambda m: (m, 1e-3), "params is 0.001; .* give other arguments by name"),
        (lambda m: (m, "0.weight"), "params is '0.weight'; it must hold parameters"),
        (lambda m: (m, ["0.weight"]), "params contains '0.weight'; it must hold parameters"),
        (lambda m: (m, [{"params": ["a"]}]), "params contains 'a'; it must hold parameters"),
    ],
    ids=["parameters", "list", "lr", "name", "names", "names in a group"],
)
def test_arguments_in_the_place_of_others(arguments: Callable, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SINGD(*arguments(mlp()))


def test_model_without_anything_to_train() -> None:
    with pytest.raises(ValueError, match="no trainable parameter of a supported layer"):
        SINGD(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="no trainable parameter"):
        SINGD(mlp().requires_grad_(False), fallback="adamw")


def test_inference_mode_at_construction_makes_no_difference() -> None:
    snapshots = []
    for inference in (True, False):
        model = mlp()
        with torch.inference_mode(inference):
            optimizer = SINGD(model, **OPTIONS)
        for step in range(3):
            backward(model, optimizer, inputs(4, 5, seed=step))
            optimizer.step()
        snapshots.append(snapshot(model, optimizer))
    assert_bitwise(*snapshots)


def test_factors_without_memory_are_named_and_nothing_is_added() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2_000_000))  # C: 16 TB
    optimizer = SINGD(model, model[0].parameters())
    state = optimizer.state_dict()
    with pytest.raises(RuntimeError, match="layer '1' has no memory for its factors: K is 5 x 5"):
        optimizer.add_param_group({"params": model[1].parameters()})
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert list(optimizer.factors()) == list(optimizer.rejections()) == ["0"]
    sparse = ("diagonal", "diagonal")
    optimizer.add_param_group({"params": model[1].parameters(), "structures": sparse})
    assert list(optimizer.factors()) == ["0", "1"]


# -------------------------------------------------------------------- groups


def _whole() -> tuple[nn.Module, SINGD]:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]
    optimizer = SINGD(model, [*groups, {"params": model[1].parameters()}], fallback="adamw")
    return model, optimizer


def _delete(key: str) -> Callable[[list[Any]], None]:
    return lambda groups: groups[0].pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups: groups.clear(), r"param_groups\[0\] was removed"),
        (lambda groups: groups.pop(0), "parameter group 1 lacks the options"),
        (lambda groups: groups.reverse(), "parameter group 0 lacks the options"),
        (lambda groups: groups[0]["params"].pop(), r"param_groups\[0\] has other parameters"),
        (lambda groups: groups[1]["params"].append(torch.ones(1)), r"\[1\] has other parameters"),
        (_delete("params"), r"param_groups\[0\] has other parameters"),
        (_delete("T"), r"parameter group 0 lacks the options \['T'\]"),
        (_delete("damping"), r"parameter group 0 lacks the options \['damping'\]"),
        (_delete("steps"), "'steps' of a parameter group is missing"),
        (lambda groups: groups[0].update(steps="x"), "'steps' of a parameter group is 'x'"),
        (lambda groups: groups[0].update(T=2**63), f"'T' of a parameter group is {2**63}"),
    ],
    ids=["cleared", "popped", "reversed", "fewer", "more", "no params", "no T", "no damping",
         "no steps", "steps", "T"],
)  # fmt: skip
def test_changed_groups_are_refused(change: Callable, message: str) -> None:
    model, optimizer = _whole()
    before = [p.clone() for p in model.parameters()]
    change(optimizer.param_groups)
    with pytest.raises((ValueError, RuntimeError), match=message):  # autograd's are RuntimeErrors
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)


# -------------------------------------------------------------------- changed parameters


def _new_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn(8, 6))


def _no_bias(layer: nn.Linear) -> None:
    layer.bias = None


@pytest.mark.parametrize("change", [_new_weight, _no_bias])
@pytest.mark.parametrize("T", [1, 10])
def test_replaced_parameter_is_named_between_updates_too(change: Callable, T: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    optimizer = SINGD(model, T=T)

    def gradients() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()

    gradients()
    optimizer.step()
    change(model[0])
    gradients()
    with pytest.raises(RuntimeError, match="of layer '0' was replaced by another"):
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_changed_shape_is_refused_before_the_fallback_steps(momentum: float) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    optimizer = SINGD(model, T=10, fallback="adamw", momentum=momentum)

    def gradients(width: int) -> None:
        optimizer.zero_grad()
        model(torch.randn(4, width)).square().sum().backward()

    gradients(6)
    optimizer.step()
    model[0].weight.data = torch.randn(8, 7)
    gradients(7)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"layer '0' has another shape .* a matrix of 8 x 7"):
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_rows_that_do_not_fit_name_the_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    optimizer = SINGD(model, T=1)
    model[0].weight.data = torch.randn(8, 7)
    with pytest.raises((ValueError, RuntimeError), match=r"layer '0': .* do not fit a factor"):
        model(torch.randn(4, 7)).sum().backward()
    assert optimizer.rejections() == {"0": (0, 0)}
