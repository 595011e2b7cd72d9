"""A graph convolutional network of torch_geometric, trained with SINGD and with AdamW.

    python examples/graph_digits.py          # a graph of scikit-learn's digits
    python examples/graph_digits.py --cora   # Cora; torch_geometric downloads it

The 1,797 digits are the nodes; each is joined to the 8 that are nearest to it. Labels are known for
20 nodes of each class, as is usual for Cora.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from torch.optim import AdamW, Optimizer
from torch_geometric.data import Data
from torch_geometric.nn import GCNConv, Linear
from torch_geometric.utils import to_undirected

from singd_ext import SINGD

LABELLED_PER_CLASS = 20


def digits_graph() -> Data:
    """The symmetrised graph of the 8 nearest neighbours, with masks of nodes."""
    pixels, labels = load_digits(return_X_y=True)
    neighbours = kneighbors_graph(pixels, n_neighbors=8).tocoo()
    edges = torch.stack([torch.tensor(neighbours.row), torch.tensor(neighbours.col)]).long()
    y = torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    labelled = torch.cat([order[y[order] == c][:LABELLED_PER_CLASS] for c in range(10)])
    train_mask = torch.zeros(len(y), dtype=torch.bool)
    train_mask[labelled] = True
    return Data(
        x=torch.tensor(pixels, dtype=torch.float32) / 16,
        edge_index=to_undirected(edges),
        y=y,
        train_mask=train_mask,
        test_mask=~train_mask,
    )


def cora() -> Data:
    """The citation network, downloaded into ./data."""
    from torch_geometric.datasets import Planetoid
    from torch_geometric.transforms import NormalizeFeatures

    return Planetoid("data", "Cora", transform=NormalizeFeatures())[0]


class GCN(nn.Module):
    """Two graph convolutions and a linear layer."""

    def __init__(self, features: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = GCNConv(features, width)
        self.conv2 = GCNConv(width, width)
        self.head = Linear(width, classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = dropout(self.conv1(x, edge_index).relu(), 0.5, self.training)
        x = dropout(self.conv2(x, edge_index).relu(), 0.5, self.training)
        return self.head(x)


def make_singd(model: nn.Module, graph: Data) -> Optimizer:
    """SINGD, told how many terms the loss averages.

    It takes every row of a layer's output for a term, here all nodes, while the loss is a mean
    over the labelled ones: G comes out too large by the ratio of the two, to which lr and damping
    are scaled.
    """
    ratio = graph.num_nodes / int(graph.train_mask.sum())
    return SINGD(
        model,
        lr=1e-2 * ratio,
        lr_cov=0.05,
        damping=0.01 * ratio,
        weight_decay=5e-3,
        T=1,
        structures=("dense", "dense"),
        normalize_lr_cov=True,
        fallback="adamw",
    )


def train(make_optimizer: Callable[[nn.Module], Optimizer], graph: Data, epochs: int) -> float:
    """Train from seed 0; return the accuracy on the test nodes in percent."""
    torch.manual_seed(0)
    model = GCN(graph.num_features, int(graph.y.max()) + 1)
    optimizer = make_optimizer(model)
    for _ in range(epochs):
        optimizer.zero_grad()
        scores = model(graph.x, graph.edge_index)
        cross_entropy(scores[graph.train_mask], graph.y[graph.train_mask]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(graph.x, graph.edge_index).argmax(1) == graph.y
    return 100 * right[graph.test_mask].float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cora", action="store_true", help="needs the network")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="20 epochs")
    args = parser.parse_args()
    epochs = 20 if args.quick else args.epochs
    graph = cora() if args.cora else digits_graph()
    adamw = train(lambda model: AdamW(model.parameters(), lr=1e-2), graph, epochs)
    print(f"AdamW: accuracy on the test nodes {adamw:.1f} %")
    singd = train(lambda model: make_singd(model, graph), graph, epochs)
    print(f"SINGD: accuracy on the test nodes {singd:.1f} %")
    print(f"test accuracy {singd:.1f} %")


if __name__ == "__main__":
    main()
