"""`StructuredMatrix` as users meet it."""

import pytest
import torch
from reference import masks
from torch import Tensor

from singd_ext import StructuredMatrix

every_structure = pytest.mark.parametrize("spec", masks.SPECS)


def random_dense(spec: str, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(dim)
    return masks.member(spec, torch.randn(dim, dim, generator=generator, dtype=torch.float64))


@every_structure
@pytest.mark.parametrize("dim", range(1, 41))
def test_every_size(spec: str, dim: int) -> None:
    """Pattern, weights, products and remainders of every dimension from 1 to 40."""
    dense = random_dense(spec, dim)
    matrix = StructuredMatrix.extract(spec, dense)
    assert torch.equal(matrix.to_dense(), dense)
    symmetric = dense + dense.T + torch.eye(dim)
    projected = StructuredMatrix.project(spec, symmetric)
    torch.testing.assert_close(projected.to_dense(), masks.project(spec, symmetric))
    torch.testing.assert_close((matrix @ matrix).to_dense(), dense @ dense)
    torch.testing.assert_close(matrix.gram().to_dense(), masks.project(spec, dense.T @ dense))
    assert torch.equal(StructuredMatrix.eye(spec, dim).to_dense(), torch.eye(dim))
    assert torch.equal(StructuredMatrix.zeros(spec, dim).to_dense(), torch.zeros(dim, dim))
    torch.testing.assert_close(matrix.trace(), dense.trace())


@every_structure
@pytest.mark.parametrize("shape", [(9,), (9, 4), (3, 9, 9), (2, 3, 9, 1), (0, 9, 9), (9, 0)])
def test_products_take_the_shapes_of_matmul(spec: str, shape: tuple[int, ...]) -> None:
    matrix = StructuredMatrix.extract(spec, random_dense(spec, 9))
    dense = matrix.to_dense()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(matrix @ x, dense @ x)
    torch.testing.assert_close(matrix.T @ x, dense.T @ x)
    x = x if x.ndim == 1 else x.mT
    torch.testing.assert_close(x @ matrix, x @ dense)
    torch.testing.assert_close(x @ matrix.T, x @ dense.T)


@every_structure
def test_products_of_strided_tensors(spec: str) -> None:
    matrix = StructuredMatrix.extract(spec, random_dense(spec, 9))
    dense = matrix.to_dense()
    x = torch.randn(18, 12, dtype=torch.float64)
    for view in (x[::2], x[:9, 1:8:3], x.T[:9, :9], x[:1].T.expand(12, 5)[:9]):
        torch.testing.assert_close(matrix @ view, dense @ view)
        torch.testing.assert_close(view.mT @ matrix, view.mT @ dense)


def test_mixed_dtypes_promote() -> None:
    matrix = StructuredMatrix.eye("diagonal", 3, dtype=torch.float32)
    assert (matrix @ torch.ones(3, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert (matrix @ torch.ones(3, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("spec", "dim", "names"),
    [
        ("dense", 5, {"dense": (5, 5)}),
        ("triu", 5, {"dense": (5, 5)}),
        ("diagonal", 5, {"diagonal": (5,)}),
        ("block_diagonal:2", 5, {"blocks": (2, 2, 2), "last_block": (1, 1)}),
        ("block_diagonal:2", 4, {"blocks": (2, 2, 2)}),
        ("block_diagonal:9", 4, {"dense": (4, 4)}),
        ("rank_triu:2", 5, {"border": (2, 5), "diagonal": (3,)}),
        ("rank_tril:7", 5, {"dense": (5, 5)}),
        ("hierarchical:2,1", 5, {"border": (3, 5), "diagonal": (2,)}),
        ("hierarchical:3,16", 5, {"border": (5, 5), "diagonal": (0,)}),
        ("hierarchical:16,3", 5, {"dense": (5, 5)}),
        ("tril_toeplitz", 5, {"coefficients": (5,)}),
    ],
)
def test_named_tensors_are_the_storage(
    spec: str, dim: int, names: dict[str, tuple[int, ...]]
) -> None:
    matrix = StructuredMatrix.eye(spec, dim, dtype=torch.bfloat16)
    parts = dict(matrix.named_tensors())
    assert {name: tuple(part.shape) for name, part in parts.items()} == names
    assert sum(part.numel() for part in parts.values()) * 2 == matrix.nbytes
    for part in parts.values():  # views: writing to them writes to the matrix
        part.fill_(3)
    assert (matrix.data == 3).all()


def test_column_borders_are_stored_as_rows_of_the_transpose() -> None:
    dense = torch.tensor([[1.0, 0, 0], [2, 4, 0], [3, 0, 5]])
    parts = dict(StructuredMatrix.extract("rank_tril:1", dense).named_tensors())
    assert parts["border"].tolist() == [[1, 2, 3]]
    assert parts["diagonal"].tolist() == [4, 5]


def test_specs_are_canonical() -> None:
    assert StructuredMatrix.eye("block30diagonal", 40).spec == "block_diagonal:30"
    assert StructuredMatrix.eye("hierarchical15_15", 40).spec == "hierarchical:15,15"
    assert StructuredMatrix.eye("block_diagonal", 40).spec == "block_diagonal:32"
    assert StructuredMatrix.eye("rank_triu", 40).spec == "rank_triu:1"
    assert "triu_toeplitz" in repr(StructuredMatrix.eye("triutoeplitz", 4))


def test_wrong_use_is_explained() -> None:
    eye = StructuredMatrix.eye("triu", 3)
    with pytest.raises(ValueError, match=r"entry \[2, 0\] is 1.0, where the structure has 0.0"):
        StructuredMatrix.extract("triu", torch.ones(3, 3).tril().T + torch.eye(3).roll(1, 1))
    with pytest.raises(ValueError, match="not of structure 'triu_toeplitz'"):
        StructuredMatrix.extract("triu_toeplitz", torch.diag(torch.tensor([1.0, 2.0])))
    with pytest.raises(ValueError, match="symmetric"):
        StructuredMatrix.project("triu", torch.ones(3, 3).triu())
    with pytest.raises(ValueError, match="'triu' of dimension 3 and 'tril' of dimension 3"):
        eye @ StructuredMatrix.eye("tril", 3)
    with pytest.raises(ValueError, match="does not fit a matrix of shape"):
        eye @ torch.ones(4, 2)
    with pytest.raises(ValueError, match="at least 1"):
        StructuredMatrix.eye("triu", 0)
    with pytest.raises(ValueError, match="allowed are dense"):
        StructuredMatrix.eye("banded", 3)
    with pytest.raises(TypeError, match="a structure is a string"):
        StructuredMatrix.eye(3, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="storage of 9 numbers"):
        StructuredMatrix("triu", 3, torch.zeros(8))
    with pytest.raises(TypeError, match="int64"):
        StructuredMatrix("triu", 3, torch.zeros(9, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"expected a torch.Tensor, got float"):
        eye @ 2.0  # type: ignore[operator]
    with pytest.raises(ValueError, match="not differentiable"):
        eye @ torch.ones(3, requires_grad=True)
    with torch.no_grad():
        eye @ torch.ones(3, requires_grad=True)
