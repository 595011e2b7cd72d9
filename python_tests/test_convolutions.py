"""Convolutions as linear layers over patches, and which of them form no patches."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import assert_bitwise, inputs, snapshot
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from singd_ext import SINGD, convolution

pytestmark = [
    pytest.mark.filterwarnings("error", "ignore:Using padding='same' with even kernel"),
]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CLASSES: dict[int, type[Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = (7, 6, 5)
MODES = ("zeros", "reflect", "replicate", "circular")

# (kernel size, stride, padding, dilation) for one, two and three dimensions.
GEOMETRIES: list[tuple[Any, Any, Any, Any]] = [
    (3, 1, 0, 1),
    (1, 2, 0, 1),
    (3, 2, 2, 1),
    (2, 3, 1, 2),
    (3, 1, "valid", 2),
    (3, 1, "same", 1),
    (2, 1, "same", 1),
    (4, 1, "same", 1),
    (2, 1, "same", 3),
    ((3, 2), (1, 2), (2, 0), (2, 1)),
    ((2, 3), 1, "same", (1, 2)),
    ((2, 1, 3), (2, 1, 1), (1, 0, 2), (1, 1, 1)),
    ((1, 2, 2), 1, "same", (1, 3, 2)),
]


def _cases() -> Iterator[Any]:
    for kernel, stride, padding, dilation in GEOMETRIES:
        for dims in (1, 2, 3):
            if isinstance(kernel, tuple) and len(kernel) != dims:
                continue
            for mode in MODES:
                if padding in (0, "valid") and mode != "zeros":
                    continue
                geometry = {
                    "kernel_size": kernel,
                    "stride": stride,
                    "padding": padding,
                    "dilation": dilation,
                    "padding_mode": mode,
                }
                name = f"{dims}d-k{kernel}-s{stride}-p{padding}-d{dilation}-{mode}"
                yield pytest.param(dims, geometry, id=name.replace(" ", ""))


CASES = list(_cases())


def _make(dims: int, geometry: dict[str, Any], channels: int, groups: int = 1) -> Conv:
    torch.manual_seed(0)
    return CLASSES[dims](channels, 4, groups=groups, dtype=torch.float64, **geometry)


def _patches(conv: Conv, x: Tensor) -> Tensor:
    return torch.cat(list(convolution.patch_chunks(conv, x, x.dtype)))


# -------------------------------------------------------------------- patches


@pytest.mark.parametrize(("dims", "geometry"), CASES)
def test_patches_times_the_weight_are_the_output_of_the_layer(
    dims: int, geometry: dict[str, Any]
) -> None:
    conv = _make(dims, geometry, channels=3)
    x = inputs(2, 3, *SIZES[:dims])
    output = _patches(conv, x) @ conv.weight.flatten(1).T + conv.bias
    expected = conv(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dims", "geometry"), CASES)
def test_patches_of_groups_are_those_of_the_averaged_channels(
    dims: int, geometry: dict[str, Any]
) -> None:
    x = inputs(2, 4, *SIZES[:dims])
    averaged = (x[:, :2] + x[:, 2:]) / 2
    torch.testing.assert_close(
        _patches(_make(dims, geometry, channels=4, groups=2), x),
        _patches(_make(dims, geometry, channels=2), averaged),
        rtol=1e-12,
        atol=1e-12,
    )


def test_patches_equal_unfold() -> None:
    geometry = {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (1, 2)}
    conv, x = nn.Conv2d(3, 4, **geometry), inputs(2, 3, 7, 6, dtype=torch.float32)
    assert torch.equal(_patches(conv, x), F.unfold(x, **geometry).transpose(1, 2))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("dims", "geometry"), CASES)
def test_mean_and_energies_of_patches_without_forming_them(
    dims: int, geometry: dict[str, Any], groups: int
) -> None:
    conv = _make(dims, geometry, channels=4, groups=groups)
    x = inputs(3, 4, *SIZES[:dims])
    patches = _patches(conv, x)
    torch.testing.assert_close(
        convolution.averaged_patches(conv, x, x.dtype), patches.mean(1), rtol=1e-12, atol=1e-12
    )
    energies = convolution.average_groups(conv, x, x.dtype).square().sum(0)
    sums, positions = convolution.summed_patch_energies(conv, energies)
    assert positions == patches.shape[1]
    torch.testing.assert_close(sums, patches.square().sum((0, 1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_averages_have_the_precision_that_is_asked_for(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(4, 4, 3, groups=2, dtype=torch.bfloat16)
    x = inputs(3, 4, 7, 6, dtype=torch.bfloat16)
    exact = nn.Conv2d(4, 4, 3, groups=2)
    for average in (convolution.averaged_patches, convolution.average_groups):
        result = average(conv, x, dtype)
        assert result.dtype == dtype
        torch.testing.assert_close(result, average(exact, x.to(dtype), dtype))


# -------------------------------------------------------------------- factors of whole layers


def _step(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Any]:
    """The state after two steps."""
    optimizer = SINGD(model, T=1, lr=0.05, lr_cov=0.02, **options)
    for _ in range(2):
        optimizer.zero_grad()
        (2 * (model(x) - 0.3).square().mean()).backward()
        optimizer.step()
    return snapshot(model, optimizer)


def _flat(copies: dict[str, Any]) -> dict[str, Any]:
    """Weights as vectors, to compare layers whose weights have different shapes."""
    return {k: v.flatten() if isinstance(v, Tensor) else v for k, v in copies.items()}


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["dense", "diagonal", "block_diagonal:2", "tril_toeplitz"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_kernel_of_width_one_is_a_linear_layer_over_positions(
    dims: int, structure: str, kfac_approx: str
) -> None:
    options = {"structures": (structure, structure), "kfac_approx": kfac_approx}
    conv, linear = _make(dims, {"kernel_size": 1}, channels=3), nn.Linear(3, 4).double()
    linear.weight.data.copy_(conv.weight.detach().flatten(1))
    linear.bias.data.copy_(conv.bias.detach())
    x = inputs(2, 3, *SIZES[:dims])
    of_conv = _step(conv, x, **options)
    of_linear = _step(linear, x.flatten(2).transpose(1, 2), **options)
    torch.testing.assert_close(_flat(of_conv), _flat(of_linear), rtol=1e-11, atol=1e-13)
    assert not torch.equal(of_conv["weight: K"], torch.eye(4).double().flatten())


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["dense", "diagonal", "hierarchical:2,2"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_kernel_as_large_as_the_input_is_a_linear_layer(
    dims: int, structure: str, kfac_approx: str
) -> None:
    options = {"structures": (structure, "dense"), "kfac_approx": kfac_approx}
    conv = _make(dims, {"kernel_size": (2, 3, 2)[:dims]}, channels=3)
    x = inputs(5, 3, *(2, 3, 2)[:dims])
    linear = nn.Linear(x[0].numel(), 4).double()
    linear.weight.data.copy_(conv.weight.detach().flatten(1))
    linear.bias.data.copy_(conv.bias.detach())
    of_conv = _step(conv, x, **options)
    of_linear = _step(linear, x.flatten(1), **options)
    torch.testing.assert_close(_flat(of_conv), _flat(of_linear), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unbatched_input_is_a_batch_of_one(
    dims: int, mode: str, structure: str, kfac_approx: str
) -> None:
    geometry = {"kernel_size": 2, "padding": 1, "padding_mode": mode}
    options = {"structures": (structure, "dense"), "kfac_approx": kfac_approx}
    x = inputs(1, 3, *SIZES[:dims])
    batched, unbatched = (_make(dims, geometry, channels=3) for _ in range(2))
    assert_bitwise(
        _step(unbatched, x[0], **options),
        _step(batched, x, **options),
    )


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_memory_format_of_the_input_does_not_matter(structure: str, kfac_approx: str) -> None:
    geometry = {"kernel_size": 3, "padding": 1}
    options = {"structures": (structure, "dense"), "kfac_approx": kfac_approx}
    x = inputs(4, 3, 7, 6)
    contiguous = _step(_make(2, geometry, channels=3), x, **options)
    for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert not other.is_contiguous()
        run = _step(_make(2, geometry, channels=3), other, **options)
        torch.testing.assert_close(run, contiguous, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("bound", [{}, {"max_update_norm": 0.05}], ids=["", "bounded"])
@pytest.mark.parametrize("structure", ["diagonal", "block_diagonal:5", "hierarchical:2,3", "dense"])
def test_memory_format_of_the_model_does_not_matter(
    structure: str, bound: dict[str, float], when: int
) -> None:
    """Converted before the first step, or before the second one, when there is momentum."""
    runs = []
    for last in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 7, 3, padding=1), nn.Tanh(), nn.Conv2d(7, 4, 2, bias=False)
        ).double()
        options = {"structures": (structure, structure), "lr": 0.1, "lr_cov": 0.01, "T": 2}
        optimizer = SINGD(model, **options, **bound)
        for step in range(4):
            if last and step == when:
                model.to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            model(inputs(4, 3, 7, 6, seed=step)).square().mean().backward()
            optimizer.step()
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last) == last
        runs.append(snapshot(model, optimizer))
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------- memory

GEOMETRY = {"kernel_size": 5, "padding": 2}
PATCHES = 4 * (12 * 12) * (6 * 5 * 5)  # numbers in the patches of the input below


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def _largest_tensor(kfac_approx: str, structure: str, **geometry: Any) -> int:
    conv = _make(2, {**GEOMETRY, **geometry}, channels=6)
    with LargestTensor() as largest:
        _step(conv, inputs(4, 6, 12, 12), kfac_approx=kfac_approx,
              structures=(structure, "dense"))  # fmt: skip
    return largest.numel


PATCHLESS = [
    ("expand", "diagonal"),
    ("reduce", "diagonal"),
    ("reduce", "block_diagonal:4"),
    ("reduce", "hierarchical:3,2"),
    ("reduce", "rank_tril:1"),
    ("reduce", "triu_toeplitz"),
    ("reduce", "dense"),
]


@pytest.mark.parametrize(("kfac_approx", "structure"), PATCHLESS)
@pytest.mark.parametrize("mode", MODES)
def test_no_tensor_of_the_size_of_the_patches_is_formed(
    mode: str, kfac_approx: str, structure: str
) -> None:
    assert _largest_tensor(kfac_approx, structure, padding_mode=mode) < PATCHES / 3


@pytest.mark.parametrize(("kfac_approx", "structure"), PATCHLESS)
def test_patches_are_not_asked_for(
    kfac_approx: str, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("patches were formed")

    monkeypatch.setattr("singd_ext.kinds.patch_chunks", fail)
    _largest_tensor(kfac_approx, structure)
    with pytest.raises(AssertionError, match="patches were formed"):
        _largest_tensor("expand", "dense")


def test_patches_are_formed_at_once_where_they_are_small_and_in_chunks_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _largest_tensor("expand", "dense") >= PATCHES
    monkeypatch.setattr(convolution, "_PATCH_ELEMENTS", PATCHES // 2)
    conv, x = _make(2, GEOMETRY, channels=6), inputs(4, 6, 12, 12)
    chunks = list(convolution.patch_chunks(conv, x, x.dtype))
    assert [chunk.shape[0] for chunk in chunks] == [2, 2]


@pytest.mark.parametrize("elements", [1, 3000, 1 << 40])
@pytest.mark.parametrize("structure", ["dense", "block_diagonal:2", "rank_tril:1", "tril_toeplitz"])
def test_result_does_not_depend_on_the_chunks(
    structure: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> dict[str, Any]:
        conv = _make(2, {"kernel_size": 3, "padding": 1}, channels=3)
        return _step(conv, inputs(5, 3, 7, 6), structures=(structure, "dense"))

    expected = run()
    monkeypatch.setattr(convolution, "_PATCH_ELEMENTS", elements)
    torch.testing.assert_close(run(), expected, rtol=1e-12, atol=1e-14)
