"""The preconditioned layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter, UninitializedParameter

from . import ops
from .kinds import LayerKind
from .memory import FactorProduct
from .registry import supported_modules

State = MutableMapping[str, Any]


class Entries(State):
    """The entries of a parameter's state whose keys begin with a prefix, without the prefix."""

    def __init__(self, state: State, prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def __getitem__(self, key: str) -> Any:
        return self._state[self._prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._state[self._prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self._state[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (k.removeprefix(self._prefix) for k in self._state if k.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


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
    dim_K: int = field(init=False)  # d_i: input features, plus one for a bias
    dim_C: int = field(init=False)  # d_o
    product_K: FactorProduct = field(default_factory=FactorProduct)
    product_C: FactorProduct = field(default_factory=FactorProduct)

    def __post_init__(self) -> None:
        self.home = (self.parameters[0].dtype, self.parameters[0].device)
        with torch.no_grad():
            views = [self.view(i, p) for i, p in enumerate(self.parameters)]
        columns = 0 if self.weight is None else views[0][0].numel()
        self.dim_K, self.dim_C = columns + (self.bias is not None), views[0].shape[0]

    def forget(self) -> None:
        """Drop what belongs to the original and not to a copy of it."""
        self.last_pass = -1
        self.due = False
        self.product_K, self.product_C = FactorProduct(), FactorProduct()

    @property
    def parameters(self) -> list[Parameter]:
        """The trained parameters; the layer's state is kept with the first."""
        return [p for p in (self.weight, self.bias) if p is not None]

    def entries(self, state: dict[Tensor, dict[str, Any]]) -> State:
        """Return the layer's part of an optimizer's state: all but the momentum buffers."""
        own = state[self.parameters[0]]
        return Entries(own, self.kind.prefix) if self.kind.prefix else own

    def view(self, index: int, tensor: Tensor) -> Tensor:
        """Return the layer's part of W as a view of its parameter number `index`.

        Args:
            index: Of `parameters`.
            tensor: The parameter, its gradient or its momentum.
        """
        key = "bias" if index == 1 or self.weight is None else "weight"
        return self.kind.matrix(self.module, tensor, key)

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
        own = {key: p for key, p in kind.parameters(module).items() if id(p) in trained}
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
