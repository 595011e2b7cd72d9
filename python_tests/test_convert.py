"""States of PyPI singd 0.0.5: converted, and then trained on by both packages side by side."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import assert_bitwise, inputs, snapshot
from tolerance import relative_to_movement
from torch import Tensor, nn

from singd_ext import SINGD
from singd_ext.convert import from_singd

pypi = pytest.importorskip("singd.optim.optimizer", reason="the states are those of PyPI singd")

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:Calling naive implementation"),  # of PyPI's Toeplitz
]

BEFORE, AFTER = 4, 4
FLOAT32 = 2e-5  # of the way that a weight goes after the conversion, as in test_against_pypi.py
OPTIONS: dict[str, Any] = {"lr": 0.002, "damping": 0.05, "T": 1, "lr_cov": 0.04}
# By both names of a structure. PyPI multiplies by K where Kᵀ is meant if K is block-diagonal: the
# packages agree while the blocks are symmetric, which they are after one update of the factors.
STRUCTURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "diagonal": {},
    "block30diagonal": {"T": 20},
    "hierarchical15_15": {},
    "triltoeplitz": {},
    "triutoeplitz": {},
}
OURS = {"block30diagonal": "block_diagonal:30", "triltoeplitz": "tril_toeplitz"}
VARIANTS: dict[str, dict[str, Any]] = {
    "singd": {},
    "middle_of_T": {"T": 3},
    "ikfac": {"kfac_like": True, "alpha1": 0.0, "lr_cov": 0.01},
    "no_momentum": {"momentum": 0.0},
    "normalized": {"normalize_lr_cov": True, "weight_decay": 0.1},
    "bfloat16_factors": {"preconditioner_dtype": (torch.float32, torch.bfloat16)},
}


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(5, 34, 3, stride=2), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(204, 33), nn.Tanh(), nn.Linear(33, 32, bias=False)),
    )


def _train(model: nn.Module, optimizer: Any, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        x = inputs(4, 5, 7, 6, seed=seed, dtype=torch.float32)
        (25.0 * (model(x) - 0.7).square().mean()).backward()
        optimizer.step()


def _pypi(steps: int = BEFORE, **options: Any) -> tuple[nn.Sequential, Any]:
    model = _net()
    optimizer = pypi.SINGD(model, **{**OPTIONS, **options})
    _train(model, optimizer, range(steps))
    return model, optimizer


def _through_file(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


CASES = [*((s, "singd") for s in STRUCTURES), *(("dense", v) for v in VARIANTS if v != "singd")]


@pytest.mark.parametrize(("structure", "variant"), CASES)
def test_training_goes_on_as_with_pypi(structure: str, variant: str) -> None:
    options = {**STRUCTURES[structure], **VARIANTS[variant]}
    model, witness = _pypi(structures=(structure, structure), **options)
    saved = _through_file(witness.state_dict(), weights_only=False)
    spec = OURS.get(structure, structure)

    twin = _net()
    optimizer = SINGD(twin, structures=(spec, spec), **{**OPTIONS, **options, "lr": 9.0})
    twin.load_state_dict(model.state_dict())
    optimizer.load_state_dict(from_singd(saved, optimizer))
    assert optimizer.param_groups[0]["lr"] == OPTIONS["lr"]
    assert optimizer.param_groups[0]["steps"] == BEFORE
    for name, (K, C) in optimizer.factors().items():
        assert torch.equal(K.to_dense(), witness.Ks[name].to_dense())
        assert torch.equal(C.to_dense(), witness.Cs[name].to_dense())

    start = _parameters(model)
    for m, o in ((model, witness), (twin, optimizer)):
        _train(m, o, range(BEFORE, BEFORE + AFTER))
    coarse = 1e-2 if "bfloat16" in variant else FLOAT32
    for name, expected in _parameters(model).items():
        actual = _parameters(twin)[name]
        assert relative_to_movement(actual, expected, start[name]) < coarse, name

    fresh = _net()
    fresh.load_state_dict(start)
    _train(fresh, SINGD(fresh, structures=(spec, spec), **{**OPTIONS, **options}),
           range(BEFORE, BEFORE + AFTER))  # fmt: skip
    assert any(
        relative_to_movement(_parameters(fresh)[name], expected, start[name]) > 10 * coarse
        for name, expected in _parameters(model).items()
    )  # without the state, another run


def test_optimizer_itself_is_a_source_and_stays_as_it_is() -> None:
    _, witness = _pypi()
    twin = copy.deepcopy(_net())
    optimizer = SINGD(twin, **OPTIONS)
    before = {name: K.to_dense().clone() for name, K in witness.Ks.items()}
    from_object = from_singd(witness, optimizer)
    saved = witness.state_dict()
    keys = set(saved)
    from_state = from_singd(saved, optimizer)
    assert set(saved) == keys
    optimizer.load_state_dict(from_object)
    first = snapshot(twin, optimizer)
    optimizer.load_state_dict(from_state)
    assert_bitwise(snapshot(twin, optimizer), first)
    _train(twin, optimizer, range(2))
    for name, K in before.items():
        assert torch.equal(witness.Ks[name].to_dense(), K)


def test_converted_state_is_plain() -> None:
    _, witness = _pypi()
    optimizer = SINGD(_net(), **OPTIONS)
    converted = _through_file(from_singd(witness, optimizer), weights_only=True)
    optimizer.load_state_dict(converted)


def test_state_of_an_untrained_optimizer() -> None:
    _, witness = _pypi(steps=0)
    model = _net()
    optimizer = SINGD(model, **OPTIONS)
    before = snapshot(model, optimizer)
    optimizer.load_state_dict(from_singd(witness, optimizer))
    assert_bitwise(snapshot(model, optimizer), before)


def test_several_groups_and_a_schedule() -> None:
    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        return [
            {"params": list(model[0].parameters()), "structures": ("diagonal", "triutoeplitz")},
            {"params": [*model[3].parameters(), *model[5].parameters()], "lr": 0.001},
        ]

    model = _net()
    witness = pypi.SINGD(model, params=groups(model), **{**OPTIONS, "lr_cov": lambda step: 0.04})
    _train(model, witness, range(2))
    twin = _net()
    optimizer = SINGD(twin, params=groups(twin), **{**OPTIONS, "lr_cov": 0.03})
    optimizer.load_state_dict(from_singd(witness, optimizer))
    assert [group["lr"] for group in optimizer.param_groups] == [0.002, 0.001]
    assert optimizer.param_groups[0]["lr_cov"] == 0.03  # a function is not taken over
    for name, (K, _) in optimizer.factors().items():
        assert torch.equal(K.to_dense(), witness.Ks[name].to_dense())


def test_statistics_of_a_pass_are_left_out_with_a_warning() -> None:
    model, witness = _pypi()
    model(inputs(4, 5, 7, 6, dtype=torch.float32)).sum().backward()
    optimizer = SINGD(_net(), **OPTIONS)
    with pytest.warns(UserWarning, match="between backward and step"):
        from_singd(witness, optimizer)


# ---------------------------------------------------------------- refused


def _drop(entry: str) -> Callable[[dict[str, Any]], None]:
    def damage(saved: dict[str, Any]) -> None:
        del saved[entry]["3"]

    return damage


def _swap(saved: dict[str, Any]) -> None:
    saved["Ks"]["3"] = saved["Ks"]["5"]


def _dense_as_toeplitz(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["structures"] = ("triltoeplitz", "dense")


def _momentum_shape(saved: dict[str, Any]) -> None:
    saved["state"][2]["momentum_buffer"] = torch.zeros(3)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not_pypi": (lambda saved: saved.pop("Ks"), r"\['Ks'\].*not one of PyPI"),
    "missing_layer": (_drop("Ks"), r"layers differ.*\['3'\] in the optimizer only"),
    "missing_C": (_drop("Cs"), "has no C of layer '3'"),
    "missing_momentum": (_drop("m_Ks"), "has no m_K of layer '3'"),
    "shape": (_swap, r"K of layer '3' has shape \(33, 33\).*\(205, 205\)"),
    "structure": (_dense_as_toeplitz, "structures=.*triltoeplitz"),
    "groups": (lambda saved: saved["param_groups"].append({}), "2 parameter groups"),
    "parameters": (lambda saved: saved["param_groups"][0]["params"].pop(), "4 parameters"),
    "momentum_shape": (_momentum_shape, "'3.weight'.*'momentum_buffer' has shape"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_state_that_does_not_fit_is_refused_and_nothing_changes(damage: str) -> None:
    _, witness = _pypi()
    saved = copy.deepcopy(witness.state_dict())
    change, message = REFUSED[damage]
    change(saved)
    model = _net()
    optimizer = SINGD(model, **OPTIONS)
    _train(model, optimizer, range(1))
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(from_singd(saved, optimizer))
    assert_bitwise(snapshot(model, optimizer), before)


def test_entry_off_the_structure_is_refused() -> None:
    _, witness = _pypi(structures=("diagonal", "dense"))
    saved = witness.state_dict()
    saved["param_groups"][0]["structures"] = ("dense", "dense")
    optimizer = SINGD(_net(), structures=("diagonal", "dense"), **OPTIONS)
    with pytest.raises(ValueError, match=r"structures=.*'dense'"):
        from_singd(saved, optimizer)


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="got int"):
        from_singd(3, SINGD(_net(), **OPTIONS))
