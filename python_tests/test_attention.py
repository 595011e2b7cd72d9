"""nn.MultiheadAttention: the same as an attention that is written with linear layers."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import assert_bitwise, differ, inputs, snapshot, statistics_names
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from singd_ext import SINGD, param_groups

OPTIONS: dict[str, Any] = {"lr": 0.05, "lr_cov": 0.02, "T": 1, "weight_decay": 0.01}
E, HEADS = 8, 2
SAMPLES, TARGETS, SOURCES = 3, 4, 5

pytestmark = [pytest.mark.filterwarnings("error")]


class Net(nn.Module):
    """nn.MultiheadAttention with what its calls need."""

    def __init__(self, need_weights: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(
            E, HEADS, **{"batch_first": True, "dtype": torch.float64, **options}
        )
        self.need_weights = need_weights
        with torch.no_grad():
            for p in self.attention.parameters():
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
        if self.attention.batch_first:
            return self.attention(q, k, v, need_weights=self.need_weights, **masks)[0]
        swapped = {id(x): x.transpose(0, 1) for x in (q, k, v)}  # the same x stays the same
        q, k, v = (swapped[id(x)] for x in (q, k, v))
        output = self.attention(q, k, v, need_weights=self.need_weights, **masks)[0]
        return output.transpose(0, 1)


class Linears(nn.Module):
    """The same attention of four linear layers."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        attention = net.attention
        packed = attention.in_proj_weight
        weights = (
            [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
            if packed is None
            else packed.chunk(3)
        )
        bias = attention.in_proj_bias
        biases = [None] * 3 if bias is None else bias.chunk(3)
        for name, weight, b in zip("qkv", weights, biases, strict=True):
            self.add_module(name, self._linear(weight, b))
        self.out_proj = self._linear(attention.out_proj.weight, attention.out_proj.bias)

    @staticmethod
    def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
        linear.weight.data.copy_(weight)
        if bias is not None:
            linear.bias.data.copy_(bias)
        return linear

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        heads = [
            getattr(self, name)(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name, x in (("q", q), ("k", k), ("v", v))
        ]
        scores = heads[0] @ heads[1].transpose(-1, -2) / (E // HEADS) ** 0.5
        if attn_mask is not None:
            scores = scores.masked_fill(attn_mask, -torch.inf)
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None], -torch.inf)
        return self.out_proj((scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2))


def data(seed: int, kind: str, widths: tuple[int, int] = (E, E)) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of self-attention, of an encoder and decoder, or three different ones."""
    q = inputs(SAMPLES, TARGETS, E, seed=seed)
    if kind == "self":
        return q, q, q
    k = inputs(SAMPLES, SOURCES, widths[0], seed=seed + 100)
    return (q, k, k) if kind == "cross" else (q, k, inputs(SAMPLES, SOURCES, widths[1], seed=seed))


def step(model: nn.Module, optimizer: SINGD, x: Any, **masks: Any) -> None:
    optimizer.zero_grad()
    (model(*x, **masks) - 0.7).square().sum().div(10 * SAMPLES).backward()
    optimizer.step()


def linear_parts(net: Net) -> dict[str, Tensor]:
    """The weights and biases of an attention under the names of `Linears`."""
    attention = net.attention
    parts = {"out_proj.weight": attention.out_proj.weight, "out_proj.bias": attention.out_proj.bias}
    packed, bias = attention.in_proj_weight, attention.in_proj_bias
    for i, name in enumerate("qkv"):
        own = getattr(attention, f"{name}_proj_weight")
        parts[f"{name}.weight"] = own if packed is None else packed[i * E : (i + 1) * E]
        parts[f"{name}.bias"] = None if bias is None else bias[i * E : (i + 1) * E]
    return {name: p.detach() for name, p in parts.items() if p is not None}


def assert_same(net: Net, optimizer: SINGD, linears: Linears, reference: SINGD) -> None:
    """Both have the same weights and factors."""
    mine = linear_parts(net)
    theirs = dict(linears.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, p in theirs.items():
        torch.testing.assert_close(mine[name], p.detach(), rtol=1e-9, atol=1e-12, msg=name)
    factors = optimizer.factors()
    assert sorted(factors) == sorted(f"attention.{name}" for name in reference.factors())
    for name, pair in reference.factors().items():
        for actual, expected in zip(factors[f"attention.{name}"], pair, strict=True):
            torch.testing.assert_close(actual.data, expected.data, rtol=1e-9, atol=1e-12, msg=name)


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "self": ({}, "self"),
    "without_weights": ({"need_weights": False}, "self"),
    "sequence_first": ({"batch_first": False}, "self"),
    "without_bias": ({"bias": False}, "self"),
    "cross": ({}, "cross"),
    "three_inputs": ({"need_weights": False}, "three"),
    "cross_sequence_first": ({"batch_first": False, "need_weights": False}, "cross"),
    "own_widths": ({"kdim": 6, "vdim": 7}, "three"),
    "own_widths_without_bias": ({"kdim": 6, "vdim": 7, "bias": False}, "three"),
}
SINGD_OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "reduce": {"kfac_approx": "reduce", "structures": ("block_diagonal:3", "diagonal")},
    "sequence_mean": {"loss_average": "batch+sequence", "alpha1": 0.0, "T": 2},
    "clipped": {"max_update_norm": 0.05, "kl_clip": 0.01, "momentum": 0.0},
}


@pytest.mark.parametrize("variant", SINGD_OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_equals_attention_of_linear_layers(case: str, variant: str) -> None:
    options, kind = CASES[case]
    widths = (options.get("kdim", E), options.get("vdim", E))
    net = Net(**options)
    linears = Linears(net)
    singd = {**OPTIONS, **SINGD_OPTIONS[variant]}
    optimizer, reference = SINGD(net, **singd), SINGD(linears, **singd)
    initial = linear_parts(net)["out_proj.weight"].clone()
    for seed in range(4):
        x = data(seed, kind, widths)
        torch.testing.assert_close(net(*x), linears(*x))
        step(net, optimizer, x)
        step(linears, reference, x)
        assert not statistics_names(optimizer)
    assert_same(net, optimizer, linears, reference)
    assert not torch.equal(linear_parts(net)["out_proj.weight"], initial)
