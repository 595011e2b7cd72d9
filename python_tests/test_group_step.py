"""What a step takes from parameters and state, and what it says of those that do not fit."""

import weakref

import calls
import pytest
import torch
from nets import snapshot
from torch import Tensor, nn

from singd_ext import SINGD, StructuredMatrix, incidents, ops
from singd_ext import optimizer as optimizer_module


def with_gradients() -> tuple[nn.Sequential, SINGD]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = SINGD(net, structures=("diagonal", "dense"), T=1)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    net(torch.randn(5, 4)).square().sum().backward()
    return net, optimizer


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_autograd_refuses_what_was_saved_before_a_step(key: str) -> None:
    """As after a step of torch's own: the gradient would be that of other parameters."""
    net, optimizer = with_gradients()
    saved = getattr(net[0], key).square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_all_that_a_step_changes_has_a_new_version() -> None:
    net, optimizer = with_gradients()
    tensors = {f"parameter {i}": p for i, p in enumerate(net.parameters())}
    for i, state in enumerate(optimizer.state.values()):
        for key in state.keys() & {"K", "C", "m_K", "m_C", "momentum_buffer"}:
            tensors[f"{key} {i}"] = state[key]
    before = {name: (t._version, t.detach().clone()) for name, t in tensors.items()}
    optimizer.step()
    changed = {n for n, (_, value) in before.items() if not torch.equal(value, tensors[n])}
    assert changed == before.keys()
    assert all(tensors[name]._version > version for name, (version, _) in before.items())


def test_sparse_gradients_are_refused() -> None:
    net, optimizer = with_gradients()
    net[1].weight.grad = None
    net[1].weight.grad = torch.ones(2, 3).to_sparse()
    before = snapshot(net, optimizer)
    with pytest.raises(TypeError, match="layer '1' has a sparse gradient; use dense gradients"):
        optimizer.step()
    torch.testing.assert_close(snapshot(net, optimizer), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "entry", ["K", "C", "skipped", "momentum_buffer", "m_K", "m_C", "rejected", "statistic_C"]
)
def test_a_missing_entry_of_the_state_is_named_with_its_layer(entry: str) -> None:
    net, optimizer = with_gradients()
    del optimizer.state[net[1].weight][entry]
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(KeyError, match=f"layer '1' has no tensor '{entry}'.*load a saved state"):
        optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))


def test_a_state_that_is_not_a_tensor_is_named() -> None:
    net, optimizer = with_gradients()
    optimizer.state[net[0].weight]["K"] = [1.0]
    with pytest.raises(KeyError, match="layer '0' has no tensor 'K'"):
        optimizer.step()


def test_a_lost_gradient_is_named_before_anything_changes() -> None:
    net, optimizer = with_gradients()
    net[1].bias.grad = None
    before = snapshot(net, optimizer)
    with pytest.raises(RuntimeError, match=r"layer '1' has a gradient.*requires_grad_\(False\)"):
        optimizer.step()
    torch.testing.assert_close(snapshot(net, optimizer), before, rtol=0, atol=0)


def test_a_replaced_parameter_is_named_when_its_factors_are_due() -> None:
    net, optimizer = with_gradients()
    net[0].weight = nn.Parameter(torch.ones(3, 4))
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="'weight' of layer '0' was replaced"):
        optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))


def test_momenta_and_factors_that_users_exchange_are_used() -> None:
    """Tensors and whole dictionaries: nothing is remembered from the step before."""
    results: list[Tensor] = []
    for exchange in (False, True):
        net, optimizer = with_gradients()
        for p in net.parameters():
            state = {k: torch.clone(v) if isinstance(v, Tensor) else v
                     for k, v in optimizer.state[p].items()}  # fmt: skip
            if exchange:
                state["momentum_buffer"] = torch.zeros_like(p)
            optimizer.state[p] = state
        optimizer.step()
        results.append(net[0].bias.detach())
    assert not torch.equal(*results)


