"""One optimizer for a whole model equals SINGD and another optimizer beside it, bit for bit."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from nets import OPTIONS, assert_bitwise, differ, mlp, snapshot
from torch import nn
from torch.optim import lr_scheduler as schedulers
from whole import OTHERS, Whole, one, others, singd_alone, train_whole, whole_loss

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]

ADAMW = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}

FALLBACKS: dict[str, tuple[dict[str, Any], Callable[[list], torch.optim.Optimizer]]] = {
    "adamw": ({"fallback": "adamw"}, lambda p: torch.optim.AdamW(p, fused=True)),
    "adamw_with_options": (
        {"fallback": "adamw", "fallback_options": ADAMW},
        lambda p: torch.optim.AdamW(p, **ADAMW, fused=True),
    ),
    "adamw_amsgrad_foreach": (
        {"fallback": "adamw", "fallback_options": {"amsgrad": True, "foreach": True}},
        lambda p: torch.optim.AdamW(p, amsgrad=True, foreach=True),
    ),
    "class": ({"fallback": torch.optim.RMSprop}, torch.optim.RMSprop),
    "function": (
        {"fallback": lambda p: torch.optim.SGD(p, lr=0.07, momentum=0.9, nesterov=True)},
        lambda p: torch.optim.SGD(p, lr=0.07, momentum=0.9, nesterov=True),
    ),
    "partial": (
        {"fallback": partial(torch.optim.Adam, lr=0.01)},
        lambda p: torch.optim.Adam(p, lr=0.01),
    ),
}


def _two(make: Callable[[list], torch.optim.Optimizer]) -> tuple[Whole, list[Any]]:
    model = Whole()
    return model, [singd_alone(model), make(others(model))]


def _of_both(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    return {k: v for o in optimizers for k, v in snapshot(model, o).items()}


@pytest.mark.parametrize("name", FALLBACKS)
def test_equals_two_optimizers(name: str) -> None:
    options, make = FALLBACKS[name]
    model, optimizer = one(**options)
    reference, pair = _two(make)
    start = snapshot(model, optimizer)
    train_whole(model, [optimizer], range(4))
    train_whole(reference, pair, range(4))
    assert_bitwise(snapshot(model, optimizer), _of_both(reference, pair))
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, start[n])]
    assert moved == [n for n, _ in model.named_parameters()]


def test_every_parameter_is_in_one_group_and_groups_say_whose_they_are() -> None:
    model, optimizer = one()
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    own, fallback = optimizer.param_groups
    assert [id(p) for p in fallback["params"]] == [id(p) for p in others(model)]
    assert (own["optimizer"], fallback["optimizer"]) == ("SINGD", "AdamW")
    assert "structures" not in fallback and "betas" not in own
    default = torch.optim.AdamW([nn.Parameter(torch.ones(2))]).param_groups[0]
    for key in ("lr", "betas", "eps", "weight_decay"):
        assert fallback[key] == default[key]


def test_adamw_is_fused_where_torch_can() -> None:
    assert one()[1].param_groups[1]["fused"] is True
    assert one(fallback_options={"fused": False})[1].param_groups[1]["fused"] is False
    model = Whole()
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    assert SINGD(model, fallback="adamw").param_groups[1]["fused"] is False


def test_without_a_fallback_one_warning_names_what_stays_and_the_remedy() -> None:
    model = Whole()
    with pytest.warns(UserWarning) as warned:
        optimizer = SINGD(model, **OPTIONS)
    assert len(warned) == 1
    message = str(warned[0].message)
    assert str(OTHERS) in message and 'fallback="adamw"' in message
    before = [p.detach().clone() for p in others(model)]
    train_whole(model, [optimizer], [0])
    assert all(torch.equal(p, q) for p, q in zip(others(model), before, strict=True))


def test_model_without_supported_layers_is_trained_by_the_fallback_alone() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(7, 2), nn.LayerNorm(2))

    torch.manual_seed(0)
    model, reference = make(), make()
    reference.load_state_dict(model.state_dict())
    optimizer = SINGD(model, fallback="adamw")
    adamw = torch.optim.AdamW(reference.parameters(), fused=True)
    for m, o in ((model, optimizer), (reference, adamw)):
        train_whole(m, [o], range(3))
    assert_bitwise(snapshot(model, optimizer), snapshot(reference, adamw))


def test_model_of_supported_layers_needs_no_fallback() -> None:
    def refuse(params: list) -> torch.optim.Optimizer:
        raise AssertionError("called without parameters")

    optimizer = SINGD(mlp(), fallback=refuse)
    assert [group["optimizer"] for group in optimizer.param_groups] == ["SINGD"]


def test_closure_and_zero_grad_reach_all_parameters() -> None:
    model, optimizer = one()
    reference, plain = one()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = whole_loss(model, 0)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    train_whole(reference, [plain], [0])
    assert torch.equal(loss, whole_loss(one()[0], 0))
    assert_bitwise(snapshot(model, optimizer), snapshot(reference, plain))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_fallback_that_fails_leaves_the_layers_as_they_were() -> None:
    model = Whole(sparse=True)
    optimizer = SINGD(model, fallback="adamw", **OPTIONS)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        train_whole(model, [optimizer], [0])
    optimizer.zero_grad()
    after = snapshot(model, optimizer)  # torch's AdamW may have made its zeros
    assert_bitwise({key: after[key] for key in before}, before)


# -------------------------------------------------------------------- options and schedulers


def test_options_set_in_the_group_take_effect() -> None:
    model, optimizer = one()
    reference, pair = _two(FALLBACKS["adamw"][1])
    for group in (optimizer.param_groups[1], pair[1].param_groups[0]):
        group["lr"], group["weight_decay"] = 0.3, 0.2
    train_whole(model, [optimizer], range(2))
    train_whole(reference, pair, range(2))
    assert_bitwise(snapshot(model, optimizer), _of_both(reference, pair))
    assert differ(snapshot(model, optimizer), _trained_once())


def _trained_once() -> dict[str, Any]:
    model, optimizer = one()
    train_whole(model, [optimizer], range(2))
    return snapshot(model, optimizer)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 3), schedulers.ExponentialLR(o, 0.5)], milestones=[3]
    ),
}


def _train_scheduled(model: nn.Module, optimizers: list[Any], name: str) -> None:
    schedules = [SCHEDULERS[name](optimizer) for optimizer in optimizers]
    for seed in range(6):
        train_whole(model, optimizers, [seed])
        for schedule in schedules:
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))


@pytest.mark.parametrize("fallback", ["adamw", "function"])  # β₁ and momentum are cycled
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_does_to_all_groups_what_two_do(name: str, fallback: str) -> None:
    options, make = FALLBACKS[fallback]
    model, optimizer = one(**options)
    start = optimizer.param_groups[1]["lr"]
    reference, pair = _two(make)
    _train_scheduled(model, [optimizer], name)
    _train_scheduled(reference, pair, name)
    assert optimizer.param_groups[1]["lr"] != start
    assert_bitwise(snapshot(model, optimizer), _of_both(reference, pair))


# -------------------------------------------------------------------- explicit groups


def test_parameters_of_no_layer_in_a_group_go_to_the_fallback() -> None:
    model, default_model = Whole(), Whole()
    optimizer = SINGD(model, params=model.parameters(), fallback="adamw", **OPTIONS)
    default = SINGD(default_model, fallback="adamw", **OPTIONS)
    train_whole(model, [optimizer], range(3))
    train_whole(default_model, [default], range(3))
    assert_bitwise(snapshot(model, optimizer), snapshot(default_model, default))


def test_fallback_gets_of_a_group_weight_decay_and_what_singd_does_not_have() -> None:
    model = Whole()
    group = {"params": model.parameters(), "lr": 0.5, "weight_decay": 0.3, "betas": (0.7, 0.9)}
    own, fallback = SINGD(model, params=[group], fallback="adamw").param_groups
    assert (own["lr"], own["weight_decay"]) == (0.5, 0.3)
    assert (fallback["lr"], fallback["weight_decay"], fallback["betas"]) == (1e-3, 0.3, (0.7, 0.9))


def test_layer_in_a_group_for_the_fallback_is_not_preconditioned() -> None:
    model, reference = Whole(), Whole()
    groups = [
        {"params": model.layers[0].parameters()},
        {"params": model.layers[2].parameters(), "optimizer": "fallback", "lr": 0.25},
        {"params": others(model), "optimizer": "fallback"},
    ]
    optimizer = SINGD(model, params=groups, fallback="adamw", **OPTIONS)
    pair = [
        SINGD(reference, params=reference.layers[0].parameters(), **OPTIONS),
        torch.optim.AdamW(
            [
                {"params": reference.layers[2].parameters(), "lr": 0.25},
                {"params": others(reference)},
            ],
            fused=True,
        ),
    ]  # fmt: skip
    train_whole(model, [optimizer], range(3))
    train_whole(reference, pair, range(3))
    assert list(optimizer.factors()) == ["layers.0"]
    assert_bitwise(snapshot(model, optimizer), _of_both(reference, pair))


def test_factory_sees_all_groups_at_once() -> None:
    calls = []

    def factory(params: list) -> torch.optim.Optimizer:
        calls.append([len(group["params"]) for group in params])
        return torch.optim.SGD(params, lr=0.1)

    model = Whole()
    groups = [
        {"params": [model.embedding.weight, *model.layers.parameters()]},
        {"params": [model.position, *model.norm.parameters()], "weight_decay": 0.0},
    ]
    SINGD(model, params=groups, fallback=factory)
    assert calls == [[1, 3]]


def test_groups_added_later_equal_groups_at_once() -> None:
    model, reference = Whole(), Whole()
    optimizer = SINGD(model, params=model.layers[0].parameters(), fallback="adamw", **OPTIONS)
    optimizer.add_param_group({"params": model.embedding.parameters()})
    optimizer.add_param_group({"params": [model.position, *model.layers[2].parameters()]})
    optimizer.add_param_group({"params": model.norm.parameters(), "optimizer": "fallback"})
    assert [g["optimizer"] for g in optimizer.param_groups] == [
        "SINGD", "AdamW", "SINGD", "AdamW", "AdamW",
    ]  # fmt: skip
    at_once = SINGD(reference, fallback="adamw", **OPTIONS)
    train_whole(model, [optimizer], range(3))
    train_whole(reference, [at_once], range(3))
    assert_bitwise(snapshot(model, optimizer), snapshot(reference, at_once))


def test_refused_group_leaves_everything_as_it_was() -> None:
    model, reference = Whole(), Whole()
    optimizer = SINGD(model, params=model.layers[0].parameters(), fallback="adamw", **OPTIONS)
    rest = [*others(model), *model.layers[2].parameters()]
    for bad in ({"damping": -1.0}, {"optimizer": "AdamX"}):
        with pytest.raises(ValueError, match=r"-1\.0|AdamX"):
            optimizer.add_param_group({"params": rest, **bad})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": rest})
    at_once = SINGD(reference, fallback="adamw", **OPTIONS)
    train_whole(model, [optimizer], range(3))
    train_whole(reference, [at_once], range(3))
    assert_bitwise(snapshot(model, optimizer), snapshot(reference, at_once))


def test_names_of_parameters_are_kept() -> None:
    model = Whole()
    optimizer = SINGD(model, params=model.named_parameters(), fallback="adamw")
    assert optimizer.param_groups[1]["param_names"] == OTHERS


def test_frozen_parameter_of_a_layer_stays_with_its_layer() -> None:
    model = Whole()
    model.layers[0].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"\['layers\.0\.weight'\]"):
        optimizer = SINGD(model, params=model.parameters(), fallback="adamw")
    assert id(model.layers[0].weight) in map(id, optimizer.param_groups[0]["params"])


# -------------------------------------------------------------------- faults


class _Nothing:
    """No optimizer."""


FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "name": ({"fallback": "adam"}, ValueError, "fallback is 'adam'.*'adamw'"),
    "options_of_none": ({"fallback_options": {"lr": 1.0}}, ValueError, "fallback_options"),
    "options_of_factory": (
        {"fallback": torch.optim.SGD, "fallback_options": {}}, ValueError, "fallback_options",
    ),
    "no_optimizer": ({"fallback": lambda p: _Nothing()}, TypeError, "_Nothing.*Optimizer"),
    "too_few": (
        {"fallback": lambda p: torch.optim.SGD(p[1:])}, ValueError, "4 parameters.*holds 3.* 0",
    ),
    "others": (
        {"fallback": lambda p: torch.optim.SGD([*p, nn.Parameter(torch.ones(1))])},
        ValueError,
        "4 parameters.*holds 4 of them and 1 others",
    ),
    "closure": ({"fallback": torch.optim.LBFGS}, ValueError, "LBFGS.*closure"),
    "option": ({"fallback": "adamw", "fallback_options": {"lr": -1.0}}, ValueError, "-1.0"),
    "unknown_option": (
        {"fallback": "adamw", "fallback_options": {"beta": 0.9}}, TypeError, "beta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_an_error_at_construction(fault: str) -> None:
    options, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        SINGD(Whole(), **options)


def test_another_singd_is_no_fallback() -> None:
    model = Whole()
    with pytest.raises(ValueError, match="another SINGD"):
        SINGD(model, fallback=lambda p: SINGD(model, fallback="adamw", params=p))


@pytest.mark.parametrize("fallback", [None, "adamw"])
def test_parameter_given_twice_is_named(fallback: str | None) -> None:
    model = Whole()
    for name in ("layers.0.bias", "norm.bias"):
        p = model.get_parameter(name)
        with pytest.raises(ValueError, match=rf"'{name}' is given twice"):
            SINGD(model, params=[p, p], fallback=fallback)
        marked = {"optimizer": "fallback"} if fallback else {}
        groups = [{"params": list(model.parameters())}, {"params": p, **marked}]
        untrained = nullcontext() if fallback else pytest.warns(UserWarning, match="norm")
        with untrained, pytest.raises(ValueError, match=rf"'{name}' is given twice"):
            SINGD(model, params=groups, fallback=fallback)


def test_group_for_a_fallback_that_there_is_not() -> None:
    model = Whole()
    groups = [{"params": model.norm.parameters(), "optimizer": "fallback"}]
    with pytest.raises(ValueError, match='fallback="adamw"'):
        SINGD(model, params=groups)


def test_group_of_an_unknown_optimizer() -> None:
    model = Whole()
    groups = [{"params": model.norm.parameters(), "optimizer": "adam"}]
    with pytest.raises(ValueError, match="'optimizer' of a parameter group is 'adam'"):
        SINGD(model, params=groups, fallback="adamw")


def test_uninitialised_parameter_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"'1\.weight' is uninitialised"):
        SINGD(model, fallback="adamw")


class _WithGradMode(torch.optim.SGD):
    """Like optimizers that leave it to their caller to switch grad mode off."""

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


def test_fallback_runs_without_grad_mode() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = SINGD(net, fallback=partial(_WithGradMode, lr=0.5))
    net(torch.ones(2, 3)).square().sum().backward()
    before, gradient = net[1].bias.detach().clone(), net[1].bias.grad
    optimizer.step()
    assert torch.equal(net[1].bias, before - 0.5 * gradient)
