"""`singd_ext.param_groups`: who gets a parameter, and whether it decays."""

from typing import Any

import pytest
import torch
from nets import OPTIONS
from torch import Tensor, nn
from whole import Whole, others, train_whole

import singd_ext
from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]

NORM_BIAS = ["norm.weight", "norm.bias"]
TABLES = ["position", "embedding.weight"]
FIRST = ["layers.0.weight", "layers.0.bias"]
LAST = ["layers.2.weight", "layers.2.bias"]


def _named(model: nn.Module, **options: Any) -> dict[tuple[str, float], list[str]]:
    """{(optimizer, weight decay): names} of the groups, whose pairs are unique."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = singd_ext.param_groups(model, **{"weight_decay": 0.1, **options})
    result = {
        (g["optimizer"], g["weight_decay"]): [names[id(p)] for p in g["params"]] for g in groups
    }
    assert len(result) == len(groups) and all(result.values())
    assert all(set(g) == {"params", "weight_decay", "optimizer"} for g in groups)
    return result


def test_default_groups() -> None:
    assert _named(Whole()) == {
        ("SINGD", 0.1): FIRST + LAST,
        ("fallback", 0.1): TABLES,
        ("fallback", 0.0): NORM_BIAS,
    }


CASES: dict[str, tuple[dict[str, Any], dict[tuple[str, float], list[str]]]] = {
    "module_name": (
        {"exclude": ["layers.2"]},
        {
            ("SINGD", 0.1): FIRST,
            ("fallback", 0.1): [*TABLES, "layers.2.weight"],
            ("fallback", 0.0): [*NORM_BIAS, "layers.2.bias"],
        },
    ),
    "pattern_of_parameters": (
        {"exclude": ["*.bias"]},
        {
            ("SINGD", 0.1): ["layers.0.weight", "layers.2.weight"],
            ("fallback", 0.1): TABLES,
            ("fallback", 0.0): [*NORM_BIAS, "layers.0.bias", "layers.2.bias"],
        },
    ),
    "weights_only_excluded": (
        {"exclude": ["layers.*.weight"]},
        {
            ("SINGD", 0.0): ["layers.0.bias", "layers.2.bias"],
            ("fallback", 0.1): [*TABLES, "layers.0.weight", "layers.2.weight"],
            ("fallback", 0.0): NORM_BIAS,
        },
    ),
    "module_type": (
        {"exclude": [nn.Linear]},
        {
            ("fallback", 0.1): [*TABLES, "layers.0.weight", "layers.2.weight"],
            ("fallback", 0.0): [*NORM_BIAS, "layers.0.bias", "layers.2.bias"],
        },
    ),
    "type_of_a_container": (
        {"exclude": [nn.Sequential]},
        {
            ("fallback", 0.1): [*TABLES, "layers.0.weight", "layers.2.weight"],
            ("fallback", 0.0): [*NORM_BIAS, "layers.0.bias", "layers.2.bias"],
        },
    ),
    "no_decay_of_a_layer_and_of_a_type": (
        {"no_weight_decay": ["layers.0", nn.Embedding]},
        {
            ("SINGD", 0.1): LAST,
            ("SINGD", 0.0): FIRST,
            ("fallback", 0.1): ["position"],
            ("fallback", 0.0): ["embedding.weight", *NORM_BIAS],
        },
    ),
    "character_class": (
        {"exclude": ["layers.[2-9]*"], "no_weight_decay": ["p?sition"]},
        {
            ("SINGD", 0.1): FIRST,
            ("fallback", 0.1): ["embedding.weight", "layers.2.weight"],
            ("fallback", 0.0): ["position", *NORM_BIAS, "layers.2.bias"],
        },
    ),
    "tuple_and_generator": (
        {"exclude": (nn.Linear,), "no_weight_decay": (name for name in ("*",))},
        {("fallback", 0.0): [*TABLES, *NORM_BIAS, *FIRST, *LAST]},
    ),
    "everything_without_decay": (
        {"no_weight_decay": ["*"]},
        {("SINGD", 0.0): FIRST + LAST, ("fallback", 0.0): TABLES + NORM_BIAS},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_selectors(case: str) -> None:
    options, expected = CASES[case]
    assert _named(Whole(), **options) == expected


def test_frozen_parameters_are_left_out() -> None:
    model = Whole()
    for name in ("layers.0.weight", "layers.2.bias", "position", "norm.weight"):
        model.get_parameter(name).requires_grad_(False)
    assert _named(model) == {
        ("SINGD", 0.1): ["layers.2.weight"],
        ("SINGD", 0.0): ["layers.0.bias"],
        ("fallback", 0.1): ["embedding.weight"],
        ("fallback", 0.0): ["norm.bias"],
    }


def test_norms_of_more_dimensions_and_biases_that_are_matrices_do_not_decay() -> None:
    model = nn.Module()
    model.norm = nn.LayerNorm((3, 2))
    model.table = nn.Module()
    model.table.bias = nn.Parameter(torch.ones(2, 2))
    model.scale = nn.Parameter(torch.ones(()))
    model.matrix = nn.Parameter(torch.ones(2, 2))
    assert _named(model) == {
        ("fallback", 0.1): ["matrix"],
        ("fallback", 0.0): ["scale", "norm.weight", "norm.bias", "table.bias"],
    }


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4)
        self.embedding.weight = self.head.weight


def test_selector_matches_every_name_of_a_tied_parameter() -> None:
    for name in ("embedding", "head.weight"):
        named = _named(_Tied(), exclude=[name])
        assert named[("fallback", 0.1)] == ["embedding.weight"]


def test_groups_train_as_if_written_by_hand() -> None:
    model, reference = Whole(), Whole()
    groups = singd_ext.param_groups(model, weight_decay=0.3, exclude=["layers.2"])
    optimizer = SINGD(model, params=groups, fallback="adamw", **OPTIONS)
    decaying = [reference.position, reference.embedding.weight, reference.layers[2].weight]
    rest = [*reference.norm.parameters(), reference.layers[2].bias]
    pair = [
        SINGD(reference, reference.layers[0].parameters(), **{**OPTIONS, "weight_decay": 0.3}),
        torch.optim.AdamW(
            [
                {"params": decaying, "weight_decay": 0.3},
                {"params": rest, "weight_decay": 0.0},
            ],
            fused=True,
        ),
    ]
    start = [p.detach().clone() for p in model.parameters()]
    train_whole(model, [optimizer], range(3))
    train_whole(reference, pair, range(3))
    for p, q, before in zip(model.parameters(), reference.parameters(), start, strict=True):
        assert torch.equal(p, q) and not torch.equal(p, before)


def test_groups_of_a_fallback_without_one_are_refused() -> None:
    model = Whole()
    with pytest.raises(ValueError, match='fallback="adamw"'):
        SINGD(model, params=singd_ext.param_groups(model, weight_decay=0.1))


FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unmatched": ({"exclude": ["head*"]}, ValueError, r"exclude: 'head\*' matches no parameter"),
    "unmatched_type": ({"no_weight_decay": [nn.Conv2d]}, ValueError, "Conv2d.*matches no"),
    "string": ({"exclude": "layers"}, TypeError, "exclude is 'layers'; it must be a list"),
    "type": ({"exclude": nn.Linear}, TypeError, "it must be a list"),
    "instance": ({"exclude": [nn.Tanh()]}, TypeError, r"exclude contains Tanh\(\)"),
    "other_type": ({"exclude": [Tensor]}, TypeError, "exclude contains"),
    "decay": ({"weight_decay": -0.1}, ValueError, "weight_decay is -0.1"),
    "half_a_layer": (
        {"no_weight_decay": ["*.bias"]}, ValueError, r"\['layers.0.bias'\].*'layers.0'.*`exclude`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str) -> None:
    options, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        singd_ext.param_groups(Whole(), **{"weight_decay": 0.1, **options})


def test_options_can_be_added_to_the_groups() -> None:
    model = Whole()
    groups = singd_ext.param_groups(model, weight_decay=0.1)
    for group in groups:
        if group["optimizer"] == "fallback":
            group.update(lr=0.5, betas=(0.7, 0.9))
    optimizer = SINGD(model, params=groups, fallback="adamw")
    options = [(g["lr"], g.get("betas")) for g in optimizer.param_groups]
    assert options == [(1e-3, None), (0.5, (0.7, 0.9)), (0.5, (0.7, 0.9))]
    assert {id(p) for g in optimizer.param_groups[1:] for p in g["params"]} == {
        id(p) for p in others(model)
    }
