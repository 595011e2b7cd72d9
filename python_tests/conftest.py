"""Set-up of all tests."""

from collections.abc import Iterator

import backends
import pytest
import torch

# For tensors as small as those of the tests, waking a second thread costs more than it saves.
# Tests that are about threads take the fixture below.
torch.set_num_threads(1)


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test set the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=backends.BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on every backend of the operators; those that are not here are skipped."""
    reason = backends.missing(request.param)
    if reason:
        pytest.skip(f"backend {request.param}: {reason}")
    with backends.use(request.param):
        yield request.param
