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
from torch.utils.hooks import RemovableHandle

from . import _C
from .attention import AttentionHook, Projection
from .layers import Layer, State
from .moves import follow
from .observation import (
    accumulates,
    cast_input,
    multiplies_input,
    observe,
    observe_traced,
    register,
)

if TYPE_CHECKING:
    from .optimizer import SINGD

# The entries of a layer's state that hold its statistics: sums over the backward passes so far.
STATISTICS = ("statistic_K", "statistic_C", "rows", "loss_terms")


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
        self.key = register(self)

    def __reduce__(self) -> tuple[type[OutputHook], tuple[()]]:
        return OutputHook, ()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        layer = self._layer
        if layer is None or not torch.is_grad_enabled():
            return None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer '{layer.name}' returns {type(output).__name__}; SINGD needs layers that "
                "return a tensor: exclude this one with `params`"
            )
        if torch.compiler.is_compiling():
            if layer.due and output.requires_grad:
                return observe_traced(
                    output, layer.kind.call_input(args, kwargs).detach(), self.key
                )
            return None
        if output.requires_grad and (optimizer := self.wants()) is not None:
            x = layer.kind.call_input(args, kwargs)
            if self._may_cast:
                x = cast_input(output, x)
            observe(output, x, self, active=not optimizer.is_paused)
        return None

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

    def receive(self, x: Tensor, g: Tensor, backward_pass: int, /) -> None:
        """Add one call's input and output gradient to the layer's statistics."""
        optimizer = self._optimizer()
        if optimizer is None or optimizer.is_paused:
            return
        if self._layer is not None and self._module is not None:
            _accumulate(optimizer, self._layer, self._module, x, g, backward_pass)


def _accumulate(
    optimizer: SINGD, layer: Layer, module: nn.Module, x: Tensor, g: Tensor, backward_pass: int
) -> None:
    options = optimizer.options_in_pass(layer.group, backward_pass)
    reduce = options.kfac_approx == "reduce"
    state = layer.entries(optimizer.state)
    if not _begin_pass(optimizer, layer, state, backward_pass):
        return
    if "statistic_K" not in state:
        sums = _C.empty_statistics(state["K"], state["C"])
        state["statistic_K"], state["statistic_C"] = sums
    batch, shared = layer.accumulate_(module, state, x, g, options.structures, reduce)
    state["rows"] = state.get("rows", 0) + batch * (min(1, shared) if reduce else shared)
    _count_loss_terms(layer, state, options.loss_average, batch, shared)


def _begin_pass(optimizer: SINGD, layer: Layer, state: State, backward_pass: int) -> bool:
    """Note the current backward pass; return whether it counts.

    It does if it adds to the layer's gradients. Where earlier passes have left none, these were
    cleared (by `model.zero_grad()`, say), and their statistics go the same way.
    """
    if backward_pass != layer.last_pass:
        layer.last_pass, layer.counted_terms = backward_pass, 0
        layer.pass_counts = accumulates(layer.parameters)
        follow(optimizer, layer)
        if (
            layer.pass_counts
            and "statistic_K" in state
            and all(p.grad is None for p in layer.parameters)
        ):
            drop_statistics(state)
    return layer.pass_counts


def _count_loss_terms(
    layer: Layer, state: State, loss_average: str | None, batch: int, shared: int
) -> None:
    """Add up the terms that the loss averages over, so that micro-batches make one big batch.

    Uses of a layer within one backward pass see the same terms: they are counted once. A loss that
    is a sum has the factor 1, however many passes there are.
    """
    if loss_average is None:
        state["loss_terms"] = 1
        return
    terms = batch * shared if loss_average == "batch+sequence" else batch
    more = max(0, terms - layer.counted_terms)
    state["loss_terms"] = state.get("loss_terms", 0) + more
    layer.counted_terms += more


def install_hooks(optimizer: SINGD, layers: Iterable[Layer]) -> list[RemovableHandle]:
    """Observe layers; the handles' `remove` ends it."""
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


def drop_statistics(state: State) -> None:
    """Forget what was gathered for a layer."""
    for name in STATISTICS:
        state.pop(name, None)
