"""SINGD is a torch.optim.Optimizer in full: closures, schedulers, groups, hooks, signature."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import (
    OPTIONS,
    assert_bitwise,
    backward,
    differ,
    inputs,
    loss_of,
    mlp,
    snapshot,
    train,
    trained,
)
from torch.optim import lr_scheduler as schedulers
from torch.optim import optimizer as module_hooks

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]


# -------------------------------------------------------------------- signature and class


def test_arguments_have_the_names_order_and_defaults_of_pypi_singd() -> None:
    pypi = inspect.signature(pytest.importorskip("singd.optim.optimizer").SINGD.__init__)
    ours = inspect.signature(SINGD.__init__)
    positional = [p for p in ours.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [
        (p.name, p.default) for p in pypi.parameters.values()
    ]


def test_further_arguments_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        SINGD(mlp(), None, 1e-3, 0.9, 1e-3, 0.5, 0.0, 10, "batch", 1e-2, ("dense", "dense"),
              "expand", True, False, (None, None), 1.0, False, 1)  # fmt: skip


def test_is_a_torch_optimizer_whose_repr_shows_the_options() -> None:
    optimizer = SINGD(mlp(), lr=0.125, structures=("diagonal", "dense"))
    assert isinstance(optimizer, torch.optim.Optimizer)
    text = repr(optimizer)
    assert "SINGD" in text and "lr: 0.125" in text and "('diagonal', 'dense')" in text


# -------------------------------------------------------------------- closure


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    model, reference = mlp(), mlp()
    optimizer, plain = SINGD(model, **OPTIONS), SINGD(reference, **OPTIONS)
    for seed in range(3):
        x = inputs(seed=seed)
        calls = []

        def closure(x: torch.Tensor = x, calls: list = calls) -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss

        with torch.no_grad():  # as in a framework that calls step there
            loss = optimizer.step(closure)
        expected = backward(reference, plain, x)
        plain.step()
        assert calls == [True]
        assert torch.equal(loss, expected)
    assert_bitwise(snapshot(model, optimizer), snapshot(reference, plain))
    assert differ(snapshot(model, optimizer), snapshot(mlp(), SINGD(mlp(), **OPTIONS)))


def test_step_without_closure_returns_none() -> None:
    model, optimizer = trained([])
    backward(model, optimizer, inputs())
    assert optimizer.step() is None


def test_step_before_any_backward_changes_nothing_but_the_step_count() -> None:
    model, optimizer = trained([])
    before = snapshot(model, optimizer)
    optimizer.step()
    assert_bitwise(snapshot(model, optimizer), before)


# -------------------------------------------------------------------- learning rate


def test_parameters_move_in_proportion_to_lr() -> None:
    start, moves = mlp()[0].weight.detach(), []
    for lr in (0.01, 0.02):
        model, _ = trained([0], lr=lr)
        moves.append(model[0].weight.detach() - start)
    torch.testing.assert_close(moves[1], 2 * moves[0], rtol=1e-12, atol=0)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: schedulers.StepLR(o, 2, gamma=0.5),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 3), schedulers.ExponentialLR(o, 0.5)], milestones=[3]
    ),
}


def _scheduled_run(
    scheduler: Callable[[torch.optim.Optimizer], Any], lr: float | torch.Tensor = 0.05
) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """The state after six scheduled steps, and the (lr, momentum) of each step."""
    model = mlp()
    optimizer = SINGD(model, **{**OPTIONS, "lr": lr})
    schedule = scheduler(optimizer)
    values = []
    for seed in range(6):
        group = optimizer.param_groups[0]
        values.append((float(group["lr"]), float(group["momentum"])))
        loss = backward(model, optimizer, inputs(seed=seed))
        optimizer.step()
        if isinstance(schedule, schedulers.ReduceLROnPlateau):
            schedule.step(loss)
        else:
            schedule.step()
    return snapshot(model, optimizer), values


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_equals_values_set_by_hand(name: str) -> None:
    scheduled, values = _scheduled_run(SCHEDULERS[name])
    assert len({lr for lr, _ in values}) > 1
    cycles_momentum = name in ("OneCycleLR", "CyclicLR")
    assert (len({momentum for _, momentum in values}) > 1) == cycles_momentum

    model, optimizer = trained([])
    for seed, (lr, momentum) in enumerate(values):
        optimizer.param_groups[0].update(lr=lr, momentum=momentum)
        train(model, optimizer, [seed])
    assert_bitwise(snapshot(model, optimizer), scheduled)
    assert differ(scheduled, snapshot(*trained(range(6))))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_lr_equals_float_lr(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 0.0625, dtype=dtype)  # exact in both types
    assert_bitwise(snapshot(*trained(lr=lr)), snapshot(*trained(lr=0.0625)))


def test_scheduled_tensor_lr_equals_scheduled_float_lr() -> None:
    lr = torch.tensor(0.0625, dtype=torch.float64)
    tensor_run, tensor_values = _scheduled_run(SCHEDULERS["StepLR"], lr)
    float_run, float_values = _scheduled_run(SCHEDULERS["StepLR"], 0.0625)
    assert tensor_values == float_values
    assert_bitwise(tensor_run, float_run)


# -------------------------------------------------------------------- other options over time


def test_lr_cov_function_is_called_with_the_step() -> None:
    called = []

    def schedule(step: int) -> float:
        called.append(step)
        return 0.1 / (1 + step)

    scheduled = snapshot(*trained(range(5), lr_cov=schedule, T=2))
    assert called == [0, 2, 4]

    model, optimizer = trained([], T=2)
    for seed in range(5):
        optimizer.param_groups[0]["lr_cov"] = 0.1 / (1 + seed)
        train(model, optimizer, [seed])
    assert_bitwise(snapshot(model, optimizer), scheduled)


@pytest.mark.parametrize(
    ("option", "before", "after"),
    [
        ("lr", 0.05, 0.1),
        ("momentum", 0.9, 0.5),
        ("momentum", 0.0, 0.9),
        ("momentum", 0.9, 0.0),
        ("damping", 1e-3, 0.5),
        ("alpha1", 0.5, 0.2),
        ("alpha1", 0.0, 0.5),
        ("alpha1", 0.5, 0.0),
        ("weight_decay", 0.01, 0.1),
        ("lr_cov", 0.05, 0.02),
        ("T", 1, 2),
        ("T", 3, 1),
        ("loss_average", "batch", None),
        ("normalize_lr_cov", False, True),
        ("expm_order", 1, 2),
    ],
)
def test_option_set_in_the_group_takes_effect_at_the_next_step(
    option: str, before: Any, after: Any
) -> None:
    model, optimizer = trained(range(2), **{option: before})
    unchanged_model, unchanged = trained(range(4), **{option: before})

    constructed_model = mlp()
    constructed = SINGD(constructed_model, **{**OPTIONS, option: after})
    for p, q in zip(model.parameters(), constructed_model.parameters(), strict=True):
        q.data.copy_(p.data)
        constructed.state[q].update({k: v.clone() for k, v in optimizer.state[p].items()})
    constructed.param_groups[0]["steps"] = 2

    optimizer.param_groups[0][option] = after
    for m, o in ((model, optimizer), (constructed_model, constructed)):
        train(m, o, [2, 3])
    ours, expected = snapshot(model, optimizer), snapshot(constructed_model, constructed)
    assert_bitwise({k: ours[k] for k in expected}, expected)
    assert differ(ours, snapshot(unchanged_model, unchanged))


# -------------------------------------------------------------------- gradients and step hooks


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_gradients_in_both_modes(set_to_none: bool) -> None:
    model, optimizer = trained([0])
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none else torch.equal(p.grad, torch.zeros_like(p))
    train(model, optimizer, [1, 2])
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained()))


def test_step_keeps_the_gradients() -> None:
    model, optimizer = trained([])
    backward(model, optimizer, inputs())
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("is_global", [False, True])
def test_step_hooks_run_once_around_the_step(is_global: bool) -> None:
    model, optimizer = trained([])
    weight, seen = model[0].weight, []
    hooks = module_hooks if is_global else optimizer
    prefix = "register_optimizer" if is_global else "register"
    handles = [
        getattr(hooks, f"{prefix}_step_{when}_hook")(
            lambda *_: seen.append(weight.detach().clone())
        )
        for when in ("pre", "post")
    ]
    start = weight.detach().clone()
    train(model, optimizer, [0])
    for handle in handles:
        handle.remove()
    assert torch.equal(seen[0], start) and torch.equal(seen[1], weight) and len(seen) == 2
    assert not torch.equal(start, weight)
    train(model, optimizer, [1])
    assert len(seen) == 2


def test_pre_hook_may_replace_the_arguments_of_the_step() -> None:
    model, optimizer = trained([])
    losses: list[float] = []
    optimizer.register_step_pre_hook(
        lambda opt, args, kwargs: ((opt, lambda: losses.append(1.0)), {})
    )
    backward(model, optimizer, inputs())
    optimizer.step()
    assert losses == [1.0]


def test_profiler_sees_one_event_a_step() -> None:
    model, optimizer = trained([])
    with torch.autograd.profiler.profile() as profile:
        train(model, optimizer, range(3))
    steps = [e for e in profile.key_averages() if e.key == "Optimizer.step#SINGD.step"]
    assert [e.count for e in steps] == [3]


# -------------------------------------------------------------------- parameter groups


def test_layer_of_a_group_added_later_is_trained() -> None:
    model, reference = mlp(), mlp()
    optimizer = SINGD(model, params=model[0].parameters(), **OPTIONS)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01})
    both = [
        {"params": reference[0].parameters()},
        {"params": reference[2].parameters(), "lr": 0.01},
    ]
    at_once = SINGD(reference, params=both, **OPTIONS)
    start = snapshot(model, optimizer)
    for m, o in ((model, optimizer), (reference, at_once)):
        train(m, o, range(3))
    assert list(optimizer.factors()) == ["0", "2"]
    assert not torch.equal(model[2].weight, start["2.weight"])
    assert_bitwise(snapshot(model, optimizer), snapshot(reference, at_once))


def test_single_tensor_as_a_group() -> None:
    model = mlp(bias=False)
    optimizer = SINGD(model, params=[{"params": model[0].weight}], **OPTIONS)
    optimizer.add_param_group({"params": model[2].weight})
    train(model, optimizer, [0])
    for p, start in zip(model.parameters(), mlp(bias=False).parameters(), strict=True):
        assert not torch.equal(p, start)


GROUP_OPTIONS = [
    {"lr": 0.01},
    {"weight_decay": 0.3},
    {"structures": ("block_diagonal:2", "tril_toeplitz")},
    {"T": 2},
    {"kfac_approx": "reduce", "loss_average": "batch+sequence"},
    {"momentum": 0.0, "alpha1": 0.0},
    {"preconditioner_dtype": (torch.float32, None)},
    {"damping": 0.1, "lr_cov": lambda step: 0.1 / (1 + step)},
]


@pytest.mark.parametrize("options", GROUP_OPTIONS, ids=lambda o: "-".join(o))
def test_groups_with_own_options_equal_separate_optimizers(options: dict[str, Any]) -> None:
    model, reference = mlp(), mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), **options}]
    together = SINGD(model, params=groups, **OPTIONS)
    first = SINGD(reference, params=reference[0].parameters(), **OPTIONS)
    second = SINGD(reference, params=reference[2].parameters(), **{**OPTIONS, **options})
    for seed in range(4):
        train(model, together, [seed], 6, 2, 5)
        second.zero_grad()
        backward(reference, first, inputs(6, 2, 5, seed=seed))
        first.step()
        second.step()
    ours = snapshot(model, together)
    assert_bitwise(ours, {**snapshot(reference, first), **snapshot(reference, second)})

    default_model = mlp()
    default = SINGD(default_model, **OPTIONS)
    train(default_model, default, range(4), 6, 2, 5)
    assert not torch.equal(default_model[2].weight, model[2].weight)


def test_named_parameters_are_accepted_and_their_names_kept() -> None:
    model = mlp()
    optimizer = SINGD(model, params=model.named_parameters(), **OPTIONS)
    train(model, optimizer, range(3))
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained()))
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]


def test_default_parameters_equal_all_parameters_of_the_layers() -> None:
    model = mlp()
    optimizer = SINGD(model, params=list(model.parameters()), **OPTIONS)
    train(model, optimizer, range(3))
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained()))


def test_averaged_model_follows_the_trained_one() -> None:
    model, optimizer = trained([])
    average = torch.optim.swa_utils.AveragedModel(model)
    for seed in range(2):
        train(model, optimizer, [seed])
        average.update_parameters(model)
        loss_of(average, inputs(seed=7))
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained(range(2))))
    assert not torch.equal(average.module[0].weight, model[0].weight)
