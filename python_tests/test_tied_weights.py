"""Modules that share parameters: one layer, one update, the statistics of all of its uses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import OPTIONS, assert_bitwise, inputs, snapshot, statistics_names, train
from torch import Tensor, nn

from singd_ext import SINGD, param_groups

pytestmark = [pytest.mark.filterwarnings("error")]


class Twice(nn.Module):
    """A linear layer that is used twice: as one module, or as two with the same parameters."""

    def __init__(self, tied: bool, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 5, bias=bias, dtype=torch.float64)
        self.last = nn.Linear(5, 2, dtype=torch.float64)
        self.second = self.first
        if tied:
            self.second = nn.Linear(5, 5, bias=bias, dtype=torch.float64)
            self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kfac_approx": "reduce", "structures": ("diagonal", "triu_toeplitz"), "T": 2},
        {"loss_average": "batch+sequence", "max_update_norm": 0.05},
    ],
)
def test_two_modules_with_the_same_parameters_are_one_that_is_used_twice(
    options: dict[str, Any], bias: bool
) -> None:
    runs = []
    for tied in (True, False):
        model = Twice(tied, bias)
        optimizer = SINGD(model, **{**OPTIONS, "lr_cov": 0.01, **options})
        assert list(optimizer.factors()) == ["first", "last"]
        train(model, optimizer, range(4), 6, 3, 5)
        runs.append(snapshot(model, optimizer))
    assert_bitwise(*runs)


def test_tied_convolutions_may_differ_in_stride_and_padding() -> None:
    """Rows of patches go into one sum; compared with the sums of each module alone."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 3, 3, padding=1, dtype=torch.float64),
        nn.Conv1d(3, 3, 3, stride=2, dtype=torch.float64),
    )
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    x = inputs(4, 3, 9)
    optimizer = SINGD(model)
    hidden = model[0](x)
    model(x).square().sum().backward()
    statistic = optimizer.state[model[0].weight]["statistic_K"].clone()
    patches = [F.pad(x, (1, 1)).unfold(2, 3, 1), hidden.detach().unfold(2, 3, 2)]
    rows = torch.cat([p.transpose(1, 2).flatten(0, 1).flatten(1) for p in patches])
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    expected = rows.T @ rows
    torch.testing.assert_close(statistic.view(10, 10).tril(), expected.tril(), rtol=1e-11, atol=0)
    assert optimizer.state[model[0].weight]["rows"] == len(rows)


def test_copies_are_tied_too() -> None:
    model = Twice(True)
    optimizer = SINGD(model, **OPTIONS, step_cap=0.4)
    pairs = [(model, optimizer), copy.deepcopy((model, optimizer))]
    for m, o in pairs:
        train(m, o, range(3))
    assert_bitwise(snapshot(*pairs[1]), snapshot(*pairs[0]))


def test_replaced_parameter_of_the_second_module_is_an_error() -> None:
    model = Twice(True)
    optimizer = SINGD(model, **OPTIONS)
    model.second.weight = nn.Parameter(model.second.weight.detach().clone())
    with pytest.raises(RuntimeError, match="'weight' of layer 'second' was replaced"):
        train(model, optimizer, [0])


def test_parameter_groups_and_summary_have_tied_parameters_once() -> None:
    model = Twice(True)
    groups = param_groups(model, weight_decay=0.1)
    assert [len(g["params"]) for g in groups] == [4]
    optimizer = SINGD(model, params=groups)
    rows = {row.parameter: row.trained_by for row in optimizer.summary().rows}
    assert rows["first.weight = second.weight"] == "SINGD"


# -------------------------------------------------------------------- language models


class Tokens(nn.Module):
    """A language model's embedding and head, tied or not, or the embedding as a lookup."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4, dtype=torch.float64)
        self.hidden = nn.Linear(4, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 7, bias=False, dtype=torch.float64)
        if tied:
            self.head.weight = self.embedding.weight
        else:
            self.head.weight.data.copy_(self.embedding.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(x))))


def _tokens_loss(model: nn.Module, seed: int) -> Tensor:
    x = torch.randint(7, (6,), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(x), x.flip(0))


def test_tied_head_is_the_layer_and_the_embedding_adds_to_its_gradient() -> None:
    """The untied twin gets the sum of both gradients by hand, and the factors of its head."""
    model, twin = Tokens(True), Tokens(False)
    optimizer = SINGD(model, **OPTIONS)  # no warning: nothing is untrained
    reference = SINGD(twin, **OPTIONS, warn_unsupported=False)
    assert list(optimizer.factors()) == ["hidden", "head"]
    for seed in range(4):
        for m, o in ((model, optimizer), (twin, reference)):
            o.zero_grad()
            m.zero_grad()
            _tokens_loss(m, seed).backward()
        twin.head.weight.grad += twin.embedding.weight.grad
        optimizer.step()
        reference.step()
        twin.embedding.weight.data.copy_(twin.head.weight)
    torch.testing.assert_close(model.head.weight, twin.head.weight, rtol=1e-12, atol=1e-14)
    for name, pair in reference.factors().items():
        for actual, expected in zip(optimizer.factors()[name], pair, strict=True):
            torch.testing.assert_close(actual.data, expected.data, rtol=1e-12, atol=1e-14)


def test_tied_head_is_not_the_fallbacks() -> None:
    optimizer = SINGD(Tokens(True), fallback="adamw")
    rows = {row.parameter: row.trained_by for row in optimizer.summary().rows}
    assert rows["embedding.weight = head.weight"] == "SINGD"


# -------------------------------------------------------------------- refused


def _one_bias_each() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def _bias_only() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    return model


def _one_without_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def _other_kind() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1))
    model[1].out_proj.weight, model[1].out_proj.bias = model[0].weight, model[0].bias
    return model


@pytest.mark.parametrize("build", [_one_bias_each, _bias_only, _one_without_bias, _other_kind])
def test_layers_that_share_only_a_part_are_refused_naming_both(
    build: Callable[[], nn.Module],
) -> None:
    with pytest.raises(ValueError, match=r"layers '0' .* and '1.*' .* share a parameter"):
        SINGD(build())


def test_different_biases_left_out_make_it_one_layer() -> None:
    model = _one_bias_each()
    optimizer = SINGD(model, params=[model[0].weight])
    assert list(optimizer.factors()) == ["0"]
    model(torch.ones(2, 4)).square().sum().backward()
    assert statistics_names(optimizer) and optimizer.state[model[0].weight]["rows"] == 4
    with pytest.raises(ValueError, match="'1' are in different parameter groups"):
        optimizer.add_param_group({"params": [model[1].bias]})
