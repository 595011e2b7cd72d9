"""The oracle itself: its rows, its patterns and its bookkeeping, from first principles."""

import pytest
import torch
from cases import CASES, Case, UsedTwice, parameters, train
from reference.layers import as_matrix, gradient_rows, input_rows
from reference.masks import DEFAULT_SIZES, SPECS, STRUCTURES, mask, member, parse, weights
from reference.singd import ReferenceSINGD
from tolerance import assert_same_trajectory
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "padding, kernel, dilation, stride",
    [
        (padding, *window)
        for padding in (0, 2, "same", "valid")
        for window in [(3, 1, 1), (2, 1, 1), (3, 2, 1), (2, 2, 2), (3, 1, 3)]
        if not (padding == "same" and window[-1] > 1)  # torch has no such convolution
    ],
)
@pytest.mark.parametrize("dims", CONVOLUTIONS)
def test_patches_times_weight_are_the_convolution(
    dims: int, padding: int | str, kernel: int, dilation: int, stride: int, padding_mode: str
) -> None:
    torch.manual_seed(0)
    layer = CONVOLUTIONS[dims](
        2, 3, kernel, stride, padding, dilation, padding_mode=padding_mode, dtype=torch.float64
    )
    for shape in ((2, 2, 6, 7, 5)[: 2 + dims], (2, 6, 7, 5)[: 1 + dims]):
        x = torch.randn(shape, dtype=torch.float64)
        y = layer(x)
        X = input_rows(layer, x, y, "expand")
        torch.testing.assert_close(X @ as_matrix(layer).T, gradient_rows(layer, y, "expand"))


def test_channel_groups_are_averaged() -> None:
    torch.manual_seed(0)
    grouped = nn.Conv2d(6, 4, 2, groups=2, bias=False).double()
    single = nn.Conv2d(3, 4, 2, bias=False).double()
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    y = grouped(x)
    mean = (x[:, :3] + x[:, 3:]) / 2
    ours, expected = input_rows(grouped, x, y, "expand"), input_rows(single, mean, y, "expand")
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["linear", "linear_1d", "linear_3d", "linear_4d"])
def test_rows_of_a_linear_layer_give_its_output_and_gradient(name: str) -> None:
    layer = CASES[name].model()[0]
    x, _ = CASES[name].batch(1)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    X, rows = input_rows(layer, x, y, "expand"), gradient_rows(layer, g, "expand")
    torch.testing.assert_close(X @ as_matrix(layer).T, gradient_rows(layer, y, "expand").detach())
    torch.testing.assert_close(rows.T @ X, as_matrix(layer, grad=True))


@pytest.mark.parametrize("name", ["linear_3d", "conv2d"])
def test_reduce_averages_inputs_and_sums_gradients(name: str) -> None:
    layer = CASES[name].model()[0]
    x, _ = CASES[name].batch(1)
    y = layer(x)
    samples = x.shape[0]
    X = input_rows(layer, x, y, "expand").unflatten(0, (samples, -1))
    g = gradient_rows(layer, y, "expand").unflatten(0, (samples, -1))
    torch.testing.assert_close(input_rows(layer, x, y, "reduce"), X.mean(1))
    torch.testing.assert_close(gradient_rows(layer, y, "reduce"), g.sum(1))


def random_member(spec: str, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(d, d, generator=generator, dtype=torch.float64) - 0.5
    return member(spec, 2 * torch.eye(d, dtype=torch.float64) + noise / d)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("spec", SPECS)
def test_structures_are_closed_under_products_and_inverses(spec: str, d: int) -> None:
    A, B = random_member(spec, d), random_member(spec, d, seed=1)
    for result in (A @ B, torch.linalg.inv(A)):
        torch.testing.assert_close(member(spec, result), result)


def test_every_structure_is_listed_once() -> None:
    assert [parse(spec)[0] for spec in SPECS] == list(STRUCTURES)
    assert {name for name in STRUCTURES if parse(name)[1]} == DEFAULT_SIZES.keys()


@pytest.mark.parametrize("spec", ["block_diagonal:4", "rank_triu:4", "rank_tril_topleft:5"])
def test_a_size_of_the_whole_dimension_is_dense(spec: str) -> None:
    assert weights(spec, 4).eq(1).all()


def test_hierarchical_gives_k1_what_fits_and_then_k2() -> None:
    assert weights("hierarchical:3,2", 3).eq(1).all()
    block_triangular = torch.ones(4, 4, dtype=torch.bool)
    block_triangular[3, :3] = False
    assert mask("hierarchical:3,2", 4).equal(block_triangular)


@pytest.mark.parametrize("loss_average", ["batch", "batch+sequence", None])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_micro_batches_are_one_big_batch(kfac_approx: str, loss_average: str | None) -> None:
    case = CASES["linear_3d"]
    options = {
        "T": 2,
        "lr_cov": 0.05,
        "kfac_approx": kfac_approx,
        "loss_average": loss_average,
        "lr": 0.01,
    }
    micro = case.steps(6, sizes=(5, 3))
    big = [[tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))] for parts in micro]
    runs = []
    for steps in (micro, big):
        runs.append(ReferenceSINGD(case.model(), **options))
        train(runs[-1].model, runs[-1], steps)
    ends = [parameters(run.model) for run in runs]
    assert_same_trajectory(*ends, parameters(case.model()), rtol=1e-11)


def test_two_uses_are_one_use_on_inputs_stacked_along_a_shared_dimension() -> None:
    class OneUse(UsedTwice):
        def forward(self, x: Tensor) -> Tensor:
            # the second input does not depend on the first output here
            both = self.shared(torch.stack([x, torch.tanh(x)], 1))
            return both[:, 0] * both[:, 1]

    class TwoUses(UsedTwice):
        def forward(self, x: Tensor) -> Tensor:
            return self.shared(x) * self.shared(torch.tanh(x))

    ends = []
    for module in (OneUse, TwoUses):
        case = Case(lambda module=module: [nn.Linear(11, 7), module()], 6, (11,))
        reference = ReferenceSINGD(case.model(), T=1, lr_cov=0.05, lr=0.01)
        train(reference.model, reference, case.steps(6))
        ends.append(parameters(reference.model))
    assert_same_trajectory(*ends, parameters(case.model()), rtol=1e-11)
