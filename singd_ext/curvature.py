"""Hooks that gather the curvature statistics of every layer during backward passes.

A forward hook on the module puts a hook on its *output tensor*, which sees the output gradient even
if an in-place activation follows. The statistics live in the optimizer's state from the first
backward pass of a step to the factor update that consumes them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from . import _C, ops
from .attention import AttentionHook, Projection
from .kinds import LayerKind, has_linear_rows
from .layers import Layer
from .moves import check_owned, follow
from .observation import cast_input, multiplies_input, observe_traced, register

if TYPE_CHECKING:
    from .optimizer import SINGD


class OutputHook:
    """Forward hook of one layer.

    It holds the optimizer weakly. Copies and pickles of the model carry a hook that does nothing:
    only the model that the optimizer was built for is observed.
    """

    def __init__(
        self,
        optimizer: SINGD | None = None,
        layer: Layer | None = None,
        module: nn.Module | None = None,
    ) -> None:
        self._optimizer: Callable[[], SINGD | None] = (
            weakref.ref(optimizer) if optimizer is not None else lambda: None
        )
        self._layer, self._module = layer, module
        self._may_cast = module is not None and multiplies_input(module)
        self._receiver: _C.LayerReceiver | None = None
        if optimizer is not None and layer is not None:
            is_first = type(layer.kind).call_input is LayerKind.call_input
            self._receiver = _C.LayerReceiver(optimizer._gatherer, layer.index, self, is_first)
        self.key = register(self)

    def __reduce__(self) -> tuple[type[OutputHook], tuple[()]]:
        return OutputHook, ()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        if is_compiling():
            return self._traced(args, kwargs, output)
        if self._receiver is not None:
            self._receiver.watch(args, kwargs, output)
        return None

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        layer = self._layer
        if layer is None or not torch.is_grad_enabled():
            return None
        self.check_output(output)
        if not layer.due or not output.requires_grad:
            return None
        return observe_traced(output, layer.kind.call_input(args, kwargs).detach(), self.key)

    def check_output(self, output: Any) -> None:
        """Check what the module returned.

        Raises:
            TypeError: Naming the layer, if it is no tensor.
        """
        if self._layer is not None and not isinstance(output, Tensor):
            raise TypeError(
                f"layer '{self._layer.name}' returns {type(output).__name__}; SINGD needs layers "
                "that return a tensor: exclude this one with `params`"
            )

    def wants(self) -> SINGD | None:
        """Return the optimizer if the next factor update needs the forward pass that runs."""
        optimizer = self._optimizer()
        if optimizer is None or self._layer is None:
            return None
        optimizer.settle_steps()
        return optimizer if optimizer.factors_due(self._layer.group) else None

    def marked_due(self) -> bool:
        """Whether compiled models are to be observed at the moment."""
        return self._layer is not None and self._layer.due

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Return the input of a call, where that may be another than the first argument."""
        assert self._layer is not None
        x = self._layer.kind.call_input(args, kwargs)
        return cast_input(output, x) if self._may_cast else x

    def receive(self, x: Tensor, g: Tensor, backward_pass: int, /) -> None:
        """Add one call's input and output gradient to the layer's statistics."""
        if self._receiver is not None:
            self._receiver.receive(x, g, backward_pass)

    def add_rows(self, x: Tensor, g: Tensor) -> tuple[int, int]:
        """Add the rows of a layer other than Linear; return its (batch, shared) sizes."""
        optimizer = self._optimizer()
        assert optimizer is not None and self._layer is not None and self._module is not None
        options = optimizer._checked[self._layer.group]  # since the pass began
        state = self._layer.entries(optimizer.state)
        reduce = options.kfac_approx == "reduce"
        return self._layer.accumulate_(self._module, state, x, g, options.structures, reduce)


def gatherer_of(optimizer: SINGD) -> _C.Gatherer:
    """Return what gathers the statistics of an optimizer's layers, of which it knows none yet."""
    return _C.Gatherer(optimizer, ops.namespace, follow, check_owned)


def gather(optimizer: SINGD, layer: Layer) -> None:
    """Let the gatherer know of a layer."""
    structures = optimizer._checked[layer.group].structures
    is_linear = layer.weight is not None and has_linear_rows(layer.kind)
    layer.index = optimizer._gatherer.add(layer, *structures, is_linear)


def tell_options(optimizer: SINGD, group: int) -> None:
    """Tell the gatherer a group's options, which have been checked.

    It looks for changes before each backward pass and step, and asks `SINGD.options` about them.
    """
    options = vars(optimizer._checked[group])
    optimizer._gatherer.set_options(group, optimizer.param_groups[group], options)


def install_hooks(optimizer: SINGD, layers: Iterable[Layer]) -> list[RemovableHandle]:
    """Observe layers, until the handles are removed."""
    handles = []
    attention: dict[nn.MultiheadAttention, dict[str, OutputHook]] = {}
    for layer, module in [(la, module) for la in layers for module in la.modules]:
        hook = OutputHook(optimizer, layer, module)
        if isinstance(layer.kind, Projection):
            assert isinstance(module, nn.MultiheadAttention)
            attention.setdefault(module, {})[layer.kind.name] = hook
        else:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    for module, hooks in attention.items():
        handles += AttentionHook(hooks).install(module)
    return handles


def remove(handles: list[RemovableHandle]) -> None:
    """Remove hooks, and the handles from their list."""
    for handle in handles:
        handle.remove()
    handles.clear()
