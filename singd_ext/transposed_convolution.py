"""What a transposed convolution reads: the patches of its input with zeros between the numbers.

Output position q is the sum over kernel offsets k of the input position p with
p · stride = q + padding - k · dilation times the weight at k, where there is such a p.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def output_sizes(conv: ConvTranspose, x: Tensor) -> list[int]:
    """Return the output's spatial sizes for an input [batch, channels, *spatial]."""
    return [
        (size - 1) * stride - 2 * int(padding) + dilation * (kernel - 1) + extra + 1
        for size, stride, padding, dilation, kernel, extra in zip(
            x.shape[2:],
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.kernel_size,
            conv.output_padding,
            strict=True,
        )
    ]


def stuffed(conv: ConvTranspose, x: Tensor) -> Tensor:
    """Return the input whose windows of stride 1 are the patches, the last output's first.

    Zeros lie between and around the numbers. All is in reverse order, so that the windows have the
    order of the weight.
    """
    pads: list[int] = []
    for dim in range(x.ndim - 1, 1, -1):
        i = dim - 2
        reach, padding = conv.dilation[i] * (conv.kernel_size[i] - 1), int(conv.padding[i])
        x = x.unsqueeze(dim + 1)
        x = F.pad(x, [0, 0] * (x.ndim - dim - 2) + [0, conv.stride[i] - 1]).flatten(dim, dim + 1)
        # The zeros that follow the last number count as padding.
        right = reach - padding + conv.output_padding[i] - (conv.stride[i] - 1)
        pads += [reach - padding, right]
    return F.pad(x, pads).flip(list(range(2, x.ndim)))


@lru_cache(maxsize=256)
def read_count(
    size: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """Return how often kernel offset k reads position p, [kernel, size]: once or never."""
    writes = torch.arange(size) * stride - padding + torch.arange(kernel).unsqueeze(1) * dilation
    return ((writes >= 0) & (writes < outputs)).double()
