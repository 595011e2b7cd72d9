"""SINGD beside what changes how a model runs: checkpoints, offloading, torch.compile, loops."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import (
    OPTIONS,
    assert_bitwise,
    inputs,
    loss_of,
    mlp,
    snapshot,
    statistics_names,
    train,
    trained,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from singd_ext import SINGD

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.compile, of torch itself
]


# ---------------------------------------------------------------- activations in memory


class Segment(nn.Module):
    """Layers whose inputs are watched; run as they are, or as a checkpointed segment."""

    def __init__(self, run: Callable[[Callable, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.run = mlp(5, 4, 4, 3), run
        self.watched: list[StorageWeakRef] = []

    def _forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            self.watched.append(StorageWeakRef(x.untyped_storage()))
        self.watched.pop()
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self._forward, x)

    def alive(self) -> int:
        gc.collect()
        return sum(not storage.expired() for storage in self.watched)


RUNS: dict[str, Callable[[Callable, Tensor], Tensor]] = {
    "plain": lambda f, x: f(x),
    "non_reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "reentrant": lambda f, x: checkpoint(f, x.requires_grad_(), use_reentrant=True),
}


def _offloaded(f: Callable, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return f(x)


@pytest.mark.parametrize("run", ["non_reentrant", "reentrant"])
def test_checkpointed_activations_are_not_kept_alive(run: str) -> None:
    plain = Segment(RUNS["plain"])
    _ = SINGD(plain, T=1)
    loss = loss_of(plain, inputs())
    assert plain.alive() == 2  # outputs of Tanh: the test sees what it is about
    del loss

    model = Segment(RUNS[run])
    optimizer = SINGD(model, **OPTIONS)
    loss = loss_of(model, inputs())
    assert model.alive() == 0
    loss.backward()
    assert len(model.watched) == 8  # the segment was run again
    assert model.alive() == 0
    assert optimizer.state[model.layers[0].weight]["rows"] == 6


def test_activations_are_freed_by_backward_though_the_loss_is_held() -> None:
    model = Segment(RUNS["plain"])
    optimizer = SINGD(model, **OPTIONS)
    loss = loss_of(model, inputs())
    loss.backward(retain_graph=True)
    assert model.alive() == 2
    loss.backward()
    assert model.alive() == 0
    assert optimizer.state[model.layers[0].weight]["rows"] == 12


@pytest.mark.parametrize("run", [*RUNS.values(), _offloaded], ids=[*RUNS, "offloaded"])
def test_factors_do_not_depend_on_how_activations_are_kept(run: Callable) -> None:
    runs = []
    for r in (RUNS["plain"], run):
        model = Segment(r)
        optimizer = SINGD(model, **{**OPTIONS, "T": 2})
        train(model, optimizer, range(4))
        runs.append(snapshot(model, optimizer))
    assert_bitwise(*runs)


def test_saved_tensor_hooks_see_the_inputs_that_are_kept() -> None:
    model = mlp(5, 3)
    _ = SINGD(model, **OPTIONS)
    x, seen = inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        model(x)
    assert [t.data_ptr() for t in seen].count(x.data_ptr()) == 2  # the layer's own, and ours


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_sequential(use_reentrant: bool) -> None:
    class Chunks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(5, 4, 4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return checkpoint_sequential(self.layers, 3, x, use_reentrant=use_reentrant)

    model, reference = Chunks(), mlp(5, 4, 4, 4, 3)
    optimizer, plain = SINGD(model, **OPTIONS), SINGD(reference, **OPTIONS)
    train(model, optimizer, range(3))
    train(reference, plain, range(3))
    assert_bitwise(snapshot(model.layers, optimizer), snapshot(reference, plain))


def test_micro_batches_of_a_reentrant_model_count_each() -> None:
    """Two backward passes with two uses of one layer each: terms of both, uses once."""
    runs = []
    for run in ("plain", "reentrant"):
        layer = mlp(5, 5)
        optimizer = SINGD(layer, **OPTIONS)
        for x in inputs(7, 5).split([4, 3]):
            y = RUNS[run](layer, x.requires_grad_())
            RUNS[run](layer, y.tanh()).square().mean().backward()
        assert optimizer.state[layer[0].weight]["loss_terms"] == 7
        optimizer.step()
        runs.append(snapshot(layer, optimizer))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- torch.compile


class Inplace(nn.Module):
    """A convolution and in-place activations, one layer used twice, one by keyword."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 3, 2).double()
        self.linear, self.last = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.relu(self.conv(x), inplace=True).mean(-1)
        h = self.linear(self.linear(h).relu_())
        return self.last(input=h.tanh_())


