"""Convolutions as linear layers over patches, with as few patches in memory as possible.

The rows of a convolution's input are its unfolded patches, averaged over channel groups, with
features ordered as in `weight.flatten(1)`. Sums of patches over all output positions need only how
often every kernel offset k reads every input position i: one small matrix per spatial dimension.
Of transposed convolutions, the features are ordered as in `TransposedKind.matrix`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transposed_convolution import ConvTranspose, output_sizes, read_count, stuffed

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

# Elements of the largest patch matrix that is formed at once.
_PATCH_ELEMENTS = 1 << 22


def padding_of(conv: Conv) -> list[tuple[int, int]]:
    """Return (left, right) padding of every spatial dimension."""
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    if conv.padding == "same":
        totals = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in conv.padding]


def averaged_patches(conv: Conv | ConvTranspose, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the patches averaged over output positions, [batch, features] (KFAC-reduce)."""
    x = average_groups(conv, x, dtype).to(dtype)
    counts, positions = _read_counts(conv, x)
    sums = _contract(x.flatten(0, 1), counts)
    return sums.reshape(x.shape[0], x.shape[1] * prod(sums.shape[1:])) / positions


def summed_patch_energies(conv: Conv | ConvTranspose, energies: Tensor) -> tuple[Tensor, int]:
    """Return sums over output positions of squared patch entries, [features], and their number.

    Args:
        conv: The layer.
        energies: Squared inputs summed over the batch, [channels / groups, *spatial].
    """
    counts, positions = _read_counts(conv, energies.unsqueeze(0))
    return _contract(energies, counts).flatten(), positions


def average_groups(conv: Conv | ConvTranspose, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the input [batch, channels, *spatial], averaged in `dtype` if there are groups."""
    if conv.groups == 1:
        return x
    return x.unflatten(1, (conv.groups, -1)).mean(1, dtype=dtype)


def patch_chunks(conv: Conv | ConvTranspose, x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield patches [samples, positions, features] of a few samples at a time (KFAC-expand).

    Positions are in the order of the output; those of transposed convolutions in reverse.
    """
    x = average_groups(conv, x, dtype)
    if isinstance(conv, ConvTranspose):
        x, strides = stuffed(conv, x), (1,) * len(conv.kernel_size)
    else:
        x, strides = _padded(conv, x), conv.stride
    for dim, (kernel, stride, dilation) in enumerate(
        zip(conv.kernel_size, strides, conv.dilation, strict=True), start=2
    ):
        # [..., size, ..., earlier kernel offsets] -> [..., out, ..., offsets, kernel]
        x = x.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    spatial = len(conv.kernel_size)
    positions = prod(x.shape[2 : 2 + spatial])
    features = prod(x.shape[2 + spatial :]) * x.shape[1]
    order = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)]
    samples = max(1, _PATCH_ELEMENTS // max(1, positions * features))
    for chunk in x.permute(order).split(samples):
        yield chunk.reshape(chunk.shape[0], positions, features)


def _padded(conv: Conv, x: Tensor) -> Tensor:
    pads = padding_of(conv)
    if not any(left or right for left, right in pads):
        return x
    flat = [p for left_right in reversed(pads) for p in left_right]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, flat, mode=mode)


def _contract(x: Tensor, counts: list[Tensor]) -> Tensor:
    """[n, *spatial] with one matrix [kernel, size] per spatial dimension -> [n, *kernel]."""
    for count in counts:  # tensordot moves the new kernel dimension to the end
        x = torch.tensordot(x, count.to(x), dims=([1], [1]))
    return x


def _read_counts(conv: Conv | ConvTranspose, x: Tensor) -> tuple[list[Tensor], int]:
    """Return the matrices of `_contract` for inputs like x, and the number of output positions."""
    if isinstance(conv, ConvTranspose):
        outputs = output_sizes(conv, x)
        arguments = zip(
            x.shape[2:],
            outputs,
            conv.kernel_size,
            conv.stride,
            map(int, conv.padding),
            conv.dilation,
            strict=True,
        )
        return [read_count(*sizes) for sizes in arguments], prod(outputs)
    results = [
        _read_count(size, kernel, stride, *pads, dilation, conv.padding_mode)
        for size, kernel, stride, pads, dilation in zip(
            x.shape[2:],
            conv.kernel_size,
            conv.stride,
            padding_of(conv),
            conv.dilation,
            strict=True,
        )
    ]
    return [count for count, _ in results], prod(positions for _, positions in results)


@lru_cache(maxsize=256)
def _read_count(
    size: int, kernel: int, stride: int, left: int, right: int, dilation: int, mode: str
) -> tuple[Tensor, int]:
    """Return how often kernel offset k reads position i, [kernel, size], and the output size."""
    outputs = (size + left + right - dilation * (kernel - 1) - 1) // stride + 1
    reads = torch.arange(outputs) * stride + torch.arange(kernel).unsqueeze(1) * dilation - left
    inside = (reads >= 0) & (reads < size)
    if mode == "circular":
        reads = reads % size
    elif mode == "replicate":
        reads = reads.clamp(0, size - 1)
    elif mode == "reflect":
        reads = reads.abs()
        reads = torch.where(reads >= size, 2 * (size - 1) - reads, reads)
    else:
        reads = torch.where(inside, reads, 0)
    weight = inside.double() if mode == "zeros" else torch.ones_like(reads, dtype=torch.double)
    return torch.zeros(kernel, size, dtype=torch.double).scatter_add_(1, reads, weight), outputs
