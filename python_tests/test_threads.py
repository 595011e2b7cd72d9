"""The operators on several threads give what they give on one, and repeat bit for bit."""

import warnings
from typing import Any

import calls
import pytest
import torch
from reference import masks
from tolerance import assert_close_to_truth
from torch import Tensor, nn

from singd_ext import SINGD


def train(spec: str, threads: int) -> Tensor:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 260), nn.Tanh(), nn.Linear(260, 10)).double()
    optimizer = SINGD(net, lr=0.01, lr_cov=0.05, T=1, structures=(spec, spec))
    for _ in range(3):
        optimizer.zero_grad()
        x, y = torch.randn(200, 300, dtype=torch.float64), torch.randint(10, (200,))
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def stepped(spec: str, dtype: torch.dtype, threads: int, **options: Any) -> Tensor:
    """Return a weight of odd sizes, larger than a cache, after steps with the same gradient."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = nn.Linear(1021, 523).to(dtype)
    optimizer = SINGD(net, lr=0.1, structures=(spec, spec), warn_unsupported=False, **options)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a module that was not called
        for _ in range(2):
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec", ["diagonal", "block_diagonal:30", "hierarchical:2,1"])
@pytest.mark.parametrize("rounding", [False, True], ids=["nearest", "stochastic"])
def test_weights_that_are_stored_past_the_caches(
    spec: str, dtype: torch.dtype, rounding: bool, threads: None
) -> None:
    """Several threads store large weights past the caches, one does not: same bits, each number."""
    one = stepped(spec, dtype, 1, stochastic_rounding=rounding)
    assert torch.equal(stepped(spec, dtype, 2, stochastic_rounding=rounding), one)
    assert torch.equal(stepped(spec, dtype, 3, stochastic_rounding=rounding), one)


@pytest.mark.parametrize("spec", ["diagonal", "block_diagonal:30", "rank_triu:1", "rank_tril:17"])
def test_layers_of_several_groups(spec: str, threads: None) -> None:
    """A call over layers that do not fit a cache together gives what a call a layer gives."""
    shapes = [calls.Shape(*size) for size in ((520, 530), (40, 30), (700, 410), (523, 521))]
    shapes += [calls.Shape(300, 900, bias=True)] * 2
    for count in (1, 3):
        torch.set_num_threads(count)
        together = calls.update_parameters(spec, spec, shapes, torch.float32)
        for i, shape in enumerate(shapes):
            alone = calls.update_parameters(spec, spec, [shape], torch.float32, first=i)
            for name in ("weight", "bias", "momentum"):
                assert torch.equal(together[name][i], alone[name][0]), f"{name} {i}"


@pytest.mark.parametrize("spec", ["diagonal", "block_diagonal:30", "rank_triu:17", "rank_tril:17"])
def test_factors_of_layers_that_one_thread_takes_from_another(spec: str, threads: None) -> None:
    """Each works in memory of its own, whoever's layer it is: no number is another's."""
    shapes = [calls.Shape(100 + 37 * i % 500, 90 + 53 * i % 400) for i in range(24)]
    torch.set_num_threads(1)
    one = calls.update_factors(spec, spec, shapes, torch.float32)
    torch.set_num_threads(3)
    for _ in range(10):
        many = calls.update_factors(spec, spec, shapes, torch.float32)
        for name, tensors in one.items():
            assert all(map(torch.equal, many[name], tensors)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec", masks.SPECS)
def test_statistics_of_parts_of_the_rows(spec: str, dtype: torch.dtype, threads: None) -> None:
    """Numbers of threads that divide neither rows nor columns."""
    compare_statistics(spec, calls.Shape(1, 333, bias=True), 700, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "spec",
    ["block_diagonal:30", "rank_triu:1", "rank_triu_topleft:1", "rank_tril:1", "hierarchical:2,3"],
)
def test_statistics_of_parts_of_the_columns(spec: str, dtype: torch.dtype, threads: None) -> None:
    """Of few rows, whose sums are no smaller than they are."""
    compare_statistics(spec, calls.Shape(1, 2301, bias=True), 5, dtype)


def compare_statistics(spec: str, shape: calls.Shape, rows: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    truth = calls.accumulate(spec, shape, rows, torch.float64)
    one = calls.accumulate(spec, shape, rows, dtype)
    for count in (2, 3, 5, 16):
        torch.set_num_threads(count)
        many = calls.accumulate(spec, shape, rows, dtype)
        assert_close_to_truth(many, one, truth, factor=4.0)
        assert torch.equal(calls.accumulate(spec, shape, rows, dtype), many), count


@pytest.mark.parametrize("spec", masks.SPECS)
def test_threads(spec: str, threads: None) -> None:
    one, four, again = train(spec, 1), train(spec, 4), train(spec, 4)
    torch.testing.assert_close(four, one, rtol=1e-11, atol=1e-13)
    assert torch.equal(four, again)


@pytest.mark.parametrize("huge", [False, True], ids=["", "near-overflow"])
@pytest.mark.parametrize("spec", ["block_diagonal:30", "rank_triu:17", "rank_tril:17"])
def test_steps_of_layers_that_share_memory(spec: str, huge: bool, threads: None) -> None:
    """No thread takes what is not made yet, or makes what another still takes.

    Near overflow products are looked at first, while other threads write.
    """
    shapes = [calls.Shape(100 + 37 * i % 500, 90 + 53 * i % 400) for i in range(24)]
    options: dict[str, Any] = {}
    if huge:
        options = {"grad_scale": torch.tensor(5e-38), "lr": torch.tensor(1e-37)}
    torch.set_num_threads(1)
    one = calls.update_parameters(spec, spec, shapes, torch.float32, **options)
    assert not any(map(torch.count_nonzero, one["skipped"]))
    for count in (2, 3):
        torch.set_num_threads(count)
        for _ in range(5):
            many = calls.update_parameters(spec, spec, shapes, torch.float32, **options)
            calls.assert_same(one, many)
