"""The CUDA kernels, emulated, against the CPU twin, with the threads of a block in several orders.

A short list that the sanitized library and the mutation tests run as well.
"""

from collections.abc import Callable, Mapping
from typing import Any

import backends
import calls
import pytest
import torch
from reference.masks import SPECS
from tolerance import assert_close_to_truth
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from singd_ext import SINGD

pytestmark = pytest.mark.skipif(
    backends.missing("cuda-emulated") is not None,
    reason=backends.missing("cuda-emulated") or "",
)

Result = Mapping[str, list[Tensor]]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SEEDS = (0, 1, 2)
# The oracle's list has small blocks and borders; kernels have tiles of 16 and limits at 64.
STRUCTURES = [
    *SPECS,
    "block_diagonal:16",
    "block_diagonal:30",
    "block_diagonal:32",
    "block_diagonal:64",
    "block_diagonal:100",
    "rank_triu:1",
    "rank_tril:1",
    "rank_triu_topleft:33",
    "rank_tril_topleft:17",
    "hierarchical:16,16",
    "hierarchical:40,40",
]

# What the sanitized library runs: every family, with tiles that are whole and that are not.
SHORT = ["dense", "diagonal", "block_diagonal:30", "hierarchical:16,16", "rank_tril:2"]
SHORT += ["rank_triu_topleft:33", "tril_toeplitz"]

every_structure = pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=pytest.mark.short if s in SHORT else ()) for s in STRUCTURES],
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def compare(call: Callable[[torch.dtype], Result], dtype: torch.dtype) -> None:
    """The call gives, emulated, what float64 gives on the CPU, as well as the CPU twin does."""
    truth, rival = call(torch.float64), call(dtype)
    for seed in SEEDS:
        with backends.use("cuda-emulated", seed):
            ours = call(dtype)
        assert ours.keys() == truth.keys()
        for name, tensors in ours.items():
            for i, tensor in enumerate(tensors):
                assert tensor.dtype == rival[name][i].dtype, name
                if tensor.is_floating_point():
                    assert_close_to_truth(tensor, rival[name][i], truth[name][i], 4.0, 8.0)
                else:
                    assert torch.equal(tensor, truth[name][i]), name


@every_structure
@every_dtype
@pytest.mark.parametrize("shared", ["expand", "mean", "sum"])
def test_statistics(spec: str, dtype: torch.dtype, shared: str) -> None:
    for shape in calls.SHAPES:
        compare(
            lambda t, s=shape: {"statistic": [calls.accumulate(spec, s, 45, t, shared=shared)]},
            dtype,
        )


@every_dtype
@pytest.mark.parametrize(
    "spec", ["block_diagonal:30", "block_diagonal:32", "hierarchical:16,16", "rank_tril:2"]
)
def test_statistics_of_rows_that_go_round_the_ring(spec: str, dtype: torch.dtype) -> None:
    """More of them than the stages of the Gram kernels hold at a time."""
    for shape in (calls.Shape(1, 96), calls.Shape(1, 65, True)):
        compare(lambda t, s=shape: {"statistic": [calls.accumulate(spec, s, 700, t)]}, dtype)


@every_structure
@every_dtype
@pytest.mark.parametrize(
    "options",
    [{"expm_order": 1}, {"expm_order": 2, "step_cap": 1e-3}, {"normalize_lr_cov": True}],
    ids=["first order", "second order, capped", "normalized"],
)
def test_factor_updates(spec: str, dtype: torch.dtype, options: dict[str, object]) -> None:
    other = STRUCTURES[(STRUCTURES.index(spec) + 5) % len(STRUCTURES)]
    compare(lambda t: calls.update_factors(spec, other, calls.SHAPES, t, **options), dtype)


@every_structure
@every_dtype
@pytest.mark.parametrize("offset", [0, 3, 5])
def test_parameter_updates(spec: str, dtype: torch.dtype, offset: int) -> None:
    other = STRUCTURES[(STRUCTURES.index(spec) + offset) % len(STRUCTURES)]
    compare(lambda t: calls.update_parameters(spec, other, calls.SHAPES, t), dtype)


