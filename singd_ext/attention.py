"""`nn.MultiheadAttention` as four linear layers: projections of query, key and value, and output.

It calls `torch.nn.functional.multi_head_attention_forward` with its parameters, so that no hook of
a module sees the projections. While it runs in a forward pass that is to be observed, a torch
function mode runs the same function with a `linear` that observes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.overrides import TorchFunctionMode

from .kinds import LinearKind
from .observation import cast_input, observe, register

if TYPE_CHECKING:
    from .curvature import OutputHook

# Functions of torch.nn.functional that call `linear` for a MultiheadAttention.
_FUNCTIONS = ("multi_head_attention_forward", "_in_projection", "_in_projection_packed")

# Read where torch.compile is given fullgraph=True.
_EAGER = (
    "SINGD observes nn.MultiheadAttention in eager mode: compile the model without fullgraph=True, "
    "or leave the attention's parameters out of `params`"
)


class Projection(LinearKind):
    """Inputs and outputs within the function are [sequence, batch, features]."""

    name: str  # in `PROJECTIONS`

    def gradient_rows(self, module: nn.Module, g: Tensor) -> Tensor:
        return g.transpose(0, 1)


class InProjection(Projection):
    """The projection of query, key or value: a third of the packed weight, or one of its own."""

    def __init__(self, name: str) -> None:
        self.name, self.index, self.prefix = name, "qkv".index(name), f"{name}."

    def parameters(self, module: nn.Module) -> dict[str, Parameter]:
        assert isinstance(module, nn.MultiheadAttention)
        own = getattr(module, f"{self.name}_proj_weight")
        weight = own if module.in_proj_weight is None else module.in_proj_weight
        named = {"weight": weight, "bias": module.in_proj_bias}
        return {key: p for key, p in named.items() if isinstance(p, Parameter)}

    def matrix(self, module: nn.Module, tensor: Tensor, key: str) -> Tensor:
        if key == "weight" and module.in_proj_weight is None:
            return tensor
        rows = tensor.shape[0] // 3
        return tensor.narrow(0, self.index * rows, rows)


class OutProjection(Projection):
    """The output projection, a Linear that is not called."""

    name = "out_proj"

    def parameters(self, module: nn.Module) -> dict[str, Parameter]:
        assert isinstance(module, nn.MultiheadAttention)
        return super().parameters(module.out_proj)


PROJECTIONS = {
    kind.name: kind for kind in (*map(InProjection, "qkv"), OutProjection())
}  # of every MultiheadAttention


class AttentionHook:
    """Observes the projections of one MultiheadAttention by a mode that lives during its forward.

    Copies and pickles of the model carry a hook that does nothing, as they do of `OutputHook`.
    """

    def __init__(self, hooks: dict[str, OutputHook] | None = None) -> None:
        q, k, v, out = ((hooks or {}).get(name) for name in PROJECTIONS)
        # Torch computes those of one input together.
        self.receivers = {
            names: _Receiver(parts)
            for names, parts in {
                "q": [q], "k": [k], "v": [v], "kv": [k, v], "qkv": [q, k, v], "out_proj": [out],
            }.items()
            if any(parts)
        }  # fmt: skip
        self.current: _Observing | None = None  # not one that an interrupt has left behind

    def __reduce__(self) -> tuple[type[AttentionHook], tuple[()]]:
        return AttentionHook, ()

    def before(self, module: nn.MultiheadAttention, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: observe what comes, if it is to be."""
        if not torch.is_grad_enabled():
            return
        # Compiled code leaves the graph where a step is due, and only there.
        if not torch.compiler.is_compiling() or self._marked_due():
            self._begin(module)

    def _marked_due(self) -> bool:
        return any(receiver.marked_due() for receiver in self.receivers.values())

    @torch.compiler.disable(reason=_EAGER)
    def _begin(self, module: nn.MultiheadAttention) -> None:
        due = {name: r for name, r in self.receivers.items() if r.is_due()}
        if due:
            self.current = _Observing(self, module, due)
            self.current.__enter__()

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook that is always called: put back the modes as they were."""
        if not torch.compiler.is_compiling() or self._marked_due():
            self._end()

    @torch.compiler.disable(reason=_EAGER)
    def _end(self) -> None:
        modes = torch.overrides._get_current_function_mode_stack()
        own = [i for i, m in enumerate(modes) if isinstance(m, _Observing) and m.hook is self]
        if own:  # modes above it were left by what was interrupted
            for _ in modes[own[0] :]:
                torch.overrides._pop_mode()

    def install(self, module: nn.MultiheadAttention) -> list[torch.utils.hooks.RemovableHandle]:
        """Return the handles whose `remove` ends the observation."""
        return [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]


class _Receiver:
    """Gets input and output gradient of projections that are computed together."""

    def __init__(self, hooks: Sequence[OutputHook | None]) -> None:
        self._hooks = hooks
        self.first = next(hook for hook in hooks if hook is not None)  # all have one group
        self.key = register(self)

    def is_due(self) -> bool:
        return self.first.wants() is not None

    def marked_due(self) -> bool:
        return self.first.marked_due()

    def receive(self, x: Tensor, g: Tensor, backward_pass: int, /) -> None:
        for hook, part in zip(self._hooks, g.chunk(len(self._hooks), -1), strict=True):
            if hook is not None:
                hook.receive(x, part, backward_pass)


class _Observing(TorchFunctionMode):
    """Runs `multi_head_attention_forward` with a `linear` that observes."""

    def __init__(
        self, hook: AttentionHook, module: nn.MultiheadAttention, receivers: dict[str, _Receiver]
    ) -> None:
        super().__init__()
        self.hook = hook
        self._module, self._receivers = module, receivers
        self._batch = 1  # of the last projected query

    @torch.compiler.disable(reason=_EAGER)
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and self.hook.current is self:
            # In the copy of the function that another group or optimizer runs.
            return self._linear(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            # Torch's own code. Other modes go on seeing all that it calls.
            names = {**vars(F), "linear": self._linear, "has_torch_function": lambda tensors: False}
            for name in _FUNCTIONS:
                names[name] = _with_globals(vars(F)[name], names)
            func = names[func.__name__]
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(input, weight, bias)
        x = cast_input(output, input.detach())
        name = self._name(weight)
        if name == "out_proj":  # it comes as [sequence * batch, features]
            x = x.unflatten(0, (-1, self._batch))
            observed = output.unflatten(0, (-1, self._batch))
            output = observed.flatten(0, 1)
        else:
            observed = output
        if name.startswith("q"):
            self._batch = x.shape[1]
        receiver = self._receivers.get(name)
        if receiver is not None and observed.requires_grad:
            optimizer = receiver.first.wants()
            if optimizer is not None:
                observe(observed, x, receiver, active=not optimizer.is_paused)
        return output

    def _name(self, weight: Tensor) -> str:
        """Return which projections a weight makes, "" if none of the module's."""
        module = self._module
        if weight is module.out_proj.weight:
            return "out_proj"
        packed = module.in_proj_weight
        if packed is None:
            own = ((name, getattr(module, f"{name}_proj_weight")) for name in "qkv")
            return next((name for name, p in own if weight is p), "")
        if weight is packed:
            return "qkv"
        if weight._base is not packed:
            return ""
        rows = packed.shape[0] // 3
        first = (weight.storage_offset() - packed.storage_offset()) // packed.stride(0) // rows
        return "qkv"[first : first + weight.shape[0] // rows]


def _with_globals(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
