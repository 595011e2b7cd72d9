"""Rows of inputs and output gradients of a layer, from explicit index arithmetic.

A layer is brought to samples x shared positions x features: the shared positions of a linear layer
are its middle dimensions, those of a convolution its output positions.
"""

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SUPPORTED = (nn.Linear, *CONVOLUTIONS)


def padding_left(module: nn.Module, dim: int) -> int:
    """How many positions a convolution adds before the first one of a spatial dimension."""
    if module.padding == "valid":
        return 0
    if module.padding == "same":  # an odd total leaves the larger half on the right
        return module.dilation[dim] * (module.kernel_size[dim] - 1) // 2
    return module.padding[dim]


def source_position(position: int, size: int, padding_mode: str) -> int | None:
    """Which input position a position of the padded input shows; None is a zero."""
    if 0 <= position < size:
        return position
    if padding_mode == "zeros":
        return None
    if padding_mode == "circular":
        return position % size
    if padding_mode == "replicate":
        return 0 if position < 0 else size - 1
    if padding_mode == "reflect":
        return -position if position < 0 else 2 * (size - 1) - position
    raise ValueError(f"padding mode {padding_mode!r}")


def take(x: Tensor, dim: int, positions: list[int | None]) -> Tensor:
    """Gather positions along a dimension; None gives zeros."""
    columns = [
        torch.zeros_like(x.select(dim, 0)) if p is None else x.select(dim, p) for p in positions
    ]
    return torch.stack(columns, dim)


def patches(module: nn.Module, x: Tensor, output_size: tuple[int, ...]) -> Tensor:
    """Unfold the input of a convolution into [samples, output positions, c_in / groups * kernel].

    Channel groups are averaged; features are ordered like ``module.weight.flatten(1)``.
    """
    x = x.unflatten(1, (module.groups, -1)).mean(1)
    for dim, outputs in enumerate(output_size):
        # dimension 2 holds the first spatial dimension not yet unfolded; [kernel, output] pairs
        # go to the end, so that every turn leaves the next one in its place
        columns = []
        for k in range(module.kernel_size[dim]):
            start = k * module.dilation[dim] - padding_left(module, dim)
            sources = [
                source_position(start + o * module.stride[dim], x.shape[2], module.padding_mode)
                for o in range(outputs)
            ]
            columns.append(take(x, 2, sources))
        x = torch.stack(columns, 2).movedim((2, 3), (-2, -1))
    dims = len(output_size)
    kernel_dims = [2 + 2 * dim for dim in range(dims)]
    output_dims = [3 + 2 * dim for dim in range(dims)]
    x = x.permute(0, *output_dims, 1, *kernel_dims)
    return x.flatten(1 + dims).flatten(1, dims)


def output_positions(module: nn.Module, y: Tensor) -> Tensor:
    """Bring an output (or its gradient) to [samples, shared positions, features]."""
    if isinstance(module, nn.Linear):
        return (
            y.reshape(1, 1, -1) if y.dim() == 1 else y.flatten(1, -2) if y.dim() > 2 else y[:, None]
        )
    y = y if y.dim() == module.weight.dim() else y[None]
    return y.flatten(2).transpose(1, 2)


def input_positions(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Bring an input to [samples, shared positions, features], without the bias column."""
    if isinstance(module, nn.Linear):
        return output_positions(module, x)
    x, y = (t if t.dim() == module.weight.dim() else t[None] for t in (x, y))
    return patches(module, x, y.shape[2:])


def input_rows(module: nn.Module, x: Tensor, y: Tensor, kfac_approx: str) -> Tensor:
    """X: rows x d_i. A live bias is a last column of ones; without a live weight it is all."""
    rows = input_positions(module, x, y)
    rows = rows.mean(1) if kfac_approx == "reduce" else rows.flatten(0, 1)
    ones = rows.new_ones(rows.shape[0], 1)
    columns = [rows] if module.weight.requires_grad else []
    if module.bias is not None and module.bias.requires_grad:
        columns.append(ones)
    return torch.cat(columns, 1)


def gradient_rows(module: nn.Module, g: Tensor, kfac_approx: str) -> Tensor:
    """g: rows x d_o."""
    rows = output_positions(module, g)
    return rows.sum(1) if kfac_approx == "reduce" else rows.flatten(0, 1)


def loss_terms(module: nn.Module, y: Tensor, loss_average: str | None) -> int:
    """Over how many terms the loss takes its mean."""
    samples, positions, _ = output_positions(module, y).shape
    return {None: 1, "batch": samples, "batch+sequence": samples * positions}[loss_average]


def as_matrix(module: nn.Module, grad: bool = False) -> Tensor:
    """The live parameters (or their gradients) as one d_o x d_i matrix, the bias last."""
    columns = []
    for parameter in (module.weight, module.bias):
        if parameter is not None and parameter.requires_grad:
            value = parameter.grad if grad else parameter.detach()
            columns.append(value.reshape(value.shape[0], -1))
    return torch.cat(columns, 1)


def write_matrix(module: nn.Module, matrix: Tensor) -> None:
    """The inverse of ``as_matrix`` for the parameters."""
    if module.bias is not None and module.bias.requires_grad:
        module.bias.data.copy_(matrix[:, -1])
    if module.weight.requires_grad:
        columns = module.weight[0].numel()
        module.weight.data.copy_(matrix[:, :columns].reshape(module.weight.shape))
