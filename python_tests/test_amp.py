"""Autocast: inputs and output gradients in a low dtype, parameters and factors in float32."""

from typing import Any

import pytest
import torch
from nets import OPTIONS, inputs, mlp
from torch import nn

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]

STEPS = 4
# Of the way that weights and factors went; a few roundings of one number (2^-9, 2^-12).
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2e-3}
NETS = {
    "linear": (lambda: mlp(5, 4, 3, dtype=torch.float32), (6, 5)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)),
        (6, 3, 3, 3),
    ),
}


def _run(
    net: str, dtype: torch.dtype | None, scaled: bool = False, steps: int = STEPS, **options: Any
) -> dict[str, torch.Tensor]:
    """Weights and dense factors after a few steps, under autocast to `dtype` if there is one."""
    make, shape = NETS[net]
    torch.manual_seed(0)
    model = make()
    optimizer = SINGD(model, **{**OPTIONS, "lr_cov": 0.02, **options})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
    for seed in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = model(inputs(*shape, seed=seed, dtype=torch.float32))
            assert y.dtype == (dtype or torch.float32)
            loss = (y.float() - 0.7).square().sum() / len(y)
        scaler.scale(loss).backward()
        if scaled:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)  # does not bind
        scaler.step(optimizer)
        scaler.update()
    result = {name: p.detach() for name, p in model.named_parameters()}
    for name, (K, C) in optimizer.factors().items():
        result |= {f"K of {name}": K.to_dense(), f"C of {name}": C.to_dense()}
    return result


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["dense", "diagonal", "hierarchical:1,1", "tril_toeplitz"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("net", NETS)
def test_autocast_run_is_near_the_float32_run(
    net: str, dtype: torch.dtype, structure: str, kfac_approx: str
) -> None:
    options = {"structures": (structure, structure), "kfac_approx": kfac_approx}
    exact = _run(net, None, **options)
    scaled = dtype == torch.float16
    actual = _run(net, dtype, scaled, **options)
    start = _run(net, None, steps=0, **options)
    for name, value in exact.items():
        movement = (value - start[name]).norm()
        assert actual[name].dtype == torch.float32 and movement > 0
        assert (actual[name] - value).norm() < TOLERANCES[dtype] * movement, name
