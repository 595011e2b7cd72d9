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
    found_inf = getattr(optimizer, "found_inf", None)
    gradient = getattr(optimizer, "grad_scale", None)
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
    the step. Looking for one code object costs about 50 ns a frame, and reads no device.
    """
    frame = sys._getframe().f_back
    while frame is not None:
        if frame.f_code is _SCALER_STEP:
            scaler = frame.f_locals["self"]
            return scaler._get_scale_async() if scaler.is_enabled() else None
        frame = frame.f_back
    return None


def is_set_on_host(flag: Tensor | None) -> bool:
    """Whether a flag is known to be set without waiting for a device."""
    return flag is not None and flag.device.type == "cpu" and flag.item() != 0
