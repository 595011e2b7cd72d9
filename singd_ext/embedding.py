"""Embeddings as linear layers without bias that are fed with one-hot rows: K is diagonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kinds import LinearKind, Statistic


class EmbeddingKind(LinearKind):
    """`nn.Embedding`, on request: `register_layer(nn.Embedding, EmbeddingKind())`.

    W is the transposed weight. K must be "diagonal": the diagonal of U is how often each token
    occurs, and no one-hot row is formed. `padding_idx` counts as a row of zeros.
    """

    def check(self, name: str, module: nn.Module, structures: tuple[str, str]) -> None:
        assert isinstance(module, nn.Embedding)
        if structures[0] != "diagonal":
            raise ValueError(
                f"layer '{name}' is an Embedding, for which K must be 'diagonal', not "
                f"'{structures[0]}': put it in a parameter group with "
                f"structures=('diagonal', '{structures[1]}')"
            )
        if module.sparse:
            raise ValueError(f"layer '{name}' has sparse=True; SINGD needs dense gradients")

    def matrix(self, module: nn.Module, tensor: Tensor, key: str) -> Tensor:
        return tensor.t()

    def accumulate_input_(
        self, module: nn.Module, statistic: Statistic, x: Tensor, reduce: bool
    ) -> None:
        assert isinstance(module, nn.Embedding)
        tokens = x.reshape(1 if x.ndim == 0 else x.shape[0], -1).long()
        sample = torch.arange(len(tokens), device=x.device).unsqueeze(1).expand_as(tokens)
        if not reduce:
            sample = torch.zeros_like(sample)
        kept = tokens != (-1 if module.padding_idx is None else module.padding_idx)
        pairs, counts = torch.unique((sample * statistic.dim + tokens)[kept], return_counts=True)
        counts = counts.to(statistic.sums.dtype)
        if reduce:  # a sample's row holds the share of each token
            counts = (counts / max(1, tokens.shape[1])).square()
        statistic.sums.index_add_(0, pairs % statistic.dim, counts)
