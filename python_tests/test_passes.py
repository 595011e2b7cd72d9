"""Which forward and backward passes reach the factors, and how often they count."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from nets import (
    OPTIONS,
    assert_bitwise,
    backward,
    inputs,
    loss_of,
    mlp,
    of_layer,
    snapshot,
    statistics_names,
    train,
    trained,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]


def _assert_close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


# -------------------------------------------------------------------- which passes count


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardtanh])
def test_in_place_activation_after_the_layer_changes_nothing(activation: type[nn.Module]) -> None:
    runs = []
    for in_place in (True, False):
        model = mlp()
        model[1] = activation(inplace=in_place)
        optimizer = SINGD(model, **OPTIONS)
        train(model, optimizer, range(3))
        runs.append(snapshot(model, optimizer))
    assert_bitwise(*runs)


LOSSES: dict[str | None, Callable[[Tensor, int], Tensor]] = {
    "batch": lambda y, samples: (y - 0.7).square().sum() / samples,
    "batch+sequence": lambda y, samples: (y - 0.7).square().sum() / (samples * y.shape[1]),
    None: lambda y, samples: 0.1 * (y - 0.7).square().sum(),
}


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("loss_average", LOSSES)
def test_accumulated_micro_batches_equal_one_big_batch(
    loss_average: str | None, kfac_approx: str
) -> None:
    runs = []
    for sizes in ([7], [4, 1, 2]):
        model = mlp()
        optimizer = SINGD(
            model, loss_average=loss_average, kfac_approx=kfac_approx, **{**OPTIONS, "lr_cov": 0.01}
        )
        for seed in range(3):
            optimizer.zero_grad()
            for x in inputs(7, 2, 5, seed=seed).split(sizes):
                LOSSES[loss_average](model(x), 7).backward()
            optimizer.step()
        runs.append(snapshot(model, optimizer))
    _assert_close(*runs)


class Branches(nn.Module):
    """Two layers of which a forward pass uses one or both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
        self.used = "ab"

    def forward(self, x: Tensor) -> Tensor:
        return sum((self.get_submodule(name)(x) for name in self.used), torch.zeros(()))


def test_layer_not_used_in_a_step_is_untouched() -> None:
    model = Branches()
    optimizer = SINGD(model, **{**OPTIONS, "lr_cov": 0.01})
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    model.used = "a"
    train(model, optimizer, [2, 3])
    after = snapshot(model, optimizer)
    assert_bitwise(of_layer(after, "b"), of_layer(before, "b"))
    assert not torch.equal(after["a.weight"], before["a.weight"])
    assert not torch.equal(after["a.weight: K"], before["a.weight: K"])


def test_layer_used_twice_equals_one_use_on_stacked_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.layer(x[:, 0]), self.layer(x[:, 1])], dim=1)

    twice, once = Twice(mlp(5, 3)), mlp(5, 3)
    options = {**OPTIONS, "lr_cov": 0.01}
    for_twice, for_once = SINGD(twice, **options), SINGD(once, **options)
    train(twice, for_twice, range(3), 4, 2, 5)
    train(once, for_once, range(3), 4, 2, 5)
    _assert_close(snapshot(twice.layer, for_twice), snapshot(once, for_once))


def _no_grad(model: nn.Module) -> None:
    with torch.no_grad():
        loss_of(model, inputs(seed=9))


def _inference(model: nn.Module) -> None:
    with torch.inference_mode():
        loss_of(model, inputs(seed=9))


def _evaluation(model: nn.Module) -> None:
    model.eval()
    loss_of(model, inputs(seed=9))
    model.train()


@pytest.mark.parametrize("stray_pass", [_no_grad, _inference, _evaluation])
def test_pass_without_backward_contributes_nothing(stray_pass: Callable) -> None:
    model, optimizer = trained([])
    for seed in range(3):
        stray_pass(model)
        assert not statistics_names(optimizer)
        backward(model, optimizer, inputs(seed=seed))
        stray_pass(model)
        optimizer.step()
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained(range(3))))


def test_zero_grad_drops_the_statistics_of_a_discarded_backward_pass() -> None:
    model, optimizer = trained([0])
    backward(model, optimizer, inputs(seed=9))
    assert statistics_names(optimizer)
    optimizer.zero_grad()
    assert not statistics_names(optimizer)
    train(model, optimizer, [1, 2])
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained(range(3))))


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise RuntimeError("out of memory")


def test_backward_pass_that_raises_midway_leaves_nothing_behind() -> None:
    model, optimizer = trained([0])
    before = snapshot(model, optimizer)
    loss = (model[2](_Fails.apply(model[1](model[0](inputs(seed=9))))) - 0.7).square().mean()
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.backward()
    assert statistics_names(optimizer)  # the last layer's pass did happen
    optimizer.zero_grad()
    assert_bitwise(snapshot(model, optimizer), before)
    train(model, optimizer, [1, 2])
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained(range(3))))


# -------------------------------------------------------------------- how modules are called


