"""A module's weight, input and output gradient as W, X and g of the algorithm.

Every layer type is brought to one layout: rows [batch, shared, features], where `shared` runs over
the positions that share the weight (sequence, pixels). To add a layer type, write a `LayerKind` and
list it in `KINDS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter, UninitializedParameter

from . import ops
from .convolution import average_groups, averaged_patches, patch_chunks, summed_patch_energies
from .memory import FactorProduct


class LayerKind(ABC):
    """How one type of module looks to the algorithm. Shapes are those of a single call."""

    @abstractmethod
    def gradient_rows(self, module: nn.Module, g: Tensor) -> Tensor:
        """Return the output gradient as rows [batch, shared, d_o], without copying where it can."""

    @abstractmethod
    def accumulate_input_(
        self,
        module: nn.Module,
        statistic: Tensor,
        x: Tensor,
        factor: Tensor,
        dim: int,
        structure: str,
        *,
        ones_column: bool,
        reduce: bool,
    ) -> None:
        """Add the rows of input x to K's statistic (`ops.accumulate_statistic_`)."""


class LinearKind(LayerKind):
    """`nn.Linear` with any leading dimensions: the first is the batch, the others are shared."""

    def gradient_rows(self, module: nn.Module, g: Tensor) -> Tensor:
        if g.ndim == 1:
            g = g.unsqueeze(0)
        return g.reshape(g.shape[0], prod(g.shape[1:-1]), g.shape[-1])

    def accumulate_input_(
        self,
        module: nn.Module,
        statistic: Tensor,
        x: Tensor,
        factor: Tensor,
        dim: int,
        structure: str,
        *,
        ones_column: bool,
        reduce: bool,
    ) -> None:
        ops.accumulate_statistic_(
            statistic,
            self.gradient_rows(module, x),  # inputs and outputs have the same layout
            factor,
            dim,
            structure,
            ones_column=ones_column,
            shared="mean" if reduce else "expand",
        )


