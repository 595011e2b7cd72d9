"""How a layer's input meets its output gradient: in eager, checkpointed and compiled models.

Whoever observes gives `observe` an output and an input; its `receive` gets the input and the output
gradient once the backward pass comes by.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import _C


class Receiver(Protocol):
    """Takes what one call of a layer contributes."""

    key: int  # from `register`

    def receive(self, x: Tensor, g: Tensor, backward_pass: int, /) -> None:
        """Take the input, the output gradient and the backward pass that they belong to."""


def observe(output: Tensor, x: Tensor, receiver: Receiver, active: bool) -> None:
    """Deliver x and the gradient of `output` to the receiver when a backward pass comes by.

    The hook is one of the tensor, so that in-place operations may follow. x is kept as autograd
    keeps what it saves: saved-tensor hooks apply, and it is let go with the graph.

    Args:
        output: Of the layer; part of a graph.
        x: Input of the layer.
        receiver: Gets both, without grad mode; held weakly. Within a reentrant checkpoint's segment
            its backward pass is the one that runs the segment again, so that all segments count as
            the one that they are.
        active: False only keeps x as an active call does, and delivers nothing: a checkpointed
            segment must save the same tensors when it is run again.
    """
    _C.observe(output, x, receiver, active)


# Layers that multiply their input itself: autocast casts it. A class with a forward of its own may
# do something else to it before.
_MULTIPLY_INPUT = (
    nn.Linear.forward,
    nn.Conv1d.forward,
    nn.Conv2d.forward,
    nn.Conv3d.forward,
)
# Where autograd keeps what a product multiplies.
_SAVED_BY = {
    "AddmmBackward0": "_saved_mat1",
    "MmBackward0": "_saved_self",
    "ConvolutionBackward0": "_saved_input",
}
# What may come after it: shapes, and the bias of strided rows.
_AFTERWARDS = ("ViewBackward0", "UnsafeViewBackward0", "AddBackward0")


def multiplies_input(module: nn.Module) -> bool:
    """Whether autocast's copy of the module's input may stand for the input."""
    return type(module).forward in _MULTIPLY_INPUT


def cast_input(output: Tensor, x: Tensor) -> Tensor:
    """Return the copy of x, in a lower precision, that autograd keeps beside it under autocast.

    Keeping x as well would cost twice as much memory as autograd's copy does. x itself is returned
    where there is no such copy, or where saved-tensor hooks decide what is kept.

    Args:
        output: Of a layer that `multiplies_input`, or of `F.linear`.
        x: Its input.
    """
    if output.dtype == x.dtype or torch._C._autograd._top_saved_tensors_default_hooks(False):
        return x
    node = output.grad_fn
    while node is not None and node.name() in _AFTERWARDS:
        node = node.next_functions[0][0]
    if node is None or node.name() not in _SAVED_BY:
        return x
    saved = getattr(node, _SAVED_BY[node.name()])
    if not isinstance(saved, Tensor) or saved.dtype != output.dtype:
        return x
    if saved.shape == x.shape:
        return saved.detach()
    is_flat = saved.numel() == x.numel() and saved.shape[-1] == x.shape[-1]
    return saved.detach().view(x.shape) if is_flat and saved.is_contiguous() else x


# ---------------------------------------------------------------- compiled models

# torch.compile traces neither hooks with side effects nor weak references. There, the receiver is
# the number `key`, and an operator that the compiler cannot look into makes the delivery.
_RECEIVERS: weakref.WeakValueDictionary[int, Receiver] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


def register(receiver: Receiver) -> int:
    """Return a key by which compiled code finds the receiver as long as it lives."""
    key = next(_KEYS)
    _RECEIVERS[key] = receiver
    return key


def observe_traced(output: Tensor, x: Tensor, key: int) -> Tensor:
    """Return a stand-in for `output`, while `torch.compile` traces the model."""
    return _Observed.apply(output, x, key)


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, key: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.key = key
        return output.clone()  # views could not be changed in place; the compiler fuses the copy

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.singd_observation.delivered(g, x, ctx.key), None, None


def _delivered(g: Tensor, x: Tensor, key: int) -> Tensor:
    """Deliver, and return a copy of g, without which the call would be dropped as unused."""
    receiver = _RECEIVERS.get(key)
    if receiver is not None:
        with torch.no_grad():
            receiver.receive(x, g, torch._C._current_graph_task_id())
    return g.clone()


# Not a `torch.library.custom_op`: its implementation cannot ask autograd about parameters. The
# namespace is not that of the operators in csrc, which all devices have.
torch.library.define("singd_observation::delivered", "(Tensor g, Tensor x, int key) -> Tensor")
torch.library.impl("singd_observation::delivered", "CompositeExplicitAutograd", _delivered)


@torch.library.register_fake("singd_observation::delivered")
def _(g: Tensor, x: Tensor, key: int) -> Tensor:
    return torch.empty_like(g)
