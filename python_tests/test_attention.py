"""nn.MultiheadAttention: the same as an attention that is written with linear layers."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import assert_bitwise, inputs, snapshot, statistics_names
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


@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_are_those_of_the_call(need_weights: bool) -> None:
    net = Net(need_weights)
    linears = Linears(net)
    optimizer, reference = SINGD(net, **OPTIONS), SINGD(linears, **OPTIONS)
    causal = torch.ones(TARGETS, TARGETS, dtype=torch.bool).triu(1)
    padding = torch.zeros(SAMPLES, TARGETS, dtype=torch.bool)
    padding[1, 2:] = True
    for seed in range(3):
        for model, opt in ((net, optimizer), (linears, reference)):
            step(model, opt, data(seed, "self"), attn_mask=causal, key_padding_mask=padding)
    assert_same(net, optimizer, linears, reference)


def test_sequence_without_a_batch_dimension_is_one_sample() -> None:
    net, batched = Net(), Net()
    optimizer, reference = SINGD(net, **OPTIONS), SINGD(batched, **OPTIONS)
    for seed in range(3):
        x = inputs(TARGETS, E, seed=seed)
        step(net, optimizer, (x, x, x))
        x = x.unsqueeze(0)
        step(batched, reference, (x, x, x))
    for name, p in batched.named_parameters():
        torch.testing.assert_close(net.get_parameter(name), p, rtol=1e-12, atol=1e-14)
    for name, pair in reference.factors().items():
        for actual, expected in zip(optimizer.factors()[name], pair, strict=True):
            torch.testing.assert_close(actual.data, expected.data, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- within other modules


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


def test_encoder_layer_trains_attention_and_feed_forward_net() -> None:
    model, optimizer = encoder()
    names = [f"layer.self_attn.{name}" for name in ("q", "k", "v", "out_proj")]
    assert list(optimizer.factors()) == [*names, "layer.linear1", "layer.linear2"]
    before = snapshot(model, optimizer)
    encoder_steps(model, optimizer, [0])
    after = snapshot(model, optimizer)
    for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        assert not torch.equal(after[f"layer.self_attn.{name}"], before[f"layer.self_attn.{name}"])
    for name in "qkv":
        key = f"layer.self_attn.in_proj_weight: {name}.K"
        assert not torch.equal(after[key], before[key])


@pytest.mark.parametrize("mode", ["reentrant", "nonreentrant"])
def test_activation_checkpointing_gives_the_same_factors(mode: str) -> None:
    pairs = encoder(mode), encoder()
    for model, optimizer in pairs:
        encoder_steps(model, optimizer, range(3))
    assert_bitwise(snapshot(*pairs[0]), snapshot(*pairs[1]))


def test_attention_that_is_called_twice_adds_up() -> None:
    """The same as one call on a batch of both inputs, for a loss that is a sum."""
    nets = Net(), Net()
    optimizers = [SINGD(net, **OPTIONS, loss_average=None) for net in nets]
    x, y = inputs(SAMPLES, TARGETS, E, seed=1), inputs(SAMPLES, TARGETS, E, seed=2)
    outputs = [(nets[0](x, x, x), nets[0](y, y, y))]
    both = torch.cat([x, y])
    outputs.append((nets[1](both, both, both),))
    for optimizer, parts in zip(optimizers, outputs, strict=True):
        sum((0.01 * part.square().sum() for part in parts), torch.zeros(())).backward()
        optimizer.step()
    for name, p in nets[1].named_parameters():
        torch.testing.assert_close(nets[0].get_parameter(name), p, rtol=1e-10, atol=1e-13)


def test_another_mode_does_not_hide_the_projections() -> None:
    nets = Net(), Net()
    optimizers = [SINGD(net, **OPTIONS) for net in nets]
    step(nets[0], optimizers[0], data(0, "self"))
    with torch.device("cpu"):
        step(nets[1], optimizers[1], data(0, "self"))
    assert_bitwise(snapshot(nets[1], optimizers[1]), snapshot(nets[0], optimizers[0]))


def _modes() -> list[Any]:
    return torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_within_the_forward_pass_leaves_nothing_behind(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("stop")

    net, twin = Net(need_weights=False), Net(need_weights=False)
    optimizer, reference = SINGD(net, **OPTIONS), SINGD(twin, **OPTIONS)
    before = _modes()
    with monkeypatch.context() as patch, pytest.raises(error, match="stop"):
        patch.setattr(F, "scaled_dot_product_attention", fail)
        net(*data(0, "self"))
    if error is RuntimeError:
        assert _modes() == before
    step(net, optimizer, data(0, "self"))
    assert _modes() == before  # torch calls no hook after an interrupt: the next call tidies up
    step(twin, reference, data(0, "self"))
    assert_bitwise(snapshot(net, optimizer), snapshot(twin, reference))


@pytest.mark.parametrize("T", [1, 3])
def test_only_passes_that_count_are_observed(T: int) -> None:
    net = Net()
    optimizer = SINGD(net, **{**OPTIONS, "T": T})
    x = data(0, "self")
    with torch.no_grad():
        net(*x)
    torch.autograd.grad(net(*x).sum(), [net.attention.in_proj_weight])
    with optimizer.paused():
        net(*x).sum().backward()
    assert not statistics_names(optimizer)
    optimizer.zero_grad()
    net(*x).sum().mul(0.01).backward()
    entries = {name.rpartition(".")[2] for name in statistics_names(optimizer)}
    assert entries == {"statistic_K", "statistic_C", "rows", "loss_terms"}
    optimizer.step()
    net(*x).sum().backward()
    assert bool(statistics_names(optimizer)) == (T == 1)
    optimizer.zero_grad()
    assert not statistics_names(optimizer)
    optimizer.remove_hooks()
    net(*x).sum().backward()
    assert not statistics_names(optimizer)
    assert not net.attention._forward_hooks and not net.attention._forward_pre_hooks


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 7}])
@pytest.mark.parametrize("T", [1, 3])
def test_run_is_resumed_bit_for_bit(T: int, options: dict[str, Any]) -> None:
    widths = (options.get("kdim", E), options.get("vdim", E))
    singd = {**OPTIONS, "T": T}
    net, fresh = Net(**options), Net(**options)
    optimizer = SINGD(net, **singd)
    for seed in range(2):
        step(net, optimizer, data(seed, "three", widths))
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    fresh.load_state_dict(weights)
    loaded = SINGD(fresh, **singd)
    loaded.load_state_dict(state)
    for seed in range(2, 6):
        step(net, optimizer, data(seed, "three", widths))
        step(fresh, loaded, data(seed, "three", widths))
    assert_bitwise(snapshot(fresh, loaded), snapshot(net, optimizer))


@pytest.mark.parametrize("key", ["q.K", "k.m_C", "v.rejected", "momentum_buffer"])
def test_state_that_lacks_an_entry_is_refused(key: str) -> None:
    net = Net()
    optimizer = SINGD(net, **OPTIONS)
    step(net, optimizer, data(0, "self"))
    state = copy.deepcopy(optimizer.state_dict())
    before = snapshot(net, optimizer)
    entries = next(e for e in state["state"].values() if "q.K" in e)
    value = entries.pop(key)
    with pytest.raises(ValueError, match=rf"in_proj_weight'.* no '{key}'"):
        optimizer.load_state_dict(state)
    entries[key] = value[:-1] if value.ndim else torch.zeros(2)
    with pytest.raises(ValueError, match=rf"in_proj_weight'.*'{key}' has shape"):
        optimizer.load_state_dict(state)
    assert_bitwise(snapshot(net, optimizer), before)


def test_copied_attention_trains_on_like_the_original() -> None:
    pair = encoder()
    encoder_steps(*pair, [0])
    twin = copy.deepcopy(pair)
    pickled = pickle.loads(pickle.dumps(pair))
    for each in (pair, twin, pickled):
        encoder_steps(*each, [1, 2])
        assert_bitwise(snapshot(*each), snapshot(*pair))
    alone = copy.deepcopy(pair[0])  # carries hooks that do nothing
    alone(inputs(SAMPLES, TARGETS, E)).sum().backward()
    assert not statistics_names(pair[1])


def test_cast_after_construction_takes_all_slices_along() -> None:
    net = Net(dtype=torch.float32)
    optimizer = SINGD(net, **OPTIONS)
    step(net, optimizer, [x.float() for x in data(0, "self")])
    net.double()
    step(net, optimizer, data(1, "self"))
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    assert {v.dtype for v in tensors if v.is_floating_point()} == {torch.float64}


# ---------------------------------------------------------------- whole models


def test_groups_summary_and_fallback_know_attention() -> None:
    net = Net(add_bias_kv=True)
    groups = param_groups(net, weight_decay=0.1)
    optimizer = SINGD(net, params=groups, fallback="adamw")
    rows = {row.parameter.removeprefix("attention."): row for row in optimizer.summary().rows}
    own = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert [n for n, row in rows.items() if row.trained_by == "SINGD"] == own
    assert rows["bias_k"].trained_by == rows["bias_v"].trained_by == "AdamW"
    assert rows["in_proj_weight"].how == "MultiheadAttention, expand"
    expected = 8 * (3 * E * E + 3 * 2 * ((E + 1) ** 2 + E**2) + 3 * 2)
    assert rows["in_proj_weight"].state_bytes == expected
    before = net.attention.in_proj_weight.detach().clone()
    step(net, optimizer, data(0, "self"))
    assert not torch.equal(net.attention.in_proj_weight, before)


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
def test_frozen_part_stays(frozen: str) -> None:
    net = Net()
    net.attention.get_parameter(frozen).requires_grad_(False)
    linears = Linears(net)
    parts = {
        "in_proj_weight": ["q.weight", "k.weight", "v.weight"],
        "in_proj_bias": ["q.bias", "k.bias", "v.bias"],
    }.get(frozen, [frozen])
    for name in parts:
        linears.get_parameter(name).requires_grad_(False)
    optimizer, reference = SINGD(net, **OPTIONS), SINGD(linears, **OPTIONS)
    for seed in range(3):
        step(net, optimizer, data(seed, "cross"))
        step(linears, reference, data(seed, "cross"))
    assert_same(net, optimizer, linears, reference)


def test_attention_left_to_another_optimizer_is_not_observed() -> None:
    model = Encoder()
    others = [p for name, p in model.named_parameters() if "self_attn" not in name]
    optimizer = SINGD(model, params=others, fallback="adamw")
    assert list(optimizer.factors()) == ["layer.linear1", "layer.linear2"]
    assert not model.layer.self_attn._forward_pre_hooks


@pytest.mark.parametrize("T", [1, 2])
def test_compiled_attention_is_observed(T: int) -> None:
    warnings.simplefilter("ignore")  # the compiler reads `grad` of tensors; pytest restores
    torch._dynamo.reset()
    before = _modes()
    nets = Net(need_weights=False), Net(need_weights=False)
    optimizers = [SINGD(net, **{**OPTIONS, "T": T}) for net in nets]
    compiled = torch.compile(nets[0], backend="aot_eager")
    for seed in range(4):
        step(compiled, optimizers[0], data(seed, "self"))
        step(nets[1], optimizers[1], data(seed, "self"))
    assert _modes() == before
    actual, expected = (snapshot(*pair) for pair in zip(nets, optimizers, strict=True))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-13, msg=name)
