"""Steps on a GPU as a user takes them, without the waiting that the other tests ask for."""

from collections.abc import Iterator

import backends
import pytest
import torch
from torch import nn

from singd_ext import SINGD

pytestmark = pytest.mark.skipif(
    backends.missing("cuda") is not None, reason=f"backend cuda: {backends.missing('cuda')}"
)


@pytest.fixture(params=["cpu", "cuda"])
def default_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of tensors that name none."""
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


def test_cuda_tells_of_a_skipped_layer_in_a_later_step(default_device: str) -> None:
    model = nn.Linear(8, 8, device="cuda")
    optimizer = SINGD(model, structures=("diagonal", "diagonal"), T=1)

    def step(scale: float) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 8, device="cuda")).square().mean().backward()
        model.weight.grad.mul_(scale)
        optimizer.step()
        torch.cuda.synchronize()

    step(1.0)
    before = model.weight.detach().clone()
    step(float("inf"))
    assert torch.equal(model.weight, before)
    with pytest.warns(UserWarning, match="gradient was not finite"):
        step(1.0)
    assert not torch.equal(model.weight, before)
