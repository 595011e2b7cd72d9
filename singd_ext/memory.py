"""Memory that is kept from step to step, so that a steady step allocates nothing.

None of it is state: it can be recomputed, and is not saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C, incidents
from .incidents import Incidents


class Workspace:
    """Memory that calls may overwrite. Calls that follow one another share it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._device = self._memory.device  # kept: a tensor makes a new object each time

    def on(self, device: torch.device) -> Tensor:
        """Return it, on the device that is asked for; operators enlarge it in place."""
        if self._device != device:
            self._memory = self._memory.new_empty(0, device=device)
            self._device = device
        return self._memory


class CallMemory:
    """Outcomes and workspace of the calls of one operator for one parameter group."""

    def __init__(self, workspace: Workspace) -> None:
        self._outcomes = torch.empty(0, dtype=torch.int64)
        self._like = (0, self._outcomes.device)  # layers and device of the outcomes
        self._workspace = workspace

    def of(self, arguments: _C.LayerLists) -> tuple[Tensor, Tensor]:
        """Return (outcomes, workspace) for a call with these lists."""
        count = len(arguments)
        like = count, device = count, arguments.device if count else self._like[1]
        if like != self._like:
            self._outcomes, self._like = self._outcomes.new_empty(count, device=device), like
        return self._outcomes, self._workspace.on(device)


class SparseProducts:
    """Memory in which the CPU keeps K Kᵀ and C Cᵀ of sparse factors from one step to the next."""

    def __init__(self) -> None:
        self._memory = Workspace()
        self._factors = _C.KnownFactors()

    def of(self, arguments: _C.StepArguments, device: torch.device) -> Tensor:
        """Return it for a call: empty, if K and C are not those of the last, or were updated."""
        memory = self._memory.on(device)
        return memory if self._factors.are_all_of(arguments) else memory.resize_(0)


class GroupCalls:
    """What belongs to the calls of both operators for one parameter group."""

    def __init__(self, warned: set[str]) -> None:
        workspace = Workspace()
        self.factors, self.parameters = CallMemory(workspace), CallMemory(workspace)
        self.products = SparseProducts()
        self.factor_incidents = Incidents(incidents.FACTORS, warned)
        self.parameter_incidents = Incidents(incidents.PARAMETERS, warned)


def keeps_product(dim: int, other: int, steps: int, dtype: torch.dtype) -> bool:
    """Whether K Kᵀ of a dense or triangular factor is kept from step to step.

    Making it takes about 2/3 dim³ multiply-adds on a CPU, which makes one triangle. In every step
    it saves one product of K with a matrix of dim x other. Few steps, with a narrow matrix, are not
    worth it. In bfloat16 and float16 it is never kept: rounded so, it need not be positive
    definite, and training diverged, where K (Kᵀ G) did as well as factors in float32.

    Args:
        dim: Of K.
        other: The dimension of the layer's other factor.
        steps: From one update of K to the next, T.
        dtype: Of K.
    """
    return dtype.itemsize >= 4 and 3 * steps * other >= 2 * dim


class FactorProduct:
    """K Kᵀ of a dense or triangular factor: it changes every T steps, and is needed in each."""

    def __init__(self) -> None:
        self._product = torch.empty(0)
        self._factor = _C.KnownFactors()

    def __reduce__(self) -> tuple[type[FactorProduct], tuple[()]]:
        """Copies have none yet."""
        return FactorProduct, ()

    def of(self, factor: Tensor, dim: int) -> Tensor:
        """Return K Kᵀ [dim, dim] in K's dtype."""
        if not self._factor.are([factor]):
            self._product = torch.empty(0)  # which means none, should there be no memory for it
            square = factor.view(dim, dim)
            on_cpu = square.device.type == "cpu"
            self._product = _C.cpu_times_its_transpose(square) if on_cpu else square @ square.T
        return self._product


NO_PRODUCT = torch.empty(0)  # holds the place of one that is not kept
