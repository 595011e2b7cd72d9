"""Layer types that users register."""

from collections.abc import Iterator

import pytest
import torch
from nets import OPTIONS, mlp, train
from torch import Tensor, nn

import singd_ext
from singd_ext import SINGD
from singd_ext.kinds import LayerKind, LinearKind
from singd_ext.registry import KINDS

pytestmark = [pytest.mark.filterwarnings("error")]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Every test begins with the layers of the package."""
    before = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(before)


class Scaled(nn.Module):
    """A linear layer under other names and with a transposed weight, behind another argument."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.kernel = nn.Parameter(linear.weight.detach().t().clone())
        self.offset = nn.Parameter(linear.bias.detach().clone())

    def forward(self, factor: float, x: Tensor) -> Tensor:
        return x @ self.kernel + self.offset


class ScaledKind(LinearKind):
    """Names the parameters, finds the input, shows the weight as [d_o, d_i]."""

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {"weight": module.kernel, "bias": module.offset}

    def matrix(self, module: nn.Module, tensor: Tensor, key: str) -> Tensor:
        return tensor.t() if key == "weight" else tensor

    def call_input(self, args: tuple, kwargs: dict) -> Tensor:
        return kwargs["x"] if "x" in kwargs else args[1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, _, second = mlp()
        self.first, self.second = Scaled(first), Scaled(second)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(1.0, torch.tanh(self.first(factor=1.0, x=x)))


@pytest.mark.parametrize("key", ["class", "name"])
def test_registered_layer_is_trained_like_the_linear_layer_that_it_is(key: str) -> None:
    with pytest.raises(ValueError, match="no trainable parameter of a supported layer"):
        SINGD(Net(), warn_unsupported=False)
    name = f"{Scaled.__module__}.{Scaled.__qualname__}"
    singd_ext.register_layer(Scaled if key == "class" else name, ScaledKind())
    model, reference = Net(), mlp()
    optimizer, plain = SINGD(model, **OPTIONS), SINGD(reference, **OPTIONS)
    train(model, optimizer, range(4))
    train(reference, plain, range(4))
    for own, name in (("first", "0"), ("second", "2")):
        module, linear = getattr(model, own), reference[int(name)]
        torch.testing.assert_close(module.kernel.t(), linear.weight, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(module.offset, linear.bias, rtol=1e-12, atol=1e-14)
        for actual, expected in zip(optimizer.factors()[own], plain.factors()[name], strict=True):
            torch.testing.assert_close(actual.data, expected.data, rtol=1e-12, atol=1e-14)


def test_subclass_is_of_its_parents_kind_unless_registered_itself() -> None:
    class Wide(nn.Linear):
        pass

    class Wider(Wide):
        pass

    assert list(SINGD(nn.Sequential(Wider(2, 2))).factors()) == ["0"]

    class WeightOnly(LinearKind):
        def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
            return {"weight": module.weight}

    singd_ext.register_layer(Wide, WeightOnly())
    model = nn.Sequential(Wider(2, 2), nn.Linear(2, 2))
    optimizer = SINGD(model, warn_unsupported=False)
    assert [K.dim for K, _ in optimizer.factors().values()] == [2, 3]


@pytest.mark.parametrize("module_type", [int, "Linear", nn.Linear(1, 1), None])
def test_bad_type_is_refused_naming_it(module_type: object) -> None:
    before = dict(KINDS)
    with pytest.raises(TypeError, match="module_type is"):
        singd_ext.register_layer(module_type, LinearKind())
    assert before == KINDS


@pytest.mark.parametrize("kind", [LinearKind, None, "linear"])
def test_bad_kind_is_refused_naming_it(kind: object) -> None:
    with pytest.raises(TypeError, match=r"kind is .*LayerKind"):
        singd_ext.register_layer(nn.Bilinear, kind)
    assert nn.Bilinear not in KINDS


def test_a_kind_must_say_how_rows_look() -> None:
    with pytest.raises(TypeError, match="abstract"):
        LayerKind()


def test_a_kind_whose_matrix_is_a_copy_is_refused_unless_it_writes_back() -> None:
    class CopyingKind(ScaledKind):
        def matrix(self, module: nn.Module, tensor: Tensor, key: str) -> Tensor:
            return super().matrix(module, tensor, key).clone()

    singd_ext.register_layer(Scaled, CopyingKind())
    with pytest.raises(TypeError, match=r"layer 'first': CopyingKind\.matrix returns a copy"):
        SINGD(Net(), **OPTIONS)
