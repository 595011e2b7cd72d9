"""Embeddings, which are linear layers over one-hot rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from singd_ext import SINGD, register_layer
from singd_ext.embedding import EmbeddingKind
from singd_ext.registry import KINDS

VOCABULARY, WIDTH = 7, 5


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_layer(nn.Embedding, EmbeddingKind())
    yield
    del KINDS[nn.Embedding]


def one_hot(tokens: torch.Tensor, padding: int | None) -> torch.Tensor:
    rows = F.one_hot(tokens, VOCABULARY).double()
    if padding is not None:
        rows[tokens == padding] = 0
    return rows


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("shape", [(6,), (4, 9), (3, 2, 5)])
@pytest.mark.parametrize("structure", ["dense", "hierarchical:1,2"])
def test_equals_a_linear_layer_over_one_hot_rows(
    kfac_approx: str, padding: int | None, shape: tuple[int, ...], structure: str
) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding).double()
    linear = nn.Linear(VOCABULARY, WIDTH, bias=False).double()
    linear.weight.data.copy_(embedding.weight.data.t())
    options = {"T": 1, "lr_cov": 1e-2, "structures": ("diagonal", structure)}
    optimizers = [SINGD(m, kfac_approx=kfac_approx, **options) for m in (embedding, linear)]
    for _ in range(4):
        tokens = torch.randint(VOCABULARY, shape)
        target = torch.randn(*shape, WIDTH, dtype=torch.float64)
        for optimizer, output in zip(
            optimizers, (embedding(tokens), linear(one_hot(tokens, padding))), strict=True
        ):
            optimizer.zero_grad()
            (output * target).sum().div(shape[0]).backward()
            optimizer.step()
    torch.testing.assert_close(embedding.weight.t(), linear.weight, rtol=1e-10, atol=1e-12)
    ours, theirs = (next(iter(optimizer.factors().values())) for optimizer in optimizers)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.to_dense(), b.to_dense(), rtol=1e-10, atol=1e-12)
        assert (a.to_dense() - torch.eye(a.shape[0])).abs().max() > 1e-4


def test_other_structures_of_k_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"layer '0' is an Embedding.*structures=\('diagonal'"):
        SINGD(nn.Sequential(nn.Embedding(4, 3)), structures=("dense", "dense"))


def test_sparse_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="layer '0' has sparse=True"):
        SINGD(nn.Sequential(nn.Embedding(4, 3, sparse=True)), structures=("diagonal", "dense"))
