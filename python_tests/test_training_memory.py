"""Memory of training: state to the byte, peak beside AdamW's, and nothing held after backward."""

from collections.abc import Callable

import pytest
import torch
from reference import masks
from torch import Tensor, nn

from singd_ext import _C, SINGD
from singd_ext.bench import memory, rivals
from singd_ext.bench.contender import Contender, Setting
from singd_ext.bench.presets import GPTSize

CPU = torch.device("cpu")
SPARSE = (
    "diagonal", "block_diagonal:30", "rank_triu:1", "rank_tril:1", "rank_triu_topleft:1",
    "rank_tril_topleft:1", "hierarchical:15,15", "triu_toeplitz", "tril_toeplitz",
)  # fmt: skip
D_I, D_O = 70, 45


def stored(spec: str, d: int) -> int:
    """Numbers of a factor by the formulas of docs/structures.md."""
    family, _, text = spec.partition(":")
    sizes = [int(size) for size in text.split(",") if size]
    if family == "block_diagonal":
        k, r = sizes[0], d % sizes[0]
        return d // k * k**2 + r**2
    if family == "hierarchical":
        k1, k2 = sizes
        return (k1 + k2 + 1) * d - k1 - k2
    if family.startswith("rank"):
        (k,) = sizes
        return (k + 1) * d - k
    return d if family == "diagonal" or "toeplitz" in family else d**2


def trained(spec: str, net: nn.Module) -> SINGD:
    """After two steps, of which the second leaves the factors."""
    optimizer = SINGD(net, structures=(spec, spec), T=2)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(6, D_I)).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("spec", [*masks.SPECS, *SPARSE])
def test_state_has_the_bytes_of_the_formulas(spec: str) -> None:
    net = nn.Linear(D_I, D_O)
    optimizer = trained(spec, net)
    parameters = D_I * D_O + D_O
    factors = stored(spec, D_I + 1) + stored(spec, D_O)  # the bias is a column of W
    counters = 2 * 8
    expected = 4 * (parameters + 2 * factors) + counters  # momenta, and K, C, m_K, m_C
    assert rivals.Steps(optimizer).state_bytes() == expected
    held = sum(t.numel() for t in optimizer.state[net.weight].values() if torch.is_tensor(t))
    assert 4 * (held + D_O) <= expected  # also what is not saved


@pytest.mark.parametrize("spec", SPARSE)
def test_a_sparse_factor_stores_a_multiple_of_d(spec: str) -> None:
    """Table 3: O(k d)."""
    k = sum(int(size) for size in spec.partition(":")[2].split(",") if size) or 1
    for d in (100, 1000, 4096):
        assert _C.storage_size(spec, d) == stored(spec, d) <= (k + 1) * d


@pytest.fixture(scope="module")
def setting() -> Setting:
    """A GPT whose weights, not its activations, take the memory."""
    torch.manual_seed(0)
    size = GPTSize(256, blocks=4, width=384, heads=4, sequence=16, batch=2)
    return Setting(size.task(), "fp32", CPU, seed=0)


def peak(rival: rivals.Rival, setting: Setting) -> int:
    """Bytes of parameters, state and two training steps with updates of the factors."""
    with memory.measure(CPU) as found:
        contender = Contender(rival, setting)
        contender.steps.begin_cycle(1)
        for _ in range(2):
            contender.train_step()
    return found.peak


@pytest.fixture(scope="module")
def adamw_peak(setting: Setting) -> int:
    chosen, _ = rivals.rivals((), (), [])
    return peak(next(r for r in chosen if r.name == rivals.ADAMW), setting)


@pytest.mark.parametrize("spec", SPARSE)
def test_the_peak_of_a_training_step_is_adamws_at_most(
    spec: str, setting: Setting, adamw_peak: int
) -> None:
    (ours,) = rivals.ours([spec])
    ratio = peak(ours, setting) / adamw_peak
    assert ratio <= 1.02, f"{spec}: {ratio:.3f} of AdamW's peak"


class _Transposed(nn.Linear):
    """Its weight is in memory as Hugging Face's Conv1D has it, [in, out]."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous().T)


class _ChannelsLast(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(d_in // 4, d_out, 2).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.view(len(x), -1, 2, 2)).flatten(1)


class _ConvTranspose(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(d_in // 4, d_out // 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.view(len(x), -1, 2, 2))[..., :2, :2].flatten(1)


@pytest.mark.parametrize("layer", [nn.Linear, _Transposed, _ChannelsLast, _ConvTranspose])
@pytest.mark.parametrize("spec", SPARSE[:-2])
def test_a_steady_step_copies_no_matrix(spec: str, layer: Callable[[int, int], nn.Module]) -> None:
    net = nn.Sequential(*(layer(128, 128) for _ in range(3)))
    optimizer = SINGD(net, structures=(spec, spec), T=1)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 128)).square().mean().backward()
        with memory.measure(CPU) as found:
            optimizer.step()
    assert found.peak < 4 * 128 * 128 / 8


@pytest.mark.parametrize("spec", ["diagonal", "hierarchical:15,15", "triu_toeplitz", "dense"])
def test_no_activation_is_kept_after_backward(spec: str) -> None:
    """What is left of forward and backward are gradients, which were there, and statistics."""
    rows, wide = 512, 64
    net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(wide, wide), nn.Tanh())))
    optimizer = SINGD(net, structures=(spec, spec), T=1)

    def backward() -> None:
        net(torch.randn(rows, wide)).square().mean().backward()

    backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with memory.measure(CPU) as found:
        backward()
    statistics = 3 * 4 * (stored(spec, wide + 1) + stored(spec, wide))
    assert found.end == pytest.approx(statistics, abs=2048)  # small change of autograd
    assert found.peak > 3 * 4 * rows * wide  # where the activations were
    with memory.measure(CPU) as found:
        optimizer.step()
    assert found.end <= 0  # the statistics are gone, too
