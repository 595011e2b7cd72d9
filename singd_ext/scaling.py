"""By what the gradients and the output gradients of a step were scaled."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

# A subclass that overrides `step` still runs this code, by `super().step`.
_SCALER_STEP = torch.amp.GradScaler.step.__code__


class Scales(NamedTuple):
    """What a gradient scaler knows, as tensors that only the device reads; None without one."""

    found_inf: Tensor | None
    gradient: Tensor | None  # scale of the gradients in `p.grad`
    statistic: Tensor | None  # scale of the output gradients that the hooks saw


def scales_of_step(optimizer: torch.optim.Optimizer, told: float | None) -> Scales:
    """Return the scales of the step that is running; `told` is the user's word, if there is one.

    `GradScaler.step` hands over `found_inf`, and `grad_scale` unless `unscale_` was called before.
    The gradients are unscaled then, and possibly clipped, but the hooks saw scaled ones.

    Raises:
        RuntimeError: If the scale of the statistics cannot be known.
    """
    given = vars(optimizer)  # by a scaler; cheaper than to look for what is not there in classes
    found_inf, gradient = given.get("found_inf"), given.get("grad_scale")
    if told is not None:
        return Scales(found_inf, gradient, torch.tensor(told, dtype=torch.float64))
    statistic = _scale_of_running_scaler() if gradient is None else gradient
    if found_inf is not None and statistic is None:
        raise RuntimeError(
            "the gradients were unscaled before step by a scaler that is not a "
            "torch.amp.GradScaler, which leaves the scale of the curvature unknown: call "
            "optimizer.set_current_grad_scale(scaler.get_scale()) before scaler.step(optimizer)"
        )
    return Scales(found_inf, gradient, statistic)


def _scale_of_running_scaler() -> Tensor | None:
    """Return the scale of the `GradScaler` whose `step` is calling us, None without one.

    After `unscale_`, torch tells an optimizer that its gradients are unscaled, not by how much they
    were scaled; clipping may have changed them since, and a constant in the graph cannot be seen
    from a hook. The scaler itself is alive in a caller's frame, whoever stands in between
    (Lightning, accelerate, a wrapping optimizer), and its scale changes only in `update`, after
    the step. Looking for one code object is cheap, and reads no device.
    """
    frame = sys._getframe().f_back
    while frame is not None:
        if frame.f_code is _SCALER_STEP:
            scaler = frame.f_locals["self"]
            return scaler._get_scale_async() if scaler.is_enabled() else None
        frame = frame.f_back
    return None


class VoidSteps:
    """Steps that a flag on a device may have made void, which the host learns afterwards.

    Reading such a flag waits for the device, so that `step` only starts a copy of it. The steps
    are settled where the answer matters, before the next forward pass.
    """

    def __init__(self) -> None:
        self._flags: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def __len__(self) -> int:
        return len(self._flags)

    def note(self, flag: Tensor) -> None:
        """Remember the flag of the step that was just taken."""
        if flag.device.type != "cuda":
            self._flags.append((flag.clone(), None))
        elif not torch.cuda.is_current_stream_capturing():
            host = torch.empty(flag.shape, dtype=flag.dtype, device="cpu", pin_memory=True)
            host.copy_(flag, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(flag.device))
            self._flags.append((host, arrived))

    def settle(self, keep: int) -> int:
        """Forget all but the last `keep` steps, and return how many of those were void."""
        known, self._flags = self._flags[: len(self) - keep], self._flags[len(self) - keep :]
        for _, arrived in known:
            if arrived is not None:
                arrived.synchronize()
        return sum(flag.item() != 0 for flag, _ in known)


def is_on_host(flag: Tensor) -> bool:
    """Whether a flag is known without waiting for a device."""
    return flag.device.type == "cpu"


def is_set_on_host(flag: Tensor) -> bool:
    """Whether a flag is known to be set without waiting for a device."""
    return is_on_host(flag) and flag.item() != 0
