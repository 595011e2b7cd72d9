"""What is kept from step to step: the operators' working memory, and K Kᵀ of dense factors."""

import pytest
import torch
from nets import snapshot, trained
from torch import Tensor, nn

from singd_ext import SINGD

DENSE = ("dense", "triu")


def train_step(net: nn.Module, optimizer: SINGD, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    net(torch.randn(9, 6, dtype=torch.float64)).square().mean().backward()
    optimizer.step()


def test_the_kept_product_follows_updates_and_edits_of_the_factor() -> None:
    """A factor that is replaced or changed in place acts at the next step."""
    results = {}
    for change in ("none", "in place", "replaced"):
        torch.manual_seed(0)
        net = nn.Linear(6, 4).double()
        optimizer = SINGD(net, structures=DENSE, T=5, lr_cov=0.1)
        for seed in range(3):
            train_step(net, optimizer, seed)
        state = optimizer.state[net.weight]
        if change == "in place":
            state["K"].mul_(2)
        elif change == "replaced":
            state["K"] = 2 * state["K"]
        train_step(net, optimizer, 3)
        results[change] = net.weight.detach().clone()
    assert torch.equal(results["in place"], results["replaced"])
    assert not torch.equal(results["in place"], results["none"])


def test_the_kept_product_equals_two_products() -> None:
    """T = 1 makes the product anew in every step, an update that changes nothing keeps it."""

    def final(T: int) -> dict[str, Tensor]:
        model, optimizer = trained(range(4), structures=DENSE, T=T, lr_cov=1e-30)
        return {k: v for k, v in snapshot(model, optimizer).items() if k.endswith("weight")}

    torch.testing.assert_close(final(1), final(4), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("structures", [DENSE, ("diagonal", "block_diagonal:2")])
def test_outcomes_and_workspace_are_the_same_memory_in_every_step(
    structures: tuple[str, str],
) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    optimizer = SINGD(net, structures=structures, T=1)
    addresses = set()
    for seed in range(4):
        train_step(net, optimizer, seed)
        calls = optimizer._calls[0]
        if seed > 0:
            memories = (calls.factors, calls.parameters)
            tensors = [m._outcomes for m in memories] + [m._workspace._memory for m in memories]
            addresses.add(tuple(t.data_ptr() for t in tensors))
    assert len(addresses) == 1
