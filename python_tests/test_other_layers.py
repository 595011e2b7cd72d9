"""Layer types beside Linear and convolutions, against nets of linear layers; sizes of 1."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from nets import OPTIONS, backward, inputs, loss_of, mlp, snapshot, train
from reference.masks import SPECS
from reference.singd import ReferenceSINGD
from torch import nn

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]

OPTION_SETS: dict[str, dict[str, Any]] = {
    "dense": {},
    "reduce": {"kfac_approx": "reduce", "structures": ("diagonal", "block_diagonal:3")},
    "clipped": {"max_update_norm": 0.1, "momentum": 0.0, "T": 2},
}


# -------------------------------------------------------------------- Hugging Face's Conv1D


def conv1d_net() -> nn.Sequential:
    """`mlp` of Conv1D layers."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    linears = mlp()
    model = nn.Sequential(conv1d(4, 5), nn.Tanh(), conv1d(3, 4)).double()
    for i in (0, 2):
        model[i].weight.data.copy_(linears[i].weight.t())
        model[i].bias.data.copy_(linears[i].bias)
    return model


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)
def test_conv1d_equals_linear(options: dict[str, Any]) -> None:
    model, reference = conv1d_net(), mlp()
    optimizer, plain = (SINGD(m, **{**OPTIONS, **options}) for m in (model, reference))
    initial = model[0].weight.detach().clone()
    train(model, optimizer, range(4), 6, 2, 5)
    train(reference, plain, range(4), 6, 2, 5)
    actual, expected = snapshot(model, optimizer), snapshot(reference, plain)
    for name in expected:
        if name.split(":")[0].endswith("weight") and expected[name].ndim == 2:
            actual[name] = actual[name].t()  # weights and their momenta
    assert actual.keys() == expected.keys()
    for name, value in expected.items():  # torch sums the products of addmm in another order
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-13, msg=name)
    assert not torch.equal(model[0].weight, initial)


def test_conv1d_with_frozen_weight_trains_the_bias() -> None:
    model, reference = conv1d_net(), mlp()
    for m in (model, reference):
        m[0].weight.requires_grad_(False)
    train(model, SINGD(model, **OPTIONS), range(2))
    train(reference, SINGD(reference, **OPTIONS), range(2))
    torch.testing.assert_close(model[0].bias, reference[0].bias, rtol=1e-12, atol=1e-14)


def test_transformers_is_not_imported_for_it() -> None:
    code = (
        "import sys, torch, singd_ext; singd_ext.SINGD(torch.nn.Linear(2, 2));"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------- sizes of 1


@pytest.mark.parametrize("structure", SPECS)
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (1, 6), (6, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_with_a_dimension_of_one(d_in: int, d_out: int, bias: bool, structure: str) -> None:
    options = {"lr": 0.05, "lr_cov": 0.003, "T": 1, "structures": (structure, structure)}
    model = mlp(d_in, d_out, bias=bias)
    optimizer, reference = SINGD(model, **options), ReferenceSINGD(model, **options)
    for seed in range(3):
        x = inputs(6, d_in, seed=seed)
        backward(model, optimizer, x)
        optimizer.step()
        reference.zero_grad()
        reference.backward(loss_of(reference.model, x))
        reference.step()
    torch.testing.assert_close(model[0].weight, reference.model[0].weight, rtol=1e-11, atol=1e-13)
    (factors,), (expected,) = optimizer.factors().values(), reference.factors().values()
    for actual, dense in zip(factors, expected, strict=True):
        torch.testing.assert_close(actual.to_dense(), dense, rtol=1e-11, atol=1e-13)
    assert not torch.equal(factors[0].data, torch.ones_like(factors[0].data))
