"""Several observers of one MultiheadAttention, and attention in compiled models."""

from collections.abc import Callable

import pytest
import torch
from nets import OPTIONS, inputs
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from singd_ext import SINGD

pytestmark = [
    pytest.mark.filterwarnings("error"),
    # Of torch.compile itself; it reads `grad` of what it resumes with after a graph break.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)


def encoder_layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0, dtype=torch.float64)


def to_itself(module: nn.MultiheadAttention) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x, x, x)[0]


def train(forward: Callable[[Tensor], Tensor], *optimizers: SINGD, steps: int = 4) -> None:
    for seed in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        forward(inputs(3, 5, 8, seed=seed)).square().mean().mul(8).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert not _get_current_function_mode_stack()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def dense_factors(*optimizers: SINGD) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (K.to_dense(), C.to_dense())
        for optimizer in optimizers
        for name, (K, C) in optimizer.factors().items()
    }


def assert_moved(factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, pair in factors.items():
        for factor in pair:
            identity = torch.eye(len(factor), dtype=factor.dtype)
            assert (factor - identity).abs().max() > 1e-3, name


def split(module: nn.MultiheadAttention) -> list[list[nn.Parameter]]:
    """The parameters that go into the attention, and those that come out."""
    out = list(module.out_proj.parameters())
    return [[p for p in module.parameters() if all(p is not o for o in out)], out]


def in_two_groups(module: nn.MultiheadAttention) -> list[SINGD]:
    return [SINGD(module, [{"params": params} for params in split(module)], **OPTIONS)]


def in_an_added_group(module: nn.MultiheadAttention) -> list[SINGD]:
    first, second = split(module)
    optimizer = SINGD(module, first, **OPTIONS)
    optimizer.add_param_group({"params": second})
    return [optimizer]


def by_two_optimizers(module: nn.MultiheadAttention) -> list[SINGD]:
    return [SINGD(module, params, **OPTIONS) for params in split(module)]


@pytest.mark.parametrize("divided", [in_two_groups, in_an_added_group, by_two_optimizers])
def test_parts_of_an_attention_may_be_trained_apart(
    divided: Callable[[nn.MultiheadAttention], list[SINGD]],
) -> None:
    whole, parts = attention(), attention()
    one, several = SINGD(whole, **OPTIONS), divided(parts)
    train(to_itself(whole), one)
    train(to_itself(parts), *several)
    assert_moved(dense_factors(one))
    torch.testing.assert_close(dense_factors(*several), dense_factors(one), rtol=0, atol=0)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=0)


def test_parts_whose_factors_are_due_at_different_steps() -> None:
    module, reference = attention(), attention()
    first, second = split(module)
    optimizer = SINGD(
        module, [{"params": first, "T": 2}, {"params": second, "T": 3}], **{**OPTIONS, "lr": 0.0}
    )
    train(to_itself(module), optimizer, steps=4)
    expected = {}
    for T in (2, 3):  # weights stay, so that factors do not depend on those of other layers
        alone = SINGD(reference, split(reference)[T - 2], **{**OPTIONS, "lr": 0.0, "T": T})
        train(to_itself(reference), alone, steps=4)
        alone.remove_hooks()
        expected |= dense_factors(alone)
    torch.testing.assert_close(dense_factors(optimizer), expected, rtol=1e-12, atol=1e-13)


# -------------------------------------------------------------------- compiled models


@pytest.mark.parametrize("T", [1, 3])
def test_compiled_model_equals_eager(T: int) -> None:
    eager, compiled = encoder_layer(), encoder_layer()
    options = {**OPTIONS, "T": T, "lr_cov": 0.02}
    names = [n for n, _ in eager.named_parameters() if not n.startswith("norm")]
    runs = []
    for model in (eager, compiled):
        params = [model.get_parameter(name) for name in names]
        runs.append(SINGD(model, params, **options))
    torch._dynamo.reset()
    train(eager, runs[0])
    train(torch.compile(compiled, backend="aot_eager"), runs[1])
    assert_moved({k: v for k, v in dense_factors(runs[1]).items() if k.endswith("out_proj")})
    torch.testing.assert_close(
        dense_factors(runs[1]), dense_factors(runs[0]), rtol=1e-12, atol=1e-13
    )
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=1e-12, atol=1e-13)


def test_full_graph_is_refused_with_the_remedy() -> None:
    module = attention()
    optimizer = SINGD(module, **OPTIONS)
    torch._dynamo.reset()
    forward = torch.compile(to_itself(module), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="without fullgraph=True"):
        forward(inputs(3, 5, 8))
    optimizer.remove_hooks()
    torch._dynamo.reset()
    forward(inputs(3, 5, 8))


def test_exception_in_a_compiled_model_leaves_no_mode() -> None:
    module = attention()
    optimizer = SINGD(module, **OPTIONS)
    torch._dynamo.reset()
    forward = torch.compile(to_itself(module), backend="aot_eager")
    with pytest.raises(Exception, match="embedding dimension of 8"):
        forward(inputs(3, 5, 7))
    assert not _get_current_function_mode_stack()
    train(forward, optimizer)
    assert_moved(dense_factors(optimizer))
