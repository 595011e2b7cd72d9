"""What a step takes from parameters and state, and what it says of those that do not fit."""

import calls
import pytest
import torch
from nets import snapshot
from torch import Tensor, nn

from singd_ext import SINGD, StructuredMatrix, ops


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
