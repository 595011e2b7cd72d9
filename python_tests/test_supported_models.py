"""Which parameters SINGD trains, which it names as untrained, and which models it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import OPTIONS, assert_bitwise, inputs, mlp, snapshot, train
from torch import Tensor, nn

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]


class Container(nn.Module):
    """A bare parameter beside layers that are and are not supported."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.linear(self.embedding(x)) * self.scale)
        return self.attention(h, h, h)[0]


UNTRAINED = [
    "scale",
    "norm.weight",
    "norm.bias",
    "embedding.weight",
    "attention.bias_k",
    "attention.bias_v",
]


def test_one_warning_names_every_untrained_parameter() -> None:
    with pytest.warns(UserWarning) as warned:
        SINGD(Container())
    assert len(warned) == 1
    message = str(warned[0].message)
    assert [name for name in UNTRAINED if f"'{name}'" in message] == UNTRAINED
    for trained in ("linear", "frozen", "in_proj", "out_proj"):
        assert trained not in message
    assert warned[0].filename == __file__


def test_untrained_parameters_stay_and_the_others_train() -> None:
    torch.manual_seed(0)
    model = Container()
    optimizer = SINGD(model, warn_unsupported=False)  # and no warning, or it were an error
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([[0, 1, 4]])).square().sum().backward()
        optimizer.step()
    after = dict(model.named_parameters())
    changed = [name for name, p in before.items() if not torch.equal(p, after[name])]
    assert set(changed) == {name for name in before if name not in (*UNTRAINED, "frozen")}
    assert list(optimizer.factors()) == [
        "linear", "attention.q", "attention.k", "attention.v", "attention.out_proj",
    ]  # fmt: skip


def test_unsupported_parameters_given_explicitly_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.warns(UserWarning, match=r"'1\.weight', '1\.bias'"):
        SINGD(model, params=model.parameters())


class Adapted(nn.Linear):
    """A linear layer with a frozen weight and a trainable low-rank term."""

    def __init__(self) -> None:
        super().__init__(3, 3, bias=False)
        self.weight.requires_grad_(False)
        self.left, self.right = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.left @ self.right


def test_further_parameters_of_a_linear_subclass_are_named_as_untrained() -> None:
    with pytest.warns(UserWarning, match=r"'0\.left', '0\.right'"):
        optimizer = SINGD(nn.Sequential(Adapted(), nn.Linear(3, 2)))
    assert list(optimizer.factors()) == ["1"]


@pytest.mark.parametrize("bias", [True, False])
def test_reparametrized_weight_is_named_as_untrained(bias: bool) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=bias))
    with pytest.warns(UserWarning, match=r"'0\.parametrizations\.weight\.original0'"):
        optimizer = SINGD(nn.Sequential(layer, nn.Linear(3, 2)))
    assert list(optimizer.factors()) == (["0", "1"] if bias else ["1"])


# -------------------------------------------------------------------- refused models


def _shared_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def test_weight_shared_by_two_layers_can_be_excluded() -> None:
    model = _shared_weight()
    optimizer = SINGD(model, params=[model[0].bias, model[1].bias])
    shared, biases = model[0].weight.detach().clone(), model[1].bias.detach().clone()
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, shared) and not torch.equal(model[1].bias, biases)


def test_layer_object_used_under_two_names_is_one_layer() -> None:
    layer = nn.Linear(4, 4)
    assert list(SINGD(nn.Sequential(layer, nn.Tanh(), layer)).factors()) == ["0"]


def test_parameters_of_one_layer_in_different_groups_are_refused() -> None:
    model = mlp()
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias, *model[2].parameters()]}]
    with pytest.raises(ValueError, match=r"'0' are in different parameter groups"):
        SINGD(model, params=groups)
    optimizer = SINGD(model, params=[model[0].weight], **OPTIONS)
    with pytest.raises(ValueError, match=r"'0' are in different parameter groups"):
        optimizer.add_param_group({"params": [model[0].bias]})
    assert len(optimizer.param_groups) == 1


def test_parameter_given_twice_is_refused() -> None:
    model = mlp()
    optimizer = SINGD(model, params=model[0].parameters())
    with pytest.raises(ValueError, match="different parameter groups"):
        optimizer.add_param_group({"params": model[0].parameters()})
    assert len(optimizer.param_groups) == 1 and len(optimizer.factors()) == 1