def test_zero_grad_drops_statistics_of_a_state_that_was_exchanged() -> None:
    net, optimizer = with_gradients()
    for group in optimizer.param_groups:
        group["T"] = 100
    gathered = dict(optimizer.state[net[0].weight])
    assert "statistic_K" in gathered
    optimizer.zero_grad()
    optimizer.state[net[0].weight] = gathered
    net(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()  # finds the state; without an update of the factors
    assert "statistic_K" in gathered
    optimizer.zero_grad()
    assert "statistic_K" not in gathered


def test_a_statistic_that_fails_leaves_no_memory_that_holds_nothing() -> None:
    """The next pass begins anew."""
    net, optimizer = with_gradients()
    optimizer.zero_grad()
    state = optimizer.state[net[1].weight]
    C, state["C"] = state["C"], torch.ones(3)
    with pytest.raises(ValueError, match="statistic has shape"):
        net(torch.randn(5, 4)).sum().backward()
    assert not state.keys() & {"statistic_K", "statistic_C", "rows"}
    state["C"] = C
    net(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    assert optimizer.rejections()["1"] == (0, 0)


def test_replaced_projections_of_attention_are_named() -> None:
    """Its layers are parts of a parameter that the module has under another name."""
    torch.manual_seed(0)
    net = nn.MultiheadAttention(4, 2)
    optimizer = SINGD(net, structures=("diagonal", "diagonal"), T=1)
    x = torch.randn(3, 5, 4)
    net(x, x, x)[0].square().sum().backward()
    net.in_proj_weight = nn.Parameter(torch.ones_like(net.in_proj_weight))
    with pytest.raises(RuntimeError, match="was replaced by another"):
        optimizer.step()


@pytest.mark.parametrize("spec", ["rank_triu:1", "rank_tril:1", "rank_triu_topleft:1"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 31, 130])
def test_every_row_of_a_gradient_counts_beside_a_border_of_one(spec: str, rows: int) -> None:
    columns, wide = 9, torch.float64
    K, C = calls.factor(spec, columns, 1, wide), calls.factor(spec, rows, 2, wide)
    gradient = calls.numbers(rows, columns, seed=3, dtype=wide)
    weight, none = torch.zeros_like(gradient), torch.empty(0)
    ops.preconditioned_update_(
        [weight],
        [none],
        [],
        [],
        [torch.zeros((), dtype=torch.int64)],
        [gradient],
        [none],
        [K],
        [C],
        spec,
        spec,
        lr=torch.tensor(1.0),
        momentum=0.0,
        weight_decay=0.0,
    )
    k, c = (
        StructuredMatrix(spec, len(t), f).to_dense() for t, f in ((gradient.T, K), (gradient, C))
    )
    torch.testing.assert_close(weight, -c @ c.T @ gradient @ k @ k.T, rtol=1e-11, atol=1e-11)


class OnGPU(Tensor):
    """Outcomes that are read late."""

    is_cuda = True


class Arrived:
    """The event of a copy that is over."""

    def record(self, stream: object) -> None: ...

    def query(self) -> bool:
        return True


def test_outcomes_that_are_read_late_do_not_keep_the_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And name their layers, though these lists are gone."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", Arrived)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    net, optimizer = with_gradients()
    (lists,) = optimizer._gatherer.steps()
    reader = incidents.Incidents(incidents.PARAMETERS, set())
    reader._host = torch.zeros(2, dtype=torch.int64)  # not pinned
    reader.read(torch.tensor([0, 1]).as_subclass(OnGPU), lists)
    gradient = weakref.ref(net[0].weight.grad)
    del lists
    optimizer.zero_grad()
    assert gradient() is None
    net(torch.randn(5, 4)).sum().backward()
    (lists,) = optimizer._gatherer.steps()
    with pytest.warns(UserWarning, match=r"layers \['1'\]: the gradient was not finite"):
        reader.read(torch.tensor([0, 0]).as_subclass(OnGPU), lists)


def test_statistics_are_gone_before_the_parameters_are_updated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """K Kᵀ of dense factors takes as much memory again."""
    net, optimizer = with_gradients()
    states = [optimizer.state[layer.weight] for layer in net]
    statistics = [weakref.ref(s[key]) for s in states for key in ("statistic_K", "statistic_C")]
    alive = []
    update = optimizer_module.update_parameters

    def call(*args: object) -> Tensor:
        alive.append([s() is not None for s in statistics])
        return update(*args)

    monkeypatch.setattr(optimizer_module, "update_parameters", call)
    optimizer.step()
    assert alive == [[False] * 4]
    assert not any(s.keys() & {"statistic_K", "statistic_C", "rows", "loss_terms"} for s in states)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_a_step_takes_part_in_no_graph(grad_mode: bool) -> None:
    """Of whatever is on its way: views of W, copies of it, bounds of the step, the fallback."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(2, 4, 2, groups=2), nn.Flatten(), nn.LayerNorm(36))
    lr = torch.tensor(1e-2, requires_grad=True)
    optimizer = SINGD(
        net, lr=lr, structures=("diagonal", "diagonal"), T=1, fallback="adamw", kl_clip=1.0
    )
    net(torch.randn(3, 2, 2, 2)).square().sum().backward()
    net[0].bias.requires_grad_(False)
    net[0].bias.grad = None
    before = [p.detach().clone() for p in net.parameters()]
    with torch.set_grad_enabled(grad_mode):
        optimizer.step()
    after = list(net.parameters())
    assert all(p.is_leaf and p.grad_fn is None for p in after)
    assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
        True, False, True, True,
    ]  # fmt: skip
    for state in optimizer.state.values():
        assert not any(t.requires_grad for t in state.values() if isinstance(t, Tensor))


def rearranged(state: dict[Tensor, object], order: str) -> None:
    """Put the entries of an optimizer's state elsewhere: each is looked for where it was."""
    entries = list(state.items())
    if order == "reversed":
        entries.reverse()
    elif order == "behind a hole":
        state[torch.empty(0)] = {}
        del state[next(iter(state))]
    elif order == "rotated":
        entries = entries[1:] + entries[:1]
    for parameter, _ in entries:
        state.pop(parameter, None)
    state.update(entries)


@pytest.mark.parametrize("order", ["reversed", "rotated", "behind a hole"])
def test_states_are_found_wherever_they_are(order: str) -> None:
    results = []
    for moved in (False, True):
        net, optimizer = with_gradients()
        for _ in range(2):
            if moved:
                rearranged(optimizer.state, order)
            optimizer.step()
            optimizer.zero_grad()
            net(torch.ones(5, 4)).square().sum().backward()
        results.append(snapshot(net, optimizer))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_lost_state_is_named() -> None:
    net, optimizer = with_gradients()
    del optimizer.state[net[0].weight]
    with pytest.raises(KeyError, match="layer '0' has no tensor 'momentum_buffer'"):
        optimizer.step()
