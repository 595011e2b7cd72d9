"""`SINGD.summary`: one row a parameter, which says who trains it and with how much state."""

import re
from typing import Any

import pytest
import torch
from nets import OPTIONS, mlp
from torch import nn
from whole import Whole, one, train_whole

from singd_ext import SINGD
from singd_ext.summary import Row

pytestmark = [pytest.mark.filterwarnings("error")]


def _rows(optimizer: SINGD) -> dict[str, Row]:
    return {row.parameter: row for row in optimizer.summary().rows}


def _column(optimizer: SINGD, name: str) -> dict[str, Any]:
    return {parameter: getattr(row, name) for parameter, row in _rows(optimizer).items()}


def test_every_parameter_has_a_row_that_says_who_trains_it_and_how() -> None:
    model = Whole()
    model.layers[2].bias.requires_grad_(False)
    groups = [
        {"params": model.layers[0].parameters(), "structures": ("diagonal", "tril")},
        {"params": model.layers[2].weight, "kfac_approx": "reduce"},
        {"params": model.norm.parameters()},
    ]
    optimizer = SINGD(model, params=groups, fallback="adamw")
    rows = _rows(optimizer)
    assert list(rows) == [name for name, _ in model.named_parameters()]
    expected = {
        "position": ("untrained", "", "", None),
        "embedding.weight": ("untrained", "", "", None),
        "norm.weight": ("AdamW", "fused", "", 2),
        "norm.bias": ("AdamW", "fused", "", 2),
        "layers.0.weight": ("SINGD", "Linear, expand", "diagonal, tril", 0),
        "layers.0.bias": ("SINGD", "Linear, expand", "diagonal, tril", 0),
        "layers.2.weight": ("SINGD", "Linear, reduce", "dense, dense", 1),
        "layers.2.bias": ("frozen", "", "", None),
    }
    assert {n: (r.trained_by, r.how, r.structures, r.group) for n, r in rows.items()} == expected
    for name, p in model.named_parameters():
        assert rows[name].shape == tuple(p.shape) and rows[name].numbers == p.numel()


def test_state_bytes_are_those_of_the_tensors_by_hand() -> None:
    model, optimizer = one(structures=("dense", "diagonal"))
    bytes_before = _column(optimizer, "state_bytes")
    # K, C and their momenta in float32, two counters in int64; the momentum of each parameter.
    factors = {"layers.0": 2 * (5 * 5 + 5), "layers.2": 2 * (6 * 6 + 2)}
    expected = {
        f"layers.{i}.{key}": 4 * (p.numel() + (factors[f"layers.{i}"] if key == "weight" else 0))
        + (16 if key == "weight" else 0)
        for i in (0, 2)
        for key, p in model.layers[i].named_parameters()
    }
    others = ["position", "embedding.weight", "norm.weight", "norm.bias"]
    assert bytes_before == {**expected, **dict.fromkeys(others, 0)}
    train_whole(model, [optimizer], [0])
    step_and_moments = {n: 4 * (1 + 2 * model.get_parameter(n).numel()) for n in others}
    assert _column(optimizer, "state_bytes") == {**expected, **step_and_moments}


def test_table_is_printed_with_totals(capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = one()
    train_whole(model, [optimizer], [0])
    summary = optimizer.summary()
    printed = capsys.readouterr().out
    assert printed == f"{summary}\n"
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[2:-4]] == [n for n, _ in model.named_parameters()]
    assert lines[1] == lines[-4] == "-" * len(lines[1]) and max(map(len, lines)) == len(lines[1])
    totals = dict(re.match(r"(\w+) +(.*)", line).groups() for line in lines[-3:])
    counts = {who: [r for r in summary.rows if r.trained_by == who] for who in ("SINGD", "AdamW")}
    assert list(totals) == ["AdamW", "SINGD", "total"]
    for who, rows in counts.items():
        numbers = sum(r.numbers for r in rows)
        assert totals[who].startswith(f"4 parameters of {numbers} numbers, state ")
    assert totals["total"].startswith(
        f"8 parameters of {sum(p.numel() for p in model.parameters())}"
    )
    assert repr(summary) == "Summary of 8 parameters"


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((16,), "64 B"),
        ((256,), "1.0 KiB"),
        ((1024, 640), "2.5 MiB"),
        ((1024, 1024, 320), "1.2 GiB"),
    ],
)
def test_sizes_are_readable(sizes: tuple[int, ...], text: str) -> None:
    model = nn.ParameterList([nn.Parameter(torch.empty(sizes, device="meta"))])
    optimizer = SINGD(model, fallback=torch.optim.SGD)
    optimizer.state[model[0]]["momentum_buffer"] = torch.empty_like(model[0])
    assert f"state {text}\n" in f"{optimizer.summary()}\n"


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4)
        self.embedding.weight = self.head.weight


def test_tied_parameter_has_one_row_with_all_names() -> None:
    rows = _rows(SINGD(_Tied()))
    assert list(rows) == ["embedding.weight = head.weight", "head.bias"]
    assert rows["embedding.weight = head.weight"].trained_by == "SINGD"


def test_parameters_outside_the_model_and_frozen_later_are_shown() -> None:
    model, outside = mlp(), nn.Parameter(torch.ones(()))
    optimizer = SINGD(model, params=[*model.parameters(), outside], fallback="adamw", **OPTIONS)
    model[0].bias.requires_grad_(False)
    outside.requires_grad_(False)
    rows = _rows(optimizer)
    assert (rows["<not in model>"].trained_by, rows["<not in model>"].group) == ("AdamW", 1)
    assert rows["<not in model>"].how == "fused, frozen now"
    assert rows["0.bias"].how == "Linear, expand, frozen now"
    assert "scalar" in str(optimizer.summary())