@every_dtype
def test_kept_products_take_the_place_of_dense_factors(dtype: torch.dtype) -> None:
    compare(
        lambda t: calls.update_parameters("dense", "triu", calls.SHAPES, t, keep_products=True),
        dtype,
    )


def test_a_wrong_kept_product_is_noticed() -> None:
    """It is what acts, where a factor is too large for the fused step."""
    with backends.use("cuda-emulated"):
        shapes = [calls.Shape(70, 130)]
        zeros = {"P_K": [torch.zeros(130, 130)], "P_C": [torch.zeros(70, 70)]}
        kept = calls.update_parameters("dense", "dense", shapes, torch.float32, **zeros)
        plain = calls.update_parameters("dense", "dense", shapes, torch.float32)
    assert not torch.equal(kept["weight"][0], plain["weight"][0])


FUSED = ["diagonal", "block_diagonal:30", "hierarchical:16,16", "rank_tril:2", "dense"]


@pytest.mark.parametrize("spec", FUSED)
def test_gradient_scales_are_read_on_the_device(spec: str) -> None:
    scale = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)}
    compare(lambda t: calls.update_parameters(spec, spec, calls.SHAPES, t, **scale), torch.float32)
    compare(lambda t: calls.update_factors(spec, spec, calls.SHAPES, t, **scale), torch.float32)


@pytest.mark.parametrize("spec", FUSED)
def test_nothing_is_done_where_an_infinity_was_found(spec: str) -> None:
    lr = {"lr": torch.tensor(0.0), "momentum": 1.0, "weight_decay": 0.0}
    shapes = calls.SHAPES
    with backends.use("cuda-emulated"):
        found = {"found_inf": torch.tensor(1.0)}
        stepped = calls.update_parameters(spec, spec, shapes, torch.float32, **found)
        other = calls.update_parameters(spec, spec, shapes, torch.float32, **found, **lr)
        updated = calls.update_factors(spec, spec, shapes, torch.float32, **found)
        again = calls.update_factors(
            spec, spec, shapes, torch.float32, **found, lr_cov=torch.tensor(0.5)
        )
    for first, second in ((stepped, other), (updated, again)):
        for name in first:
            assert all(map(torch.equal, first[name], second[name])), name
    on_the_cpu = calls.update_parameters(spec, spec, shapes, torch.float32, **found)
    assert all(map(torch.equal, stepped["weight"], on_the_cpu["weight"]))
    assert not stepped["outcomes"][0].any() and not updated["outcomes"][0].any()


@pytest.mark.parametrize("spec", ["dense", "block_diagonal:3", "hierarchical:2,1", "rank_tril:2"])
def test_many_orders_of_the_threads_give_the_same_bits(spec: str) -> None:
    """A barrier that only separates two uses of the same memory shows at few seeds."""
    shapes = [calls.Shape(9, 20, True), calls.Shape(3, 4)]

    def results() -> list[Tensor]:
        updated = calls.update_factors(spec, spec, shapes, torch.bfloat16, expm_order=2)
        stepped = calls.update_parameters(spec, spec, shapes, torch.bfloat16)
        statistic = calls.accumulate(spec, shapes[0], 40, torch.bfloat16)
        lists = [[statistic], *updated.values(), *stepped.values()]
        return [tensor for tensors in lists for tensor in tensors]

    with backends.use("cuda-emulated", seed=0):
        expected = results()
    for seed in range(1, 150):
        with backends.use("cuda-emulated", seed):
            for ours, first in zip(results(), expected, strict=True):
                assert torch.equal(ours, first), f"seed {seed}"


def test_hooks_call_the_emulated_operators() -> None:
    """Layers are called from C++, which must not go past the exchange of the operators."""
    called: set[str] = set()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.add(str(func))
            return func(*args, **(kwargs or {}))

    layer = nn.Linear(3, 2)
    optimizer = SINGD(layer, T=1, structures=("diagonal", "diagonal"))
    for backend, namespace in (("cuda-emulated", "singd_emulated"), ("cpu", "singd_ext")):
        called.clear()
        with backends.use(backend), Calls():
            layer(torch.ones(4, 3)).sum().backward()
        optimizer.zero_grad()
        assert {name for name in called if name.startswith("singd")} == {
            f"{namespace}.accumulate_statistic_.default"
        }
