"""nn.MultiheadAttention: its state, and its place in groups, summaries and compiled models."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from attention_nets import (
    OPTIONS,
    SAMPLES,
    TARGETS,
    E,
    Encoder,
    Linears,
    Net,
    assert_same,
    data,
    encoder,
    encoder_steps,
    modes,
    step,
)
from nets import assert_bitwise, inputs, snapshot, statistics_names
from torch import Tensor

from singd_ext import SINGD, param_groups

pytestmark = [pytest.mark.filterwarnings("error")]

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
    before = modes()
    nets = Net(need_weights=False), Net(need_weights=False)
    optimizers = [SINGD(net, **{**OPTIONS, "T": T}) for net in nets]
    compiled = torch.compile(nets[0], backend="aot_eager")
    for seed in range(4):
        step(compiled, optimizers[0], data(seed, "self"))
        step(nets[1], optimizers[1], data(seed, "self"))
    assert modes() == before
    actual, expected = (snapshot(*pair) for pair in zip(nets, optimizers, strict=True))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-13, msg=name)
