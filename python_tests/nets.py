"""A small net, its data and bit-for-bit comparisons, for the tests of the optimizer."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from singd_ext import SINGD

# Options under which a few steps on `mlp` move the factors well without reaching the step cap.
OPTIONS: dict[str, Any] = {"lr": 0.05, "lr_cov": 0.05, "T": 1, "weight_decay": 0.01}


def mlp(
    *sizes: int, bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0
) -> nn.Sequential:
    """Linear layers of the given sizes (default 5, 4, 3) with Tanh between them."""
    torch.manual_seed(seed)
    sizes = sizes or (5, 4, 3)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        layers += [nn.Linear(d_in, d_out, bias=bias, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def inputs(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, requires_grad: bool = False
) -> Tensor:
    """Reproducible normal numbers of the given shape (default 6 samples of 5 features)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*(shape or (6, 5)), generator=generator, dtype=torch.float64, device="cpu")
    return x.to(torch.get_default_device(), dtype).requires_grad_(requires_grad)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Mean over the leading dimension of a smooth function of the output."""
    return (model(x) - 0.7).square().sum() / max(1, x.shape[0])


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """Clear the gradients, then compute those of `loss_of`; return the loss."""
    optimizer.zero_grad()
    loss = loss_of(model, x)
    loss.backward()
    return loss.detach()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, seeds: Sequence[int], *shape: int
) -> None:
    """One step on the inputs of every seed."""
    dtype = next(model.parameters()).dtype
    for seed in seeds:
        backward(model, optimizer, inputs(*shape, seed=seed, dtype=dtype))
        optimizer.step()


def trained(seeds: Sequence[int] = range(3), **options: Any) -> tuple[nn.Sequential, SINGD]:
    """`mlp` and its optimizer after a step on the inputs of every seed."""
    model = mlp()
    optimizer = SINGD(model, **{**OPTIONS, **options})
    train(model, optimizer, seeds)
    return model, optimizer


def statistics_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of the gathered statistics that the state holds at the moment."""
    lasting = {"K", "C", "m_K", "m_C", "momentum_buffer", "rejected", "skipped"}
    keys = {key for state in optimizer.state.values() for key in state}
    return {key for key in keys if key.rpartition(".")[2] not in lasting}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of the parameters and of everything in the optimizer's state."""
    copies: dict[str, Any] = {}
    for name, p in model.named_parameters():
        copies[name] = p.detach().clone()
        for key, value in optimizer.state.get(p, {}).items():
            copies[f"{name}: {key}"] = value.clone() if isinstance(value, Tensor) else value
    return copies


def of_layer(copies: dict[str, Any], layer: str) -> dict[str, Any]:
    """The part of a snapshot that belongs to one layer, without its counters."""
    return {
        key: value
        for key, value in copies.items()
        if key.startswith(f"{layer}.") and not key.endswith((": rejected", ": skipped"))
    }


def assert_bitwise(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """The two snapshots have the same entries, of the same dtypes and values."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                actual[key], value, rtol=0, atol=0, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
            )
        else:
            assert actual[key] == value, key


def differ(actual: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether any tensor that both snapshots hold has other values."""
    return any(
        not torch.equal(value, other[key])
        for key, value in actual.items()
        if isinstance(value, Tensor) and key in other
    )
