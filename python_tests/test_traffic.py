"""What the CUDA kernels move and launch, counted by the emulator, against what they must."""

from typing import Any

import backends
import pytest
import torch
import traffic
from calls import Shape, numbers
from torch import nn
from torch.profiler import ProfilerActivity, profile

from singd_ext import SINGD, ops

pytestmark = pytest.mark.skipif(
    backends.missing("cuda-emulated") is not None, reason=str(backends.missing("cuda-emulated"))
)

BF16, F32 = torch.bfloat16, torch.float32
STREAMING = ["diagonal", "block_diagonal:32", "rank_triu:1", "hierarchical:16,16", "rank_tril:1"]
# Passes over d_o × d_i of a step (docs/cuda.md).
PASSES = {
    "diagonal": 5,
    "block_diagonal:30": 5,
    "block_diagonal:32": 5,
    "rank_triu:1": 6,
    "rank_tril:1": 6,
    "hierarchical:16,16": 6,
}
SPARSE = list(PASSES)


def dram_bytes(counts: dict[str, Any]) -> int:
    return counts["total"]["dram_bytes_read"] + counts["total"]["dram_bytes_written"]


def assert_efficient(counts: dict[str, Any]) -> None:
    """Of the 32-byte sectors that warps ask for, 95 % or more hold bytes they asked for."""
    total = counts["total"]
    least = total["least_sectors_read"] + total["least_sectors_written"]
    moved = total["sectors_read"] + total["sectors_written"]
    assert least / moved >= 0.95


def count_statistic(spec: str, rows: int, dim: int) -> dict[str, Any]:
    x = numbers(1, rows, dim, seed=0, dtype=BF16)
    k = traffic.layer(spec, Shape(1, dim), BF16, F32)["K"]
    statistic = torch.zeros_like(k)
    with backends.use("cuda-emulated", seed=0), traffic.counting() as counts:
        ops.accumulate_statistic_(statistic, x, k, dim, spec)
    assert statistic.count_nonzero() > 0
    return counts


@pytest.mark.parametrize("dim", [768, 1024, 3072, 4096])
@pytest.mark.parametrize("spec", STREAMING)
def test_a_statistic_reads_the_rows_once(spec: str, dim: int) -> None:
    rows = 4096
    counts = count_statistic(spec, rows, dim)
    assert dram_bytes(counts) <= 1.05 * traffic.least_statistic_bytes(spec, rows, dim, BF16)
    assert_efficient(counts)


def count_step(
    spec: str, shapes: list[Shape], dtype: torch.dtype, factor_dtype: torch.dtype
) -> dict[str, Any]:
    layers = [traffic.layer(spec, s, dtype, factor_dtype) for s in shapes]
    before = [one["weight"].clone() for one in layers]
    arguments, options = traffic.step_arguments(spec, layers)
    with backends.use("cuda-emulated", seed=0), traffic.counting() as counts:
        ops.preconditioned_update_(*arguments, **options)
    assert all(not torch.equal(b, o["weight"]) for b, o in zip(before, layers, strict=True))
    return counts


@pytest.mark.parametrize("model", traffic.GPT2)
@pytest.mark.parametrize("spec", SPARSE)
def test_a_step_moves_little_more_than_it_must(spec: str, model: str) -> None:
    shapes = traffic.GPT2[model]
    counts = count_step(spec, shapes, BF16, F32)
    least = traffic.least_step_bytes(spec, shapes, PASSES[spec], BF16, F32)
    assert dram_bytes(counts) <= 1.05 * least
    assert_efficient(counts)


def train_step(net: nn.Module, optimizer: SINGD) -> None:
    optimizer.zero_grad()
    net(torch.ones(2, 8)).square().mean().backward()
    optimizer.step()


def net_of(blocks: int) -> nn.Sequential:
    shapes = [(8, 24), (24, 8), (8, 32), (32, 8)]
    layers = [nn.Linear(d_i, d_o) for _ in range(blocks) for d_i, d_o in shapes]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("spec", [*SPARSE, "hierarchical:2,1", "rank_triu_topleft:2"])
def test_launches_of_a_step_do_not_grow_with_the_number_of_layers(spec: str) -> None:
    launches = []
    for blocks in (12, 48):
        net = net_of(blocks)
        optimizer = SINGD(net, structures=(spec, spec), T=1)
        net(torch.ones(2, 8)).square().mean().backward()
        with backends.use("cuda-emulated", seed=0), traffic.counting() as counts:
            optimizer.step()
        launches.append(counts["total"]["launches"])
    assert launches[0] == launches[1]


@pytest.mark.parametrize("spec", SPARSE)
def test_a_steady_step_neither_allocates_nor_waits(spec: str) -> None:
    """Neither operator calls anything of ATen: no empty, resize_, item or copy."""
    with backends.use("cuda-emulated", seed=0):
        net = net_of(2)
        optimizer = SINGD(net, structures=(spec, spec), T=1)
        for _ in range(3):
            train_step(net, optimizer)
        net(torch.ones(2, 8)).square().mean().backward()
        with profile(activities=[ProfilerActivity.CPU]) as events:
            optimizer.step()
    for name in ("update_factors_", "preconditioned_update_"):
        called = [e for e in events.events() if e.name == f"singd_emulated::{name}"]
        assert len(called) == 1
        assert [child.name for child in called[0].cpu_children] == []


def test_the_goal_against_adamw() -> None:
    """Bytes of a step of GPT-2 medium's block linears, in bfloat16, over those of fused AdamW."""
    # Three blocks: their gradients are more than the cache holds, as those of all 24 are.
    shapes = traffic.GPT2["medium"] * 3
    adamw = traffic.adamw_bytes(shapes, BF16)
    for spec, goal in (
        ("diagonal", 0.75),
        ("block_diagonal:32", 0.75),
        ("hierarchical:16,16", 0.92),
    ):
        ratio = dram_bytes(count_step(spec, shapes, BF16, F32)) / adamw
        print(f"{spec}: {ratio:.3f} of fused AdamW's bytes")
        assert ratio <= goal


def test_statistics_cost_a_tenth_of_adamw() -> None:
    """At T = 10 with 8,192 tokens, over the bytes of a fused AdamW step of the same layers."""
    shapes = traffic.GPT2["medium"]
    adamw = traffic.adamw_bytes(shapes, BF16)
    for spec in ("diagonal", "block_diagonal:32", "hierarchical:16,16"):
        moved = sum(
            dram_bytes(count_statistic(spec, 8192, dim)) for s in shapes for dim in (s.d_i, s.d_o)
        )
        print(f"{spec}: {moved / 10 / adamw:.3f} of fused AdamW's bytes")
        assert moved / 10 <= 0.10 * adamw
