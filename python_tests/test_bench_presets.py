"""The models that the bench trains, and those of the user."""

from pathlib import Path

import pytest
import torch
from bench_runs import CPU, run
from torch import nn

from singd_ext.bench import presets
from singd_ext.bench.contender import DTYPES, Setting

FACTORY = """
import torch
from torch import nn
from singd_ext.bench.presets import Task

def batch():
    return torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,))

def net():
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3))

def make():
    return net(), batch, nn.functional.cross_entropy

def make_task():
    model = net()
    return Task(model, batch, nn.functional.cross_entropy, "a net", trained=[model[3]])

def wrong():
    return net()

def broken():
    import no_such_module

number = 1
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_module_of_the_bench.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    return "user_module_of_the_bench"


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("vit-b", 86_567_656),
        ("resnet50", 25_557_032),
    ],
)
def test_presets_are_the_published_networks(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        model = presets.preset(preset).model
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("preset", ["tiny", "gpt2-small", "vit-b"])
def test_transformers_train_the_linear_layers_of_the_blocks(preset: str) -> None:
    task = presets.preset(preset, small=True)
    names = task.trained_names()
    blocks = len(task.model.blocks)
    layers = ("qkv", "project", "expand", "contract")
    expected = [
        f"blocks.{block}.{layer}.{part}"
        for block in range(blocks)
        for layer in layers
        for part in ("weight", "bias")
    ]
    assert sorted(names) == sorted(expected)


def test_resnet_trains_convolutions_and_classifier() -> None:
    task = presets.preset("resnet50", small=True)
    modules = {name.rpartition(".")[0] for name in task.trained_names()}
    assert modules == {
        name for name, m in task.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    }


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_causal_models_alone_hide_the_future(preset: str) -> None:
    task = presets.preset(preset, small=True)
    inputs, targets = task.batch()
    output = task.model.eval()(inputs)
    assert task.loss(output, targets).isfinite()
    if task.loss_average == "batch+sequence":
        changed = inputs.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 16
        other = task.model(changed)
        assert torch.equal(other[:, :-1], output[:, :-1])
        assert not torch.equal(other[:, -1], output[:, -1])


def test_batch_can_be_chosen() -> None:
    assert len(presets.preset("tiny", batch=3).batch()[0]) == 3
    with pytest.raises(ValueError, match="batch is 0"):
        presets.preset("tiny", batch=0)
    with pytest.raises(ValueError, match="no preset 'huge'; presets are tiny"):
        presets.preset("huge")


def test_seeds_give_the_weights_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    built = [
        presets.build("tiny", None, small=True, batch=None, seed=seed)[1].model.state_dict()
        for seed in (3, 3, 4)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])
    assert any(not torch.equal(built[0][name], built[2][name]) for name in built[0])


def test_a_factory_of_the_user(user_module: str) -> None:
    changes = {"model": f"{user_module}:make", "small": False, "dtypes": DTYPES}
    rows, notes = run(**changes)
    assert {row.labels["preset"] for row in rows} == {f"{user_module}:make"}
    assert {row.labels["dtype"] for row in rows} == set(DTYPES)
    assert any("Sequential" in note for note in notes)
    assert presets.load(f"{user_module}:make_task").trained_names() == ["3.weight", "3.bias"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "must be like 'module:factory'"),
        ("no_such_module:make", "no module 'no_such_module'"),
        ("{}:absent", "has no 'absent'"),
        ("{}:wrong", "must return .* not Sequential"),
    ],
)
def test_a_wrong_factory_is_named(user_module: str, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.load(spec.format(user_module))


def test_an_error_of_the_user_is_shown_as_it_is(user_module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        presets.load(f"{user_module}:broken")


def test_a_model_without_layers_is_refused() -> None:
    task = presets.Task(nn.Embedding(3, 3), lambda: None, lambda: None, "an embedding")
    with pytest.raises(ValueError, match="an embedding: no layer"):
        Setting(task, "fp32", CPU, seed=0)
