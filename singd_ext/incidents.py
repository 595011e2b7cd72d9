"""Warnings of layers that an operator left as they were, or whose step it shortened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._warnings import warn_user

if TYPE_CHECKING:
    from . import _C
    from .layers import Layer

FACTORS = {
    1: "curvature statistics were not finite: the factors stay as they are",
    2: "the step of the factors was shortened to step_cap: lr_cov may be too large",
}
PARAMETERS = {1: "the gradient was not finite: the layer was not updated"}


class Incidents:
    """Reads the outcomes of one operator, call after call, and warns once of each text.

    On a GPU nothing waits for them: a copy starts after the call, and is read after a later call
    once it has arrived. Calls in between are not read; `SINGD.rejections` counts all.
    """

    # Set it to read at once, at the price of waiting for the GPU in every step.
    wait = False

    def __init__(self, texts: Mapping[int, str], warned: set[str]) -> None:
        self._texts = texts  # what a code of the outcomes means
        self._warned = warned  # texts that were given, by whichever parameter group
        self._host = torch.empty(0, dtype=torch.int64, device="cpu")
        self._arrived: torch.cuda.Event | None = None
        self._layers: Sequence[Layer] = []

    def read(self, outcomes: Tensor, call: _C.LayerLists) -> None:
        """Look at the outcomes of a call, one code a layer."""
        if not outcomes.is_cuda or self.wait:
            codes = outcomes.tolist()
            if any(codes):  # in every step: whose they are is not asked before
                self._warn(codes, call.layers)
        elif not torch.cuda.is_current_stream_capturing():
            self._read_late(outcomes, call.layers)

    def _read_late(self, outcomes: Tensor, layers: Sequence[Layer]) -> None:
        if self._arrived is not None:
            if not self._arrived.query():
                return
            self._warn(self._host.tolist(), self._layers)
        if self._host.shape != outcomes.shape:
            self._host = torch.empty(
                outcomes.shape, dtype=torch.int64, device="cpu", pin_memory=True
            )
        self._host.copy_(outcomes, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(outcomes.device))
        self._layers = layers  # not their lists, which hold the gradients

    def _warn(self, outcomes: list[int], layers: Sequence[Layer]) -> None:
        for code, text in self._texts.items():
            of_code = [x.name for x, c in zip(layers, outcomes, strict=True) if c == code]
            if of_code and text not in self._warned:
                self._warned.add(text)
                warn_user(f"layers {of_code}: {text} (further warnings of this kind are not shown)")


class GroupIncidents:
    """Those of both operators for one parameter group."""

    def __init__(self, warned: set[str]) -> None:
        self.factors = Incidents(FACTORS, warned)
        self.parameters = Incidents(PARAMETERS, warned)