def test_data_parallel_wrapper_is_refused() -> None:
    with pytest.raises(TypeError, match="DataParallel"):
        SINGD(nn.DataParallel(mlp()))


def test_complex_parameters_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"layer '1'.*complex64"):
        SINGD(model)


def test_device_without_kernels_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"layer '0' is on meta"):
        SINGD(model)


def test_uninitialized_parameters_are_refused_until_a_forward_pass() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyConv1d(2, 1))
    with pytest.raises(ValueError, match=r"'0\.weight' is uninitialised"):
        SINGD(model)
    model(torch.ones(2, 5, 4))
    assert list(SINGD(model).factors()) == ["0", "1"]


@pytest.mark.parametrize(("d_in", "d_out"), [(0, 3), (3, 0)])
def test_empty_parameters_are_refused(d_in: int, d_out: int) -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(d_in, d_out))
    with pytest.raises(ValueError, match=rf"'0\.weight' of shape \({d_out}, {d_in}\) is empty"):
        SINGD(model)


def test_model_without_trainable_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter of a supported layer"):
        SINGD(nn.Tanh())


# -------------------------------------------------------------------- frozen parameters


def _freeze(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def test_frozen_bias_equals_a_layer_whose_bias_is_not_given() -> None:
    frozen, other = _freeze(mlp(), "0.bias"), mlp()
    left_out = [other[0].weight, *other[2].parameters()]
    first, second = SINGD(frozen, **OPTIONS), SINGD(other, params=left_out, **OPTIONS)
    train(frozen, first, range(3))
    train(other, second, range(3))
    assert first.factors()["0"][0].dim == 5
    assert_bitwise(snapshot(frozen, first), snapshot(other, second))
    assert torch.equal(frozen[0].bias, mlp()[0].bias)


@pytest.mark.parametrize("structures", [("dense", "dense"), ("diagonal", "block_diagonal:2")])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_frozen_weight_trains_the_bias_as_a_layer_fed_with_ones(
    kfac_approx: str, structures: tuple[str, str]
) -> None:
    class OnesLayer(nn.Module):
        """Adds a bias that is the weight of a layer with the input 1."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.register_buffer("weight", linear.weight.detach().clone())
            self.ones = nn.Linear(1, linear.out_features, bias=False, dtype=torch.float64)
            self.ones.weight.data.copy_(linear.bias.detach().unsqueeze(1))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.get_buffer("weight").T + self.ones(torch.ones_like(x[..., :1]))

    options = {**OPTIONS, "structures": structures, "kfac_approx": kfac_approx}
    model = _freeze(mlp(), "0.weight")
    reference = nn.Sequential(OnesLayer(model[0]), *mlp()[1:])
    first, second = SINGD(model, **options), SINGD(reference, **options)
    train(model, first, range(3), 4, 3, 5)
    train(reference, second, range(3), 4, 3, 5)
    torch.testing.assert_close(
        model[0].bias, reference[0].ones.weight.squeeze(1), rtol=1e-12, atol=1e-14
    )
    assert not torch.equal(model[0].bias, mlp()[0].bias)
    assert torch.equal(model[0].weight, mlp()[0].weight)


def test_lost_gradient_of_half_a_layer_is_an_error_naming_the_layer() -> None:
    model = mlp()
    optimizer = SINGD(model, **OPTIONS)
    train(model, optimizer, [0])
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    model(inputs()).sum().backward()
    model[0].bias.grad = None
    with pytest.raises(RuntimeError, match=r"layer '0'"):
        optimizer.step()
    after = snapshot(model, optimizer)
    assert_bitwise({key: after[key] for key in before}, before)


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "double": nn.Module.double,
    "bfloat16": nn.Module.bfloat16,
}


@pytest.mark.parametrize("cast", CASTS)
def test_model_cast_after_construction_still_trains(cast: str) -> None:
    model = mlp(dtype=torch.float32)
    optimizer = SINGD(model, **OPTIONS)
    CASTS[cast](model)
    before = model[0].weight.detach().clone()
    train(model, optimizer, range(2))
    assert model[0].weight.isfinite().all() and not torch.equal(model[0].weight, before)
