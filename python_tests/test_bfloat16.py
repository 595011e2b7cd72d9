"""SINGD and IKFAC train the network of `make demo` in pure bfloat16: parameters, state, factors."""

import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from singd_ext import SINGD

EXAMPLE = Path(__file__).parents[1] / "examples" / "mnist_cnn.py"


@cache
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@cache
def digits() -> tuple[Tensor, Tensor]:
    return example()["load_digits"](torch.bfloat16)


STRUCTURES = ["dense", "triu", "diagonal", "block_diagonal:16", "rank_triu:1", "rank_tril:1",
              "hierarchical:8,8", "triu_toeplitz"]  # fmt: skip
CASES = [(structure, "reduce") for structure in STRUCTURES]
CASES += [("dense", "expand"), ("hierarchical:8,8", "expand")]


# Learning rates at which the same runs in float32 are stable: (kfac_like, kfac_approx) -> lr.
LEARNING_RATES = {
    (False, "reduce"): 2e-3,
    (True, "reduce"): 5e-4,
    (False, "expand"): 5e-3,
    (True, "expand"): 5e-3,
}


@pytest.mark.parametrize("kfac_like", [False, True], ids=["SINGD", "IKFAC"])
@pytest.mark.parametrize(("structure", "kfac_approx"), CASES)
@pytest.mark.filterwarnings("ignore:.*shortened to step_cap")  # the first steps are large
def test_pure_bfloat16_is_stable(structure: str, kfac_like: bool, kfac_approx: str) -> None:
    """The loss falls in 80 steps with 80 factor updates, none of which is rejected."""
    images, labels = digits()
    torch.manual_seed(0)
    network = example()["make_network"]().to(torch.bfloat16)
    optimizer = SINGD(
        network,
        lr=LEARNING_RATES[kfac_like, kfac_approx],
        lr_cov=0.05,
        damping=0.03,
        alpha1=0.0 if kfac_like else 0.5,
        T=1,
        structures=(structure, structure),
        kfac_like=kfac_like,
        kfac_approx=kfac_approx,
        normalize_lr_cov=True,
    )
    losses = []
    for batch in torch.arange(4000).split(50):
        optimizer.zero_grad()
        loss = cross_entropy(network(images[batch]).float(), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    assert all(t.dtype in (torch.bfloat16, torch.int64) for t in tensors)
    assert all(t.isfinite().all() for t in [*tensors, *network.parameters()])
    assert set(optimizer.rejections().values()) == {(0, 0)}
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]


def final_loss(structure: str, seed: int, factors: torch.dtype, steps: int = 400) -> float:
    """Of a bfloat16 network with T = 10, whose inputs have a large mean."""
    images, labels = digits()
    inputs = adaptive_avg_pool2d(images.float(), 8).flatten(1).bfloat16() + 16
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.ReLU(),
        torch.nn.Linear(256, 256), torch.nn.ReLU(),
        torch.nn.Linear(256, 10),
    ).to(torch.bfloat16)  # fmt: skip
    optimizer = SINGD(
        network, lr=1e-3, damping=0.01, alpha1=0.0, T=10, lr_cov=0.1, kfac_like=True,
        structures=(structure, structure), preconditioner_dtype=(factors, factors),
    )  # fmt: skip
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(inputs), (128,))
        optimizer.zero_grad()
        loss = cross_entropy(network(inputs[batch]).float(), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


@pytest.mark.filterwarnings("ignore:.*shortened to step_cap")  # as above
@pytest.mark.parametrize("structure", ["dense", "hierarchical:16,16", "rank_triu:16"])
def test_factors_in_bfloat16_train_ill_conditioned_layers_as_those_in_float32(
    structure: str,
) -> None:
    """The curvature of the inputs' mean is 1e6 times damping: a K Kᵀ in bfloat16 is indefinite."""
    for seed in range(4):
        rival = final_loss(structure, seed, torch.float32)
        assert final_loss(structure, seed, torch.bfloat16) < 1.1 * rival


def small_run(**options: Any) -> Tensor:
    torch.manual_seed(0)
    network = torch.nn.Linear(20, 10).to(torch.bfloat16)
    optimizer = SINGD(network, T=1, structures=("diagonal", "diagonal"), **options)
    for _ in range(20):
        optimizer.zero_grad()
        x = torch.randn(8, 20, dtype=torch.bfloat16)
        network(x).square().mean().backward()
        optimizer.step()
    K, C = optimizer.factors()[""]
    return torch.cat([network.weight.detach().flatten(), K.data, C.data])


def test_stochastic_rounding_lets_small_steps_of_the_factors_through_and_repeats() -> None:
    """A step of the factors below half of a rounding: to nearest, a bfloat16 factor stays at 1."""
    options = {"lr": 1e-4, "lr_cov": 1e-3, "alpha1": 0.0}
    nearest = small_run(**options)
    first, second = (small_run(**options, stochastic_rounding=True, seed=1) for _ in range(2))
    other = small_run(**options, stochastic_rounding=True, seed=2)
    assert (nearest[200:] == 1).all()
    assert not (first[200:] == 1).all()
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