def test_module_called_with_keyword_input() -> None:
    class ByKeyword(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(input=x)

    runs = []
    for cls in (nn.Linear, ByKeyword):
        torch.manual_seed(0)
        model = nn.Sequential(cls(5, 4, dtype=torch.float64), nn.Tanh(), cls(4, 3).double())
        optimizer = SINGD(model, **OPTIONS)
        train(model, optimizer, range(3))
        runs.append(snapshot(model, optimizer))
    assert_bitwise(*runs)


def test_submodule_of_a_larger_model_is_trained_alone() -> None:
    model = mlp(5, 4, 4, 3)
    optimizer = SINGD(model[2], **OPTIONS)
    before = snapshot(model, optimizer)
    train(model, optimizer, range(2))
    after = snapshot(model, optimizer)
    assert list(optimizer.factors()) == [""]
    assert_bitwise(of_layer(after, "0"), of_layer(before, "0"))
    assert not torch.equal(after["2.weight: K"], before["2.weight: K"])


def test_functional_use_of_a_weight_warns_once_and_still_trains() -> None:
    class Functional(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(Functional(5, 3), nn.Linear(3, 2)).double()
    optimizer = SINGD(model, **OPTIONS)
    with pytest.warns(UserWarning, match=r"'0'.*not called") as warned:
        for seed in range(3):
            before = snapshot(model, optimizer)
            optimizer.zero_grad()
            h = nn.functional.linear(inputs(seed=seed), model[0].weight, model[0].bias)
            model[1](h).square().mean().backward()
            optimizer.step()
            after = snapshot(model, optimizer)
            assert not torch.equal(after["0.weight"], before["0.weight"])
            assert torch.equal(after["0.weight: K"], before["0.weight: K"])
            assert not torch.equal(after["1.weight: K"], before["1.weight: K"])
    assert len(warned) == 1


EMPTY_CALLS = {
    "linear": (lambda: nn.Linear(3, 2), (0, 3)),
    "linear_without_positions": (lambda: nn.Linear(3, 2), (4, 0, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 2, 2, padding=1), (0, 3, 4)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 2, 2, groups=2), (0, 4, 3, 3)),
}


@pytest.mark.parametrize("structure", ["dense", "diagonal", "triu_toeplitz", "rank_tril:1"])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("call", EMPTY_CALLS)
def test_empty_batch_adds_nothing(call: str, kfac_approx: str, structure: str) -> None:
    make, shape = EMPTY_CALLS[call]
    runs = []
    for batches in ([shape], [shape, (5, *shape[1:])], [(5, *shape[1:])]):
        torch.manual_seed(0)
        model = make().double()
        optimizer = SINGD(
            model, lr_cov=0.01, kfac_approx=kfac_approx, structures=(structure, structure)
        )
        for shape_ in batches:
            model(inputs(*shape_)).square().sum().mul(0.01).backward()
        optimizer.step()
        runs.append(snapshot(model, optimizer))
    empty, both, alone = runs
    torch.manual_seed(0)
    model = make().double()
    start = snapshot(model, SINGD(model, structures=(structure, structure)))
    assert_bitwise(empty, start)  # the gradient is zero, and there is no weight decay
    if 0 not in shape[1:]:
        assert not torch.equal(alone["weight: K"], start["weight: K"])
        _assert_close(both, alone)


class Checkpointed(nn.Module):
    """Recomputes its layers in the backward pass; one layer is used in two segments."""

    def __init__(self, mode: str, shared: bool) -> None:
        super().__init__()
        self.mode, self.shared = mode, shared
        self.first, self.second = mlp(5, 4, 5), mlp(5, 4, 5, seed=1)

    def _run(self, layers: nn.Module, x: Tensor) -> Tensor:
        if self.mode == "plain":
            return layers(x)
        return checkpoint(layers, x, use_reentrant=self.mode == "reentrant")

    def forward(self, x: Tensor) -> Tensor:
        h = self._run(self.first, x.requires_grad_())
        return self._run(self.first if self.shared else self.second, h)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])
def test_activation_checkpointing_gives_the_same_factors(mode: str, shared: bool) -> None:
    runs = []
    for m in ("plain", mode):
        model = Checkpointed(m, shared)
        optimizer = SINGD(model, **OPTIONS)
        train(model, optimizer, range(3))
        runs.append(snapshot(model, optimizer))
    _assert_close(runs[1], runs[0])


def test_autocast_keeps_factors_in_their_dtype_and_near_those_of_float32() -> None:
    factors = []
    for context in (nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)):
        model = mlp(dtype=torch.float32)
        optimizer = SINGD(model, **OPTIONS)
        for seed in range(3):
            optimizer.zero_grad()
            with context():
                loss = loss_of(model, inputs(seed=seed, dtype=torch.float32))
            loss.backward()
            optimizer.step()
        factors.append({name: (K.data, C.data) for name, (K, C) in optimizer.factors().items()})
    torch.testing.assert_close(factors[1], factors[0], rtol=0.02, atol=0.02)  # checks dtypes too
