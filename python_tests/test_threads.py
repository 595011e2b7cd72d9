"""The operators on several threads give what they give on one, and repeat bit for bit."""

import pytest
import torch
from reference import masks
from torch import Tensor, nn

from singd_ext import SINGD


def train(spec: str, threads: int) -> Tensor:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 260), nn.Tanh(), nn.Linear(260, 10)).double()
    optimizer = SINGD(net, lr=0.01, lr_cov=0.05, T=1, structures=(spec, spec))
    for _ in range(3):
        optimizer.zero_grad()
        x, y = torch.randn(200, 300, dtype=torch.float64), torch.randint(10, (200,))
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("spec", masks.SPECS)
def test_threads(spec: str, threads: None) -> None:
    one, four, again = train(spec, 1), train(spec, 4), train(spec, 4)
    torch.testing.assert_close(four, one, rtol=1e-11, atol=1e-13)
    assert torch.equal(four, again)
