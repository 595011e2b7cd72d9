"""Attention and the same written with linear layers, for the tests of attention."""

from typing import Any

import torch
from nets import inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from singd_ext import SINGD

OPTIONS: dict[str, Any] = {"lr": 0.05, "lr_cov": 0.02, "T": 1, "weight_decay": 0.01}
E, HEADS = 8, 2
SAMPLES, TARGETS, SOURCES = 3, 4, 5


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
    """Query, key and value of self-attention, across two sequences, or all different."""
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


class Encoder(nn.Module):
    """A transformer's layer, with another way to run it."""

    def __init__(self, mode: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode = mode
        self.layer = nn.TransformerEncoderLayer(
            E, HEADS, 6, dropout=0.0, batch_first=True, dtype=torch.float64
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "plain":
            return self.layer(x)
        return checkpoint(self.layer, x, use_reentrant=self.mode == "reentrant")


def encoder(mode: str = "plain", **options: Any) -> tuple[Encoder, SINGD]:
    model = Encoder(mode)
    return model, SINGD(model, warn_unsupported=False, **{**OPTIONS, **options})


def encoder_steps(model: nn.Module, optimizer: SINGD, seeds: Any) -> None:
    for seed in seeds:
        step(model, optimizer, (inputs(SAMPLES, TARGETS, E, seed=seed, requires_grad=True),))


def modes() -> list[Any]:
    return torch.overrides._get_current_function_mode_stack()
