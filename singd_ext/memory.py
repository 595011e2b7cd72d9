"""K Kᵀ of dense factors, which is kept from step to step.

It is not state: it can be recomputed, and is not saved. The rest of what a step keeps is C++'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C


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
