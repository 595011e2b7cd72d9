"""Checkpoints: plain, loaded with weights_only, resumed bit for bit, refused if they do not fit."""

import copy
import io
from typing import Any

import pytest
import torch
from checkpoints import assert_same_tree, make
from nets import (
    OPTIONS,
    assert_bitwise,
    backward,
    inputs,
    mlp,
    snapshot,
    statistics_names,
    train,
    trained,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from singd_ext import SINGD

pytestmark = [pytest.mark.filterwarnings("error")]

VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "block_and_hierarchical": {"structures": ("block_diagonal:2", "hierarchical:1,1")},
    "toeplitz_and_rank": {"structures": ("triu_toeplitz", "rank_tril:1")},
    "middle_of_T": {"T": 4},
    "ikfac": {"kfac_like": True, "alpha1": 0.0},
    "no_momentum": {"momentum": 0.0, "alpha1": 0.0},
    "normalized": {"normalize_lr_cov": True, "expm_order": 2},
    "bfloat16": {"dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 3},
    "float32_factors_of_bfloat16": {
        "dtype": torch.bfloat16,
        "preconditioner_dtype": (torch.float32, torch.float32),
    },
    "float64_and_bfloat16_factors_of_float32": {
        "dtype": torch.float32,
        "preconditioner_dtype": (torch.float64, torch.bfloat16),
    },
    "list_of_structures": {"structures": ["diagonal", "tril"]},
    "tensor_lr": {"lr": torch.tensor(0.05)},
}


def _through_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _assert_plain(value: Any) -> None:
    """Nothing but tensors and builtins, of exactly those types."""
    if type(value) is dict:
        for key, entry in value.items():
            assert type(key) in (str, int)
            _assert_plain(entry)
    elif type(value) in (list, tuple):
        for entry in value:
            _assert_plain(entry)
    else:
        allowed = (Tensor, bool, int, float, str, type(None), torch.dtype)
        assert type(value) in allowed, f"{type(value)}: {value!r}"


# -------------------------------------------------------------------- saving and resuming


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_holds_only_tensors_and_builtins(variant: str) -> None:
    model, optimizer = make(**VARIANTS[variant])
    train(model, optimizer, range(2))
    backward(model, optimizer, inputs(dtype=model[0].weight.dtype))
    _assert_plain(optimizer.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_run_resumes_bit_for_bit(variant: str) -> None:
    model, optimizer = make(**VARIANTS[variant])
    train(model, optimizer, range(3))
    saved = _through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(3, 6))

    resumed, resumed_optimizer = make(net=1, **VARIANTS[variant])
    train(resumed, resumed_optimizer, [9])  # what it held before is replaced
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    train(resumed, resumed_optimizer, range(3, 6))
    assert_bitwise(snapshot(resumed, resumed_optimizer), snapshot(model, optimizer))
    assert_same_tree(resumed_optimizer.state_dict(), optimizer.state_dict())


def test_run_saved_between_backward_and_step_resumes_bit_for_bit() -> None:
    model, optimizer = make()
    train(model, optimizer, [0])
    backward(model, optimizer, inputs(seed=1))
    grads = [p.grad.clone() for p in model.parameters()]
    saved = _through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    resumed, resumed_optimizer = make(net=1)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    for p, grad in zip(resumed.parameters(), grads, strict=True):
        p.grad = grad
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        o.step()
        train(m, o, [2])
    assert_bitwise(snapshot(resumed, resumed_optimizer), snapshot(model, optimizer))


def test_zero_grad_drops_the_statistics_that_were_loaded() -> None:
    model, optimizer = make()
    backward(model, optimizer, inputs())
    saved = _through_file(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.load_state_dict(saved)
    assert statistics_names(optimizer)
    optimizer.zero_grad()
    assert not statistics_names(optimizer)


def test_several_groups_resume_with_their_own_options() -> None:
    def make() -> tuple[nn.Sequential, SINGD]:
        model = mlp()
        groups = [
            {"params": model[0].parameters(), "structures": ("diagonal", "tril"), "T": 2},
            {"params": model[2].parameters(), "lr": 0.01, "momentum": 0.0},
        ]
        return model, SINGD(model, params=groups, **OPTIONS)

    model, optimizer = make()
    train(model, optimizer, range(3))
    optimizer.param_groups[1]["damping"] = 0.1
    saved = _through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, resumed_optimizer = make()
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    assert resumed_optimizer.param_groups[1]["damping"] == 0.1
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        train(m, o, range(3, 6))
    assert_bitwise(snapshot(resumed, resumed_optimizer), snapshot(model, optimizer))


def test_counters_of_rejected_updates_survive() -> None:
    model, optimizer = make()
    backward(model, optimizer, inputs())
    model[0].weight.grad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="gradient"):
        optimizer.step()
    _, resumed = make()
    resumed.load_state_dict(_through_file(optimizer.state_dict()))
    assert resumed.rejections() == optimizer.rejections() == {"0": (0, 1), "2": (0, 0)}


class Schedule:
    """An lr_cov schedule that remembers its calls."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, step: int) -> float:
        self.steps.append(step)
        return 0.1 / (1 + step)


def test_lr_cov_function_is_not_saved_but_kept() -> None:
    schedule = Schedule()
    model, optimizer = make(lr_cov=schedule)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    _assert_plain(saved)
    assert optimizer.param_groups[0]["lr_cov"] is schedule

    own = Schedule()
    resumed, resumed_optimizer = make(lr_cov=own)
    loaded = _through_file(saved)
    resumed_optimizer.load_state_dict(loaded)
    assert loaded["param_groups"][0]["lr_cov"] is None  # the caller's dict stays as it was
    assert resumed_optimizer.param_groups[0]["lr_cov"] is own
    resumed.load_state_dict(model.state_dict())
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        train(m, o, [2, 3])
    assert own.steps == [2, 3]
    assert_bitwise(snapshot(resumed, resumed_optimizer), snapshot(model, optimizer))


def test_numpy_options_are_saved_as_builtins() -> None:
    numpy = pytest.importorskip("numpy")
    _, optimizer = make(lr=numpy.float32(0.25), damping=numpy.float64(0.5), T=numpy.int64(2))
    saved = _through_file(optimizer.state_dict())["param_groups"][0]
    assert (saved["lr"], saved["damping"], saved["T"]) == (0.25, 0.5, 2)


def test_distributed_checkpoint_state_dict_round_trip() -> None:
    model, optimizer = make()
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    saved = get_optimizer_state_dict(model, optimizer)
    assert_bitwise(snapshot(model, optimizer), before)
    resumed, resumed_optimizer = make()
    resumed.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed, resumed_optimizer, saved)
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        train(m, o, [2, 3])
    assert_bitwise(snapshot(resumed, resumed_optimizer), snapshot(model, optimizer))


# -------------------------------------------------------------------- the caller's dict


@pytest.mark.parametrize("variant", ["dense", "float32_factors_of_bfloat16"])
def test_loaded_dict_is_neither_changed_nor_shared(variant: str) -> None:
    model, optimizer = make(**VARIANTS[variant])
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    original = copy.deepcopy(saved)
    resumed, resumed_optimizer = make(**VARIANTS[variant])
    resumed_optimizer.load_state_dict(saved)
    assert_same_tree(saved, original)
    train(resumed, resumed_optimizer, range(3))
    resumed_optimizer.param_groups[0]["lr"] = 9.0
    assert_same_tree(saved, original)


def test_two_optimizers_that_loaded_one_state_train_independently() -> None:
    model, optimizer = make()
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    twin, twin_optimizer = make()
    twin_optimizer.load_state_dict(optimizer.state_dict())
    train(twin, twin_optimizer, range(3))
    assert_bitwise(snapshot(model, optimizer), before)


# -------------------------------------------------------------------- loops, devices


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("variant", ["dense", "toeplitz_and_rank", "float32_factors_of_bfloat16"])
def test_run_resumes_between_any_two_micro_batches_and_steps(variant: str, at: int) -> None:
    """T = 3, two micro-batches a step: saved after `at` of eight halves of a step."""
    options = {**VARIANTS[variant], "T": 3}
    model, optimizer = make(**options)
    dtype = model[0].weight.dtype

    def half(m: nn.Module, o: SINGD, index: int) -> None:
        x = inputs(seed=index, dtype=dtype)
        if index % 2 == 0:
            o.zero_grad()
        (0.5 * (m(x) - 0.7).square().sum() / len(x)).backward()
        if index % 2 == 1:
            o.step()

    for index in range(at):
        half(model, optimizer, index)
    saved = _through_file(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "grads": [p.grad for p in model.parameters()],
        }
    )
    resumed, resumed_optimizer = make(net=1, **options)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    for p, grad in zip(resumed.parameters(), saved["grads"], strict=True):
        p.grad = grad
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        for index in range(at, 10):
            half(m, o, index)
    assert_bitwise(snapshot(resumed, resumed_optimizer), snapshot(model, optimizer))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("map_location", ["cpu", "cuda", None])
def test_state_of_one_device_resumes_on_another(map_location: str | None) -> None:
    model, optimizer = make()
    train(model, optimizer, range(2))
    backward(model, optimizer, inputs(seed=2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(model).cuda()
    resumed_optimizer = SINGD(resumed, **OPTIONS)
    resumed_optimizer.load_state_dict(
        torch.load(file, weights_only=True, map_location=map_location)
    )
    for p, q in zip(resumed.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.cuda()
        for key, value in optimizer.state[q].items():
            if isinstance(value, Tensor):
                assert resumed_optimizer.state[p][key].device.type == "cuda"
                assert torch.equal(resumed_optimizer.state[p][key].cpu(), value)
    for o in (optimizer, resumed_optimizer):
        o.step()
    for p, q in zip(resumed.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("option", ["momentum", "alpha1"])
def test_option_that_was_zero_in_the_state_may_be_set_back(option: str) -> None:
    saved = trained(**{option: 0.0})[1].state_dict()
    model, optimizer = trained([])
    value = optimizer.param_groups[0][option]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][option] == 0
    optimizer.param_groups[0][option] = value
    train(model, optimizer, range(2))
    assert optimizer.rejections() == {"0": (0, 0), "2": (0, 0)}


def test_momentum_of_another_kernel_is_refused_though_the_optimizer_has_none() -> None:
    saved = SINGD(nn.Conv2d(4, 6, (1, 4)), momentum=0.9).state_dict()
    optimizer = SINGD(nn.Conv2d(4, 6, (2, 2)), momentum=0.0)
    with pytest.raises(ValueError, match=r"saved 'momentum_buffer' has shape \(6, 4, 1, 4\)"):
        optimizer.load_state_dict(saved)
