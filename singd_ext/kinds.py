"""How each type of module looks to the algorithm: its parameters, inputs and output gradients.

Every layer type is brought to one layout: W is [d_o, ...], inputs and output gradients are rows
[batch, shared, features], where `shared` runs over the positions that share the weight (sequence,
pixels).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from . import _C, ops
from .convolution import (
    Conv,
    average_groups,
    averaged_patches,
    patch_chunks,
    summed_patch_energies,
)
from .transposed_convolution import ConvTranspose


class Statistic(NamedTuple):
    """What the calls of a layer add up for one factor; see `ops.accumulate_statistic_`."""

    sums: Tensor
    factor: Tensor
    dim: int
    structure: str
    ones_column: bool = False  # every row is followed by a 1, for the bias

    def add(self, rows: Tensor, shared: str = "expand") -> None:
        """Add rows [batch, shared, features]; `shared` says what becomes of that dimension."""
        ops.accumulate_statistic_(
            self.sums,
            rows,
            self.factor,
            self.dim,
            self.structure,
            ones_column=self.ones_column,
            shared=shared,
        )


class LayerKind(ABC):
    """How one type of module looks to the algorithm. Shapes are those of a single call.

    Kinds have no state of their own: one serves all modules of its type.
    """

    prefix = ""  # of the entries in a parameter's state, where several layers share the parameter

    def parameters(self, module: nn.Module) -> dict[str, Parameter]:
        """Return what makes up W = [weight, bias], under these two names; one may be missing.

        By default the module's own parameters of these names.
        """
        own = module._parameters
        return {key: p for key in ("weight", "bias") if (p := own.get(key)) is not None}

    def check(self, name: str, module: nn.Module, structures: tuple[str, str]) -> None:  # noqa: B027
        """Raise ValueError, naming the layer, if it cannot have these structures of K and C."""

    def matrix(self, module: nn.Module, tensor: Tensor, key: str) -> Tensor:
        """Return the layer's part of W as a view: [d_o, ...] of the weight, [d_o] of the bias.

        A copy of the weight will do if `write_back` is overridden.

        Args:
            module: The layer.
            tensor: The parameter, its gradient or its momentum.
            key: "weight" or "bias".
        """
        return tensor

    def write_back(self, module: nn.Module, tensor: Tensor, matrix: Tensor) -> None:
        """Write what `matrix` returned for the weight, or its momentum, back to it.

        Called after a step if that was a copy.
        """
        raise NotImplementedError

    def call_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the input x of a call; by default its first argument."""
        return args[0] if args else next(iter(kwargs.values()))

    @abstractmethod
    def gradient_rows(self, module: nn.Module, g: Tensor) -> Tensor:
        """Return the output gradient as rows [batch, shared, d_o], without copying where it can."""

    @abstractmethod
    def accumulate_input_(
        self, module: nn.Module, statistic: Statistic, x: Tensor, reduce: bool
    ) -> None:
        """Add the rows of input x to K's statistic; `reduce` is KFAC-reduce."""


class LinearKind(LayerKind):
    """`nn.Linear` with any leading dimensions: the first is the batch, the others are shared."""

    def gradient_rows(self, module: nn.Module, g: Tensor) -> Tensor:
        return _C.linear_rows(g)

    def accumulate_input_(
        self, module: nn.Module, statistic: Statistic, x: Tensor, reduce: bool
    ) -> None:
        rows = self.gradient_rows(module, x)  # inputs and outputs have the same layout
        statistic.add(rows, "mean" if reduce else "expand")


def has_linear_rows(kind: LayerKind) -> bool:
    """Whether inputs and output gradients become rows as those of `nn.Linear` do."""
    return (
        type(kind).gradient_rows is LinearKind.gradient_rows
        and type(kind).accumulate_input_ is LinearKind.accumulate_input_
    )


class Conv1DKind(LinearKind):
    """Hugging Face's Conv1D: a linear layer with a weight of [input, output] features."""

    def matrix(self, module: nn.Module, tensor: Tensor, key: str) -> Tensor:
        return tensor.t() if key == "weight" else tensor


class ConvKind(LayerKind):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: output positions are shared, patches are the rows.

    KFAC-reduce never forms patches, nor does KFAC-expand with a diagonal K.
    """

    def gradient_rows(self, module: nn.Module, g: Tensor) -> Tensor:
        return self._batched(module, g).flatten(2).transpose(1, 2)

    def accumulate_input_(
        self, module: nn.Module, statistic: Statistic, x: Tensor, reduce: bool
    ) -> None:
        assert isinstance(module, Conv | ConvTranspose)
        x, dtype = self._batched(module, x), statistic.sums.dtype
        if statistic.structure == "diagonal" and not reduce:
            pixels = average_groups(module, x, dtype)
            energies = torch.zeros(prod(pixels.shape[1:]), dtype=dtype, device=x.device)
            Statistic(energies, energies, energies.numel(), "diagonal").add(
                pixels.flatten(1).unsqueeze(0)
            )
            sums, positions = summed_patch_energies(module, energies.view(pixels.shape[1:]))
            statistic.sums[: sums.numel()] += sums
            if statistic.ones_column:
                statistic.sums[-1] += positions * x.shape[0]
            return
        for rows in (
            [averaged_patches(module, x, dtype).unsqueeze(1)]
            if reduce
            else patch_chunks(module, x, dtype)
        ):
            statistic.add(rows)

    @staticmethod
    def _batched(module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, Conv | ConvTranspose)
        return x.unsqueeze(0) if x.ndim == len(module.kernel_size) + 1 else x


class TransposedKind(ConvKind):
    """`nn.ConvTranspose1d`, `nn.ConvTranspose2d`, `nn.ConvTranspose3d`: as `ConvKind`.

    W is [output channels, input channels / groups, *kernel], the mirrored kernel of a convolution.
    """

    def matrix(self, module: nn.Module, tensor: Tensor, key: str) -> Tensor:
        assert isinstance(module, ConvTranspose)
        if key == "bias":
            return tensor
        return self._grouped(module, tensor).flatten(0, 1)  # seldom a view if there are groups

    def write_back(self, module: nn.Module, tensor: Tensor, matrix: Tensor) -> None:
        view = self._grouped(module, tensor)
        view.copy_(matrix.view_as(view))

    def call_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        output_size = kwargs.get("output_size", args[1] if len(args) > 1 else None)
        if output_size is not None:
            raise ValueError(
                f"a transposed convolution was called with output_size={output_size}, which SINGD "
                "does not support: set the layer's output_padding, or exclude it with `params`"
            )
        return super().call_input(args, kwargs)

    @staticmethod
    def _grouped(module: nn.Module, tensor: Tensor) -> Tensor:
        """Return the weight as a view [groups, outputs / groups, inputs / groups, *kernel]."""
        assert isinstance(module, ConvTranspose)
        return tensor.unflatten(0, (module.groups, -1)).transpose(1, 2)
