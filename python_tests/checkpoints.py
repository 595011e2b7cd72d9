"""What tests of checkpoints share."""

from typing import Any

import torch
from nets import OPTIONS, mlp
from torch import Tensor, nn

from singd_ext import SINGD


def make(
    dtype: torch.dtype = torch.float64, net: int = 0, **options: Any
) -> tuple[nn.Sequential, SINGD]:
    model = mlp(dtype=dtype, seed=net)
    return model, SINGD(model, **{**OPTIONS, **options})


def assert_same_tree(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same_tree(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_same_tree(*pair)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert actual == expected
