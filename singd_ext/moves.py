"""What users do to parameters after construction: move, cast, replace, freeze them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .layers import Layer
    from .optimizer import SINGD


def follow(optimizer: SINGD, layer: Layer) -> None:
    """Bring a layer's state to where and what its parameters are now, after `model.to(...)`.

    Momenta take the parameter's dtype. So do factors, unless `preconditioner_dtype` says otherwise
    or they were loaded in another dtype; statistics stay in theirs.
    """
    parameter, before = layer.parameters[0], layer.home[0]
    dtypes = optimizer.options(layer.group).preconditioner_dtype
    for p in layer.parameters:
        state = optimizer.state[p]
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            dtype = value.dtype
            entry = key.rpartition(".")[2]  # without the prefix of one of several layers
            own = dtypes[entry in ("C", "m_C")]
            is_factor = entry in ("K", "C", "m_K", "m_C")
            if entry == "momentum_buffer":
                dtype = p.dtype
            elif is_factor and own is None and dtype == before:
                dtype = parameter.dtype
            state[key] = value.to(parameter.device, dtype)
    layer.home = (parameter.dtype, parameter.device)


def check_owned(layer: Layer) -> None:
    """Check that a layer's module still has the parameters that the optimizer trains.

    Raises:
        RuntimeError: Naming the parameter that was replaced.
    """
    for name, module in ((layer.name, layer.module), *layer.tied.items()):
        own = layer.kind.parameters(module)
        for key, p in (("weight", layer.weight), ("bias", layer.bias)):
            if p is None or own.get(key) is p:
                continue
            raise RuntimeError(
                f"parameter '{key}' of layer '{name}' was replaced by another after SINGD "
                "was constructed, and would not be trained: assign to its `data` instead, or "
                "construct SINGD again"
            )
