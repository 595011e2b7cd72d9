"""The one tolerance policy of the tests."""

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_close_to_truth(
    ours: Tensor, rival: Tensor, truth: Tensor, factor: float = 2.0, floor: float = 4.0
) -> None:
    """Our error against float64 is at most a small multiple of PyTorch's at the same precision.

    ``rival`` is the same mathematics in PyTorch at the dtype of ``ours``. Where the rival happens
    to be exact, ``floor`` roundings of the largest entry are allowed. A float64 result has no
    rival, since it is as precise as the truth: it may differ by 1e-12 of the largest entry.
    """
    assert ours.shape == truth.shape, f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    truth = truth.double()
    error = (ours.double() - truth).abs().max().item()
    rival_error = (rival.double() - truth).abs().max().item()
    rounding = torch.finfo(ours.dtype).eps * truth.abs().max().item()
    bound = factor * rival_error + floor * rounding
    if ours.dtype == torch.float64:
        bound = 1e-12 * truth.abs().max().item()
    assert error <= bound, (
        f"error {error:.3g} exceeds {bound:.3g}: "
        f"{factor} x the rival's {rival_error:.3g} + {floor} roundings of {rounding:.3g}"
    )


def relative_to_movement(ours: Tensor, truth: Tensor, start: Tensor) -> float:
    """Distance from the truth over the distance that the truth has moved."""
    ours, truth, start = ours.detach().double(), truth.detach().double(), start.detach().double()
    difference, moved = (ours - truth).norm().item(), (truth - start).norm().item()
    if moved == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / moved


def assert_same_trajectory(
    ours: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    rtol: float = 1e-10,
) -> None:
    """Every tensor ended where the truth ended, relative to how far it moved."""
    assert ours.keys() == truth.keys() == start.keys()
    for name in truth:
        error = relative_to_movement(ours[name], truth[name], start[name])
        assert error <= rtol, f"{name} is off by {error:.3g} of its movement, allowed {rtol:.3g}"