@pytest.mark.parametrize(("backend", "T"), [("aot_eager", 1), ("aot_eager", 3), ("inductor", 3)])
def test_compiled_model_gives_the_same_factors_without_graph_breaks(backend: str, T: int) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    runs = []
    for compiled in (False, True):
        model = Inplace()
        optimizer = SINGD(model, **{**OPTIONS, "T": T})
        call = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        for seed in range(5):
            optimizer.zero_grad()
            for x in inputs(6, 2, 5, seed=seed).chunk(2):
                (0.5 * loss_of(call, x)).backward()
            with torch.no_grad():
                call(x)
            optimizer.step()
        runs.append(snapshot(model, optimizer))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-10, atol=1e-12)
    # one graph that observes, one that does not, one without gradients
    assert counter.frame_count == (2 if T == 1 else 3)


def test_compiled_model_is_not_observed_in_a_pause_nor_after_the_optimizer_is_gone() -> None:
    torch._dynamo.reset()
    model, optimizer = trained([])
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with optimizer.paused():
        loss_of(call, inputs()).backward()
    assert not statistics_names(optimizer)
    loss_of(call, inputs()).backward()
    assert optimizer.state[model[0].weight]["rows"] == 6
    torch.autograd.grad(loss_of(call, inputs()), list(model.parameters()))
    assert optimizer.state[model[0].weight]["rows"] == 6
    del optimizer
    gc.collect()
    loss_of(call, inputs()).backward()


# ---------------------------------------------------------------- loops and closures


def test_closure_that_is_evaluated_several_times_counts_the_last_pass_only() -> None:
    model, optimizer = trained([])
    for seed in range(3):

        def closure(seed: int = seed) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, inputs(seed=seed))
            loss.backward()
            return loss

        closure()
        closure()
        optimizer.step(closure)
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained(range(3))))


class _NoReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises where a tensor's number is read on the host, which waits for a GPU."""

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS:
            raise AssertionError(f"step reads a tensor on the host: {func}")
        return func(*args, **(kwargs or {}))


def test_mode_sees_a_read() -> None:
    with pytest.raises(AssertionError, match="reads"), _NoReads():
        torch.ones(()).item()


@pytest.mark.parametrize("scaled", [False, True])
def test_step_reads_no_tensor(monkeypatch: pytest.MonkeyPatch, scaled: bool) -> None:
    """Flags of a CPU are read where they lie; here they count as those of a GPU."""
    monkeypatch.setattr("singd_ext.incidents.Incidents.read", lambda *_: None)
    monkeypatch.setattr("singd_ext.optimizer.is_set_on_host", lambda _: False)
    model, optimizer = trained([], T=2)
    for seed in range(3):
        optimizer.zero_grad()
        with _NoReads():
            loss_of(model, inputs(seed=seed)).backward()
            if scaled:
                optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
            optimizer.step()
    assert_bitwise(snapshot(model, optimizer), snapshot(*trained(range(3), T=2)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_step_can_be_captured_in_a_cuda_graph() -> None:
    runs = []
    for captured in (False, True):
        model = mlp(8, 8, 4, dtype=torch.float32).cuda()
        optimizer = SINGD(model, **OPTIONS)
        x = inputs(6, 8, dtype=torch.float32).cuda()
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
        optimizer.zero_grad()
        loss_of(model, x).backward()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            graph.replay()
        else:
            optimizer.step()
        runs.append(snapshot(model, optimizer))
    assert_bitwise(*runs)
