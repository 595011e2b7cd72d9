"""Layers that come with other packages: torch_geometric's Linear and GCNConv, PEFT's LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from singd_ext import SINGD


def train(model: nn.Module, loss: object, **options: object) -> tuple[SINGD, dict[str, bool]]:
    """Take three steps; say which parameters moved."""
    optimizer = SINGD(model, lr=1e-2, T=1, lr_cov=1e-3, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    moved = {n: not torch.equal(before[n], p) for n, p in model.named_parameters()}
    return optimizer, moved


def test_a_graph_convolution_is_a_linear_layer_before_propagation() -> None:
    geometric = pytest.importorskip("torch_geometric.nn", reason="needs torch_geometric")
    torch.manual_seed(0)
    edges = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 0, 3, 2, 2, 0]])
    x = torch.randn(4, 5, dtype=torch.float64)
    conv = geometric.GCNConv(5, 3).double()
    plain = nn.Linear(5, 3, bias=False).double()
    plain.weight.data.copy_(conv.lin.weight.data)
    propagation = geometric.GCNConv(5, 3, bias=False).double()  # its matrix, from unit vectors
    propagation.lin.weight.data.zero_()
    propagation.lin.weight.data[0, 0] = 1
    units = torch.zeros(4, 4, 5, dtype=torch.float64)
    units[torch.arange(4), torch.arange(4), 0] = 1
    matrix = torch.stack([propagation(unit, edges)[:, 0] for unit in units], 1).detach()

    ours, moved = train(conv, lambda: conv(x, edges).square().mean(), fallback="adamw")
    assert all(moved.values())
    assert list(ours.factors()) == ["lin"]
    bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    adam = torch.optim.AdamW([bias])
    reference = SINGD(plain, lr=1e-2, T=1, lr_cov=1e-3)
    for _ in range(3):
        reference.zero_grad()
        adam.zero_grad()
        (matrix @ plain(x) + bias).square().mean().backward()
        adam.step()
        reference.step()
    torch.testing.assert_close(conv.lin.weight, plain.weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(conv.bias, bias, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", ["linear", "conv1d"])
def test_lora_trains_its_own_matrices_and_keeps_the_base(target: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers")
    torch.manual_seed(0)
    layer = nn.Linear(6, 4) if target == "linear" else pytorch_utils.Conv1D(4, 6)
    base = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2))
    config = peft.LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=target == "conv1d")
    model = peft.get_peft_model(base, config)
    x = torch.randn(8, 6)
    optimizer, moved = train(model, lambda: model(x).square().mean())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, changed in moved.items() if changed} == trained
    assert all("lora_" in name for name in trained) and len(trained) == 2
    assert sorted(name.split(".")[-2] for name in optimizer.factors()) == ["lora_A", "lora_B"]
