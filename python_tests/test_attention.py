"""nn.MultiheadAttention: the same as an attention that is written with linear layers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_nets import (
    OPTIONS,
    SAMPLES,
    TARGETS,
    E,
    Linears,
    Net,
    assert_same,
    data,
    encoder,
    encoder_steps,
    linear_parts,
    modes,
    step,
)
from nets import assert_bitwise, inputs, snapshot, statistics_names

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]

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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_within_the_forward_pass_leaves_nothing_behind(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("stop")

    net, twin = Net(need_weights=False), Net(need_weights=False)
    optimizer, reference = SINGD(net, **OPTIONS), SINGD(twin, **OPTIONS)
    before = modes()
    with monkeypatch.context() as patch, pytest.raises(error, match="stop"):
        patch.setattr(F, "scaled_dot_product_attention", fail)
        net(*data(0, "self"))
    if error is RuntimeError:
        assert modes() == before
    step(net, optimizer, data(0, "self"))
    assert modes() == before  # torch calls no hook after an interrupt: the next call tidies up
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
