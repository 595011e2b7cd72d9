"""Autocast: inputs and output gradients in a low dtype, parameters and factors in float32."""

from typing import Any

import pytest
import torch
from nets import OPTIONS, inputs, mlp
from torch import Tensor, nn

from singd_ext import SINGD
from singd_ext.bench import memory
from singd_ext.curvature import OutputHook

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


class Scaled(nn.Linear):
    """Does something to its input before the product."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


LAYERS = {
    "rows": (lambda: nn.Linear(64, 64), (512, 64), True),
    "no bias": (lambda: nn.Linear(64, 64, bias=False), (512, 64), True),
    "positions": (lambda: nn.Linear(64, 64), (8, 64, 64), True),
    "positions, no bias": (lambda: nn.Linear(64, 64, bias=False), (8, 8, 8, 64), True),
    "strided positions": (lambda: nn.Linear(64, 64), (64, 8, 64), True),  # as x.transpose(0, 1)
    "strided": (lambda: nn.Linear(64, 64), (64, 512), True),  # as x.T
    "convolution": (lambda: nn.Conv2d(8, 8, 3), (8, 8, 32, 16), True),
    "padded by copies": (lambda: nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
                         (8, 8, 512), False),
    "own forward": (lambda: Scaled(64, 64), (512, 64), False),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_keeps_one_copy_of_an_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps anyway is what the statistics are made of."""
    make, shape, is_shared = LAYERS[name]
    layer = make()
    optimizer = SINGD(nn.Sequential(layer), structures=("diagonal", "diagonal"), T=1)
    taken: list[Tensor] = []
    input_of = OutputHook.input_of

    def see(self: OutputHook, *call: Any) -> Tensor:
        taken.append(input_of(self, *call))
        return taken[-1]

    monkeypatch.setattr(OutputHook, "input_of", see)
    original = torch.randn(shape)
    with memory.measure(torch.device("cpu")) as found, torch.autocast("cpu", torch.bfloat16):
        x = original.clone()
        y = layer(x.transpose(0, 1) if "strided" in name else x)
        del x
    kept = found.end - y.nbytes
    assert kept < 0.75 * original.nbytes if is_shared else kept > 1.4 * original.nbytes
    y.float().square().mean().backward()
    x = original.transpose(0, 1) if "strided" in name else original
    assert torch.equal(taken[0], x.to(taken[0].dtype))
    assert taken[0].dtype == (torch.bfloat16 if is_shared else torch.float32)
    optimizer.step()


def test_autocast_keeps_one_copy_of_what_attention_projects() -> None:
    def kept(observed: bool) -> int:
        torch.manual_seed(0)
        module = nn.MultiheadAttention(64, 4, batch_first=True)
        optimizer = SINGD(nn.Sequential(module), structures=("diagonal", "diagonal"), T=1)
        if not observed:
            optimizer.remove_hooks()
        with memory.measure(torch.device("cpu")) as found, torch.autocast("cpu", torch.bfloat16):
            x = torch.randn(8, 64, 64)
            y = module(x, x, x, need_weights=False)[0]
            del x
        y.float().square().mean().backward()
        optimizer.step()
        return found.end

    assert kept(True) == kept(False)


def test_saved_tensor_hooks_see_the_input_itself() -> None:
    layer, saved = nn.Linear(8, 8), []
    optimizer = SINGD(nn.Sequential(layer), structures=("diagonal", "diagonal"), T=1)
    x = torch.randn(4, 8)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.dtype)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.float32 in saved
    y.float().square().mean().backward()
    optimizer.step()
