"""Transposed convolutions as linear layers over the patches that each output position reads."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from nets import OPTIONS, inputs, snapshot
from torch import Tensor, nn

from singd_ext import SINGD, convolution
from singd_ext.kinds import TransposedKind

pytestmark = [pytest.mark.filterwarnings("error")]

# Far steps of the factors that stay below the cap, as the tests compare unshortened ones.
SMALL_STEPS = {**OPTIONS, "lr": 0.01, "lr_cov": 0.02, "damping": 0.1}
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CLASSES: dict[int, type[ConvTranspose]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
SIZES = (4, 3, 2)

# (kernel size, stride, padding, output padding, dilation) for one, two and three dimensions.
GEOMETRIES: list[tuple[Any, Any, Any, Any, Any]] = [
    (1, 1, 0, 0, 1),
    (3, 1, 0, 0, 1),
    (3, 2, 1, 1, 1),
    (2, 2, 0, 0, 1),
    (4, 2, 1, 0, 1),
    (1, 3, 0, 2, 1),
    (2, 3, 0, 1, 2),
    (3, 1, 2, 0, 2),
    (2, 1, 1, 1, 3),
    ((3, 2), (1, 2), (2, 0), (0, 1), (2, 1)),
    ((2, 1, 3), (3, 1, 2), (1, 0, 2), (2, 0, 1), (1, 1, 1)),
]


def _cases() -> Iterator[Any]:
    names = ("kernel_size", "stride", "padding", "output_padding", "dilation")
    for geometry in GEOMETRIES:
        for dims in (1, 2, 3):
            if not isinstance(geometry[0], tuple) or len(geometry[0]) == dims:
                options = dict(zip(names, geometry, strict=True))
                yield pytest.param(dims, options, id=f"{dims}d-{geometry}".replace(" ", ""))


CASES = list(_cases())


def _backward(model: nn.Module, optimizer: SINGD, x: Tensor) -> None:
    optimizer.zero_grad()
    (2 * (model(x) - 0.3).square().mean()).backward()


def _train(model: nn.Module, optimizer: SINGD, seeds: Iterable[int], *shape: int) -> None:
    for seed in seeds:
        _backward(model, optimizer, inputs(*shape, seed=seed))
        optimizer.step()


GROUPS = [(1, 3, 2), (2, 4, 2), (2, 4, 6), (2, 2, 4), (3, 3, 3)]  # groups, inputs, outputs


def _make(
    dims: int,
    geometry: dict[str, Any],
    groups: int = 1,
    channels: tuple[int, int] = (4, 2),
    bias: bool = True,
) -> ConvTranspose:
    torch.manual_seed(0)
    return CLASSES[dims](*channels, groups=groups, bias=bias, dtype=torch.float64, **geometry)


def _patches_by_definition(conv: ConvTranspose, x: Tensor) -> Tensor:
    """[samples, positions, features]: derivatives of a one-channel output by the weight's numbers.

    Features are [input channels of all groups, *kernel].
    """
    one = CLASSES[len(conv.kernel_size)](
        x.shape[1], 1, conv.kernel_size, conv.stride, conv.padding, conv.output_padding,
        bias=False, dilation=conv.dilation, dtype=torch.float64,
    )  # fmt: skip

    def outputs(weight: Tensor) -> Tensor:
        return torch.func.functional_call(one, {"weight": weight}, (x,))

    jacobian = torch.autograd.functional.jacobian(outputs, one.weight)
    return jacobian.flatten(1 + 1 + len(conv.kernel_size)).flatten(1, -2)


def _expected_rows(conv: ConvTranspose, x: Tensor) -> Tensor:
    """The patches by definition, averaged over groups."""
    rows = _patches_by_definition(conv, x)
    return rows.unflatten(-1, (conv.groups, -1)).mean(-2)


def _patches(conv: ConvTranspose, x: Tensor) -> Tensor:
    return torch.cat(list(convolution.patch_chunks(conv, x, x.dtype))).flip(1)


# -------------------------------------------------------------------- patches


@pytest.mark.parametrize(("dims", "geometry"), CASES)
def test_patches_times_the_matrix_are_the_output_of_the_layer(
    dims: int, geometry: dict[str, Any]
) -> None:
    conv, x = _make(dims, geometry), inputs(2, 4, *SIZES[:dims])
    W = TransposedKind().matrix(conv, conv.weight, "weight").flatten(1)
    assert W.shape[0] == 2
    output = _patches(conv, x) @ W.T + conv.bias
    expected = conv(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("groups", "d_in", "d_out"), GROUPS)
@pytest.mark.parametrize(("dims", "geometry"), CASES)
def test_patches_their_mean_and_their_energies_by_definition(
    dims: int, geometry: dict[str, Any], groups: int, d_in: int, d_out: int
) -> None:
    conv = _make(dims, geometry, groups, (d_in, d_out))
    x = inputs(2, d_in, *SIZES[:dims])
    expected = _expected_rows(conv, x)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(_patches(conv, x), expected, **close)
    average = convolution.averaged_patches(conv, x, x.dtype)
    torch.testing.assert_close(average, expected.mean(1), **close)
    energies = convolution.average_groups(conv, x, x.dtype).square().sum(0)
    sums, positions = convolution.summed_patch_energies(conv, energies)
    assert positions == expected.shape[1]
    torch.testing.assert_close(sums, expected.square().sum((0, 1)), **close)


@pytest.mark.parametrize(("groups", "d_in", "d_out"), GROUPS)
def test_the_matrix_of_groups_makes_each_group_of_outputs(
    groups: int, d_in: int, d_out: int
) -> None:
    geometry = {"kernel_size": (3, 2), "stride": 2}
    conv = _make(2, geometry, groups, (d_in, d_out), bias=False)
    x = inputs(2, d_in, 4, 3)
    W = TransposedKind().matrix(conv, conv.weight, "weight").flatten(1)
    rows = _patches_by_definition(conv, x).unflatten(-1, (groups, -1))
    outputs = torch.einsum("gof,bpgf->bgop", W.unflatten(0, (groups, -1)), rows).flatten(1, 2)
    torch.testing.assert_close(outputs, conv(x).flatten(2), rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------- whole layers


class _Linears(nn.Module):
    """A transposed convolution written as a linear layer over the patches by definition."""

    def __init__(self, conv: ConvTranspose) -> None:
        super().__init__()
        self._conv = [conv]  # no submodule
        matrix = TransposedKind().matrix(conv, conv.weight.detach(), "weight").flatten(1)
        self.linear = nn.Linear(
            matrix.shape[1], matrix.shape[0], conv.bias is not None, dtype=torch.float64
        )
        with torch.no_grad():
            self.linear.weight.copy_(matrix)
            if conv.bias is not None:
                self.linear.bias.copy_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(_expected_rows(self._conv[0], x)).transpose(1, 2)


class _Flat(nn.Module):
    def __init__(self, conv: ConvTranspose) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2)


@pytest.mark.parametrize("structures", [("dense", "dense"), ("diagonal", "triu_toeplitz")])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dims", "geometry"), CASES)
def test_trains_as_a_linear_layer_over_patches(
    dims: int, geometry: dict[str, Any], bias: bool, approx: str, structures: tuple[str, str]
) -> None:
    conv = _make(dims, geometry, bias=bias)
    models = (_Linears(conv), _Flat(conv))
    options = {**SMALL_STEPS, "structures": structures, "kfac_approx": approx}
    optimizers = [SINGD(model, **options) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        _train(model, optimizer, range(3), 2, 4, *SIZES[:dims])
    expected, actual = (next(iter(o.factors().values())) for o in optimizers)
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a.to_dense(), e.to_dense(), rtol=1e-9, atol=1e-9)
    matrix = TransposedKind().matrix(conv, conv.weight, "weight").flatten(1)
    torch.testing.assert_close(matrix, models[0].linear.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("groups", "d_in", "d_out"), GROUPS)
def test_groups_train_as_a_convolution_with_the_mirrored_kernel(
    groups: int, d_in: int, d_out: int, momentum: float
) -> None:
    transposed = _make(2, {"kernel_size": (3, 2)}, groups, (d_in, d_out))
    conv = nn.Conv2d(d_in, d_out, (3, 2), padding=(2, 1), groups=groups, dtype=torch.float64)

    def mirrored(weight: Tensor) -> Tensor:
        grouped = weight.detach().unflatten(0, (groups, -1)).transpose(1, 2)
        return grouped.flatten(0, 1)

    with torch.no_grad():
        conv.weight.copy_(mirrored(transposed.weight).flip(2, 3))
        conv.bias.copy_(transposed.bias)
    options = {**SMALL_STEPS, "structures": ("diagonal", "dense"), "momentum": momentum}
    for model in (conv, transposed):
        _train(model, SINGD(model, **options), range(3), 2, d_in, 4, 3)
    result = mirrored(transposed.weight).flip(2, 3)
    torch.testing.assert_close(result, conv.weight.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(transposed.bias, conv.bias, rtol=1e-10, atol=1e-10)


SPARSE = ["diagonal", "block_diagonal:3", "hierarchical:1,1", "rank_triu:1"]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("structure", ["dense", *SPARSE])
def test_one_by_one_kernels_are_linear_layers_over_positions(
    structure: str, memory_format: torch.memory_format
) -> None:
    conv = _make(2, {"kernel_size": 1}).to(memory_format=memory_format)
    linear = nn.Linear(4, 2, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1).T)
        linear.bias.copy_(conv.bias)
    for model, order in ((conv, (0, 1, 2, 3)), (linear, (0, 2, 3, 1))):
        optimizer = SINGD(model, **{**SMALL_STEPS, "structures": (structure, structure)})
        for seed in range(3):
            _backward(model, optimizer, inputs(2, 4, 4, 3, seed=seed).permute(order))
            optimizer.step()
    torch.testing.assert_close(
        conv.weight.detach().flatten(1).T, linear.weight.detach(), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(conv.bias, linear.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("structure", ["dense", *SPARSE])
@pytest.mark.parametrize("kernel", [(3, 2), (1, 4)])
def test_memory_format_of_the_model_does_not_matter(
    kernel: tuple[int, int], structure: str
) -> None:
    runs = []
    for memory_format in FORMATS:
        conv = _make(2, {"kernel_size": kernel}).to(memory_format=memory_format)
        optimizer = SINGD(conv, **{**SMALL_STEPS, "structures": (structure, structure)})
        _train(conv, optimizer, range(3), 2, 4, 4, 3)
        runs.append(snapshot(conv, optimizer))
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-12)


def test_an_input_without_batch_is_a_batch_of_one() -> None:
    copies = []
    for unbatched in (False, True):
        conv = _make(2, {"kernel_size": 3, "stride": 2})
        optimizer = SINGD(conv, **SMALL_STEPS)
        x = inputs(4, 4, 3) if unbatched else inputs(4, 4, 3).unsqueeze(0)
        conv(x).square().mean().backward()
        optimizer.step()
        copies.append(snapshot(conv, optimizer))
    torch.testing.assert_close(copies[0], copies[1])


def test_a_frozen_weight_in_groups_stays_and_the_bias_is_trained() -> None:
    conv = _make(1, {"kernel_size": 3}, 2, (4, 4))
    optimizer = SINGD(conv, **SMALL_STEPS)
    _train(conv, optimizer, [0], 2, 4, 4)
    conv.weight.requires_grad_(False)
    weight, bias = conv.weight.clone(), conv.bias.detach().clone()
    _train(conv, optimizer, [1], 2, 4, 4)
    assert torch.equal(conv.weight, weight)
    assert not torch.equal(conv.bias, bias)


def test_output_size_is_refused() -> None:
    conv = _make(1, {"kernel_size": 3, "stride": 2})
    optimizer = SINGD(conv)
    with pytest.raises(ValueError, match=r"output_size=\[10\].*output_padding"):
        conv(inputs(2, 4, 4), output_size=[10])
    optimizer.remove_hooks()
    assert conv(inputs(2, 4, 4), output_size=[10]).shape == (2, 2, 10)