class ConvKind(LayerKind):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: output positions are shared, patches are the rows.

    KFAC-reduce never forms patches, nor does KFAC-expand with a diagonal K.
    """

    def gradient_rows(self, module: nn.Module, g: Tensor) -> Tensor:
        return self._batched(module, g).flatten(2).transpose(1, 2)

    def accumulate_input_(
        self,
        module: nn.Module,
        statistic: Tensor,
        x: Tensor,
        factor: Tensor,
        dim: int,
        structure: str,
        *,
        ones_column: bool,
        reduce: bool,
    ) -> None:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        x, dtype = self._batched(module, x), statistic.dtype
        if structure == "diagonal" and not reduce:
            pixels = average_groups(module, x, dtype)
            energies = torch.zeros(prod(pixels.shape[1:]), dtype=dtype, device=x.device)
            ops.accumulate_statistic_(
                energies, pixels.flatten(1).unsqueeze(0), energies, energies.numel(), structure
            )
            sums, positions = summed_patch_energies(module, energies.view(pixels.shape[1:]))
            statistic[: sums.numel()] += sums
            if ones_column:
                statistic[-1] += positions * x.shape[0]
            return
        for rows in (
            [averaged_patches(module, x, dtype).unsqueeze(1)]
            if reduce
            else patch_chunks(module, x, dtype)
        ):
            ops.accumulate_statistic_(
                statistic, rows, factor, dim, structure, ones_column=ones_column
            )

    @staticmethod
    def _batched(module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return x.unsqueeze(0) if x.ndim == len(module.kernel_size) + 1 else x


# Layer types, looked up by isinstance in this order.
KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LinearKind(),
    nn.Conv1d: ConvKind(),
    nn.Conv2d: ConvKind(),
    nn.Conv3d: ConvKind(),
}


@dataclass(eq=False)
class Layer:
    """One preconditioned layer: W = [weight, bias], of which one may be missing or frozen."""

    name: str
    module: nn.Module
    kind: LayerKind
    weight: Parameter | None
    bias: Parameter | None
    group: int  # index of the parameter group
    last_pass: int = -1  # the backward pass that last added to the statistics
    counted_terms: int = 0  # loss terms counted in it
    pass_counts: bool = False  # whether it adds to the layer's gradients
    due: bool = False  # whether compiled models observe it at the moment
    home: tuple[torch.dtype, torch.device] = field(init=False)  # of the parameters, as last seen
    product_K: FactorProduct = field(default_factory=FactorProduct)
    product_C: FactorProduct = field(default_factory=FactorProduct)

    def __post_init__(self) -> None:
        self.home = (self.parameters[0].dtype, self.parameters[0].device)

    def forget(self) -> None:
        """Drop what belongs to the original and not to a copy of it."""
        self.last_pass = -1
        self.due = False
        self.product_K, self.product_C = FactorProduct(), FactorProduct()

    @property
    def parameters(self) -> list[Parameter]:
        """The trained parameters; the layer's state is kept with the first."""
        return [p for p in (self.weight, self.bias) if p is not None]

    @property
    def dim_K(self) -> int:
        """d_i: input features, plus one for a bias."""
        columns = 0 if self.weight is None else self.weight.numel() // len(self.weight)
        return columns + (self.bias is not None)

    @property
    def dim_C(self) -> int:
        """d_o."""
        return self.parameters[0].shape[0]

    def accumulate_(
        self,
        statistic_K: Tensor,
        statistic_C: Tensor,
        x: Tensor,
        g: Tensor,
        factors: tuple[Tensor, Tensor],
        structures: tuple[str, str],
        reduce: bool,
    ) -> tuple[int, int]:
        """Add one call's input x and output gradient g; return its (batch, shared) sizes."""
        rows = self.kind.gradient_rows(self.module, g)
        shared = "sum" if reduce else "expand"
        ops.accumulate_statistic_(
            statistic_C, rows, factors[1], self.dim_C, structures[1], shared=shared
        )
        if self.weight is None:  # only the bias is trained: its input is the column of ones
            ops.accumulate_statistic_(
                statistic_K, rows[..., :0], factors[0], 1, structures[0], ones_column=True,
                shared="mean" if reduce else "expand",
            )  # fmt: skip
        else:
            self.kind.accumulate_input_(
                self.module, statistic_K, x, factors[0], self.dim_K, structures[0],
                ones_column=self.bias is not None, reduce=reduce,
            )  # fmt: skip
        return rows.shape[0], rows.shape[1]


def supported_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerKind]]:
    """Yield (name, module, kind) of the layers that can be preconditioned.

    Submodules of nn.MultiheadAttention are left out: it reads their weights without calling them.
    """
    inside_attention = {
        child
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    for name, module in model.named_modules():
        kind = next((kind for cls, kind in KINDS.items() if isinstance(module, cls)), None)
        if kind is not None and module not in inside_attention:
            yield name, module, kind


def own_parameters(module: nn.Module) -> dict[str, Parameter]:
    """Return the module's "weight" and "bias" where they are parameters of its own."""
    named = dict(module.named_parameters(recurse=False))
    return {key: named[key] for key in ("weight", "bias") if key in named}


def find_layers(model: nn.Module, params: Iterable[Any], group: int) -> list[Layer]:
    """Return the layers of `model` that train any of the given parameters.

    Raises:
        ValueError: If a parameter is shared by two layers, uninitialised or empty; the message
            names the layers.
    """
    trained = {id(p) for p in params if p.requires_grad}
    owner: dict[int, str] = {}
    layers = []
    for name, module, kind in supported_modules(model):
        own = {key: p for key, p in own_parameters(module).items() if id(p) in trained}
        if not own:
            continue
        for key, parameter in own.items():
            if id(parameter) in owner:
                raise ValueError(
                    f"layers '{owner[id(parameter)]}' and '{name}' share the parameter '{key}', "
                    "which cannot be preconditioned; exclude it with `params`"
                )
            owner[id(parameter)] = name
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(
                    f"parameter '{name}.{key}' is uninitialised: run a forward pass first"
                )
            if parameter.numel() == 0:
                raise ValueError(
                    f"parameter '{name}.{key}' of shape {tuple(parameter.shape)} is empty and "
                    "cannot be trained; exclude it with `params`"
                )
        layers.append(Layer(name, module, kind, own.get("weight"), own.get("bias"), group))
    return layers
