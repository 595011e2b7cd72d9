"""The preconditioned layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter, UninitializedParameter

from . import ops
from .kinds import LayerKind, Statistic
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
    index: int = -1  # among those that the gatherer knows
    tied: dict[str, nn.Module] = field(default_factory=dict)  # further modules with the same W
    parameters: list[Parameter] = field(init=False)  # those trained; the first has the state
    due: bool = False  # whether compiled models observe it at the moment
    home: tuple[torch.dtype, torch.device] = field(init=False)  # of the parameters, as last seen
    dim_K: int = field(init=False)  # d_i: input features, plus one for a bias
    dim_C: int = field(init=False)  # d_o
    is_plain: bool = field(init=False)  # whether the parameters are in W as they are
    is_copied: bool = field(init=False)  # whether W holds a copy of the weight, to be written back
    product_K: FactorProduct = field(default_factory=FactorProduct)
    product_C: FactorProduct = field(default_factory=FactorProduct)

    def __post_init__(self) -> None:
        self.parameters = [p for p in (self.weight, self.bias) if p is not None]
        self.home = (self.parameters[0].dtype, self.parameters[0].device)
        self.is_plain = type(self.kind).matrix is LayerKind.matrix
        with torch.no_grad():
            views = [self.view(i, p) for i, p in enumerate(self.parameters)]
        columns = 0 if self.weight is None else views[0][0].numel()
        self.dim_K, self.dim_C = columns + (self.bias is not None), views[0].shape[0]
        storages = {t.untyped_storage().data_ptr() for t in (self.parameters[0], views[0])}
        self.is_copied = len(storages) > 1
        if self.is_copied and type(self.kind).write_back is LayerKind.write_back:
            raise TypeError(
                f"layer '{self.name}': {type(self.kind).__name__}.matrix returns a copy of the "
                "parameter, whose update would be lost: return a view, or override write_back"
            )

    @property
    def holds_parameters(self) -> bool:
        """Whether its modules hold the parameters themselves, as "weight" and "bias"."""
        return type(self.kind).parameters is LayerKind.parameters

    def forget(self) -> None:
        """Drop what belongs to the original and not to a copy of it."""
        self.due = False

    @property
    def modules(self) -> list[nn.Module]:
        """All modules that use W."""
        return [self.module, *self.tied.values()]

    def described(self) -> str:
        """Return its type and the roles of its parameters, for messages."""
        roles = [key for key, p in (("weight", self.weight), ("bias", self.bias)) if p is not None]
        return f"{type(self.module).__name__} with {' and '.join(roles)}"

    def overlaps(self, other: Layer, index: int) -> bool:
        """Whether the other layer's parameter number `index` has numbers that are in W too."""
        parameter = other.parameters[index]
        mine = next((i for i, p in enumerate(self.parameters) if p is parameter), None)
        if mine is None:
            return False
        a, b = self.view(mine, parameter.detach()), other.view(index, parameter.detach())
        first, last = sorted((a, b), key=Tensor.storage_offset)
        return last.storage_offset() < first.storage_offset() + first.numel()

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
        if self.is_plain:
            return tensor
        key = "bias" if index == 1 or self.weight is None else "weight"
        return self.kind.matrix(self.module, tensor, key)

    def accumulate_(
        self,
        module: nn.Module,
        state: State,
        x: Tensor,
        g: Tensor,
        structures: tuple[str, str],
        reduce: bool,
    ) -> tuple[int, int]:
        """Add input x and output gradient g of a module's call; return (batch, shared) sizes.

        Args:
            module: One of `modules`.
            state: The layer's entries, with statistics.
            x, g: Of the call.
            structures: Of K and of C.
            reduce: KFAC-reduce.
        """
        rows = self.kind.gradient_rows(module, g)
        ops.accumulate_statistic_(
            state["statistic_C"],
            rows,
            state["C"],
            self.dim_C,
            structures[1],
            shared="sum" if reduce else "expand",
        )
        to_K = Statistic(
            state["statistic_K"], state["K"], self.dim_K, structures[0], self.bias is not None
        )
        if self.weight is None:  # only the bias is trained: its input is the column of ones
            to_K.add(rows[..., :0], "mean" if reduce else "expand")
        else:
            self.kind.accumulate_input_(module, to_K, x, reduce)
        return rows.shape[0], rows.shape[1]


def find_layers(model: nn.Module, params: Iterable[Any], group: int) -> list[Layer]:
    """Return the layers of `model` that train any of the given parameters.

    Modules of one kind that share all their parameters are one layer.

    Raises:
        ValueError: If layers share a parameter in another way, or one is uninitialised or empty;
            the message names the layers.
    """
    trained = {id(p) for p in params if p.requires_grad}
    owners: dict[int, list[Layer]] = {}
    layers = []
    for name, module, kind in supported_modules(model):
        own = {key: p for key, p in kind.parameters(module).items() if id(p) in trained}
        if not own:
            continue
        for key, parameter in own.items():
            _check_parameter(f"{name}.{key}", parameter)
        layer = Layer(name, module, kind, own.get("weight"), own.get("bias"), group)
        overlapping = [
            other
            for i, parameter in enumerate(layer.parameters)
            for other in owners.get(id(parameter), [])
            if other.overlaps(layer, i)
        ]
        if overlapping:
            _tie(overlapping[0], layer)
            continue
        for parameter in layer.parameters:
            owners.setdefault(id(parameter), []).append(layer)
        layers.append(layer)
    return layers


def _check_parameter(name: str, parameter: Parameter) -> None:
    if isinstance(parameter, UninitializedParameter):
        raise ValueError(f"parameter '{name}' is uninitialised: run a forward pass first")
    if parameter.numel() == 0:
        raise ValueError(
            f"parameter '{name}' of shape {tuple(parameter.shape)} is empty and cannot be trained; "
            "exclude it with `params`"
        )


def _tie(layer: Layer, other: Layer) -> None:
    """Make the module of another layer one more of this layer, if both have the same W."""
    same = layer.weight is other.weight and layer.bias is other.bias
    if not same or layer.kind is not other.kind:
        raise ValueError(
            f"layers '{layer.name}' ({layer.described()}) and '{other.name}' "
            f"({other.described()}) share a parameter, but not all of [weight, bias]: K and C "
            "belong to both. Let them share weight and bias, have both without bias, or leave "
            "the parameters that differ, or the shared one, out of `params`"
        )
    layer.tied[other.name] = other.module
