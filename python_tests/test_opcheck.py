"""torch.library.opcheck of every operator, structure and dtype: schemas, fakes, mutation."""

from typing import Any

import pytest
import torch
from reference import masks
from torch import Tensor
from torch.library import opcheck

from singd_ext import _C, StructuredMatrix, info, ops

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
D_I, D_O = 7, 5


def samples(spec: str, dtype: torch.dtype) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """(args, kwargs) of a call of every operator."""
    factor = StructuredMatrix.eye(spec, D_I, dtype).data
    square, rows = torch.eye(D_I, dtype=dtype), torch.ones(3, D_I, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    statistic = torch.zeros_like(factor, dtype=wide)
    return {
        "project": ((square, spec), {}),
        "project_gram": ((rows, spec), {}),
        "extract": ((square, spec), {}),
        "to_dense": ((factor, D_I, spec), {}),
        "structured_matmul": ((factor, D_I, spec, rows), {"side": "right", "transpose": True}),
        "structured_product": ((factor, factor.clone(), D_I, spec), {}),
        "factor_gram": ((factor, D_I, spec), {}),
        "accumulate_statistic_": (
            (statistic, rows[:, :-1].unsqueeze(0), factor, D_I, spec),
            {"ones_column": True, "shared": "sum"},
        ),
        "update_factors_": factor_update(spec, dtype, wide),
        "preconditioned_update_": parameter_update(spec, dtype),
    }


def call_memory() -> dict[str, Tensor]:
    return {
        "outcomes": torch.zeros(2, dtype=torch.int64),
        "workspace": torch.zeros(1 << 20, dtype=torch.uint8),
    }


def factor_update(
    spec: str, dtype: torch.dtype, wide: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def identities(dim: int, kind: torch.dtype) -> list[Tensor]:
        return [StructuredMatrix.eye(spec, dim, kind).data for _ in range(2)]

    factors = [identities(dim, dtype) for dim in (D_I, D_O, D_I, D_O)]
    statistics = [identities(dim, wide) for dim in (D_I, D_O)]
    counters = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    scales = [[1.0, 2.0], [3.0, 4.0], [D_I, D_I], [D_O, D_O]]
    options = call_memory() | {
        "lr_cov": torch.tensor(0.1), "damping": 0.1, "alpha1": 0.5, "kfac_like": False,
        "normalize_lr_cov": True, "expm_order": 2, "step_cap": 0.5,
        "grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0), "rounding_key": [1, 2],
    }  # fmt: skip
    return (*factors, counters, *statistics, *scales, spec, spec), options


def parameter_update(spec: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def parameters() -> list[list[Tensor]]:
        weights = [torch.ones(D_O, D_I, dtype=dtype), torch.ones(D_O, D_I - 1, dtype=dtype)]
        return [weights, [torch.empty(0), torch.ones(D_O, dtype=dtype)]]

    counters = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    factors = [[StructuredMatrix.eye(spec, d, dtype).data for _ in range(2)] for d in (D_I, D_O)]
    options = call_memory() | {
        "lr": torch.tensor(0.1), "momentum": 0.9, "weight_decay": 0.1,
        "products": torch.empty(0, dtype=torch.uint8),
    }  # fmt: skip
    arguments = (
        *parameters(), *parameters(), counters, *parameters(), *factors, [], [], spec, spec,
    )  # fmt: skip
    torch.ops.singd_ext.preconditioned_update_(*arguments, **options)  # gives products their size
    return arguments, options


@pytest.mark.parametrize("spec", masks.SPECS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", info.OPERATORS)
def test_opcheck(name: str, dtype: torch.dtype, spec: str, backend: str) -> None:
    args, kwargs = samples(spec, dtype)[name]
    if backend == "cuda-emulated":  # fakes and autograd are those of singd_ext's own operators
        opcheck(getattr(ops._ops, name).default, args, kwargs, test_utils="test_schema")
    else:
        opcheck(getattr(ops._ops, name).default, args, kwargs)


def test_the_list_of_operators_is_complete(backend: str) -> None:
    """`info.OPERATORS` is what the library registers, each with a kernel for every device."""
    namespace = "singd_emulated::" if backend == "cuda-emulated" else "singd_ext::"
    registered = {
        schema.name.removeprefix(namespace)
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(namespace)
    }
    assert registered == set(info.OPERATORS)
    for device in _C.build_info()["devices"].split():
        assert info.kernels(device) == list(info.OPERATORS)
