"""Parameters in float16, whose largest number is 65504: what would be stored is looked at first.

On CUDA results are looked at in float32 alone (README.md, Limits).
"""

import pytest
import torch
from nets import snapshot
from torch import nn

from singd_ext import SINGD

STRUCTURES = ["dense", "diagonal", "block_diagonal:2", "rank_triu:1", "rank_tril:2",
              "hierarchical:1,1", "triu_toeplitz"]  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("case", ["momentum", "weight", "weight decay", "without momentum"])
def test_overflow_of_what_is_stored_keeps_the_layer(case: str, structure: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5).half()
    options = {
        "momentum": {"lr": 1e-4},
        "weight": {"lr": 2.0},
        "weight decay": {"lr": 1e-4, "weight_decay": 20.0},
        "without momentum": {"lr": 2.0, "momentum": 0.0},
    }[case]
    optimizer = SINGD(model, T=1000, structures=(structure, structure), **options)

    def step(scale: float) -> None:
        optimizer.zero_grad()
        (scale * model(torch.ones(1, 6).half())).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()

    step(1e-3)
    if case == "weight decay":
        model.weight.data[3, 2] = 60000.0
    before = snapshot(model, optimizer)
    with pytest.warns(UserWarning, match="was not finite"):
        step({"momentum": 40000.0, "weight decay": 1e-3}.get(case, 60000.0))
        if case == "momentum":  # and 0.9 times that again
            step(40000.0)
    after = snapshot(model, optimizer)
    if case != "momentum":
        unchanged = [key for key in before if "skipped" not in key]
        assert all(torch.equal(before[k], after[k]) for k in unchanged if "steps" not in k)
    assert optimizer.rejections() == {"": (0, 1)}
    assert all(p.isfinite().all() for p in model.parameters())
    step(1e-3)
    assert optimizer.rejections() == {"": (0, 1 + (case == "weight decay"))}
