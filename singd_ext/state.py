"""The state that the layers of a parameter group need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .hyperparameters import Hyperparameters
from .layers import Layer
from .structured import StructuredMatrix


def new_states(layers: Iterable[Layer], options: Hyperparameters) -> dict[Tensor, dict[str, Any]]:
    """Return the states of the parameters of new layers.

    Raises:
        RuntimeError: Naming the layer, if there is no memory for its state.
    """
    states: dict[Tensor, dict[str, Any]] = defaultdict(dict)
    for layer in layers:
        try:
            complete_state(states, layer, options)
        except RuntimeError as error:
            raise type(error)(
                f"layer '{layer.name}' has no memory for its factors: K is {layer.dim_K} x "
                f"{layer.dim_K} of structure '{options.structures[0]}', C {layer.dim_C} x "
                f"{layer.dim_C} of '{options.structures[1]}'; a sparse structure such as "
                f"'block_diagonal:32' takes less, or exclude the layer with `params` ({error})"
            ) from error
    return states


@torch.inference_mode(False)
def complete_state(
    states: dict[Tensor, dict[str, Any]], layer: Layer, options: Hyperparameters
) -> None:
    """Create what these options need and the layer's state does not have yet."""
    parameter = layer.parameters[0]
    state = layer.entries(states)
    for factor, dim, spec, dtype in zip(
        ("K", "C"),
        (layer.dim_K, layer.dim_C),
        options.structures,
        options.preconditioner_dtype,
        strict=True,
    ):
        if factor not in state:
            dtype = parameter.dtype if dtype is None else dtype
            state[factor] = StructuredMatrix.eye(spec, dim, dtype, parameter.device).data
        if options.alpha1 != 0 and f"m_{factor}" not in state:
            state[f"m_{factor}"] = torch.zeros_like(state[factor])
    for counter in ("rejected", "skipped"):
        if counter not in state:
            state[counter] = torch.zeros((), dtype=torch.int64, device=parameter.device)
    for p in layer.parameters:
        if options.momentum != 0 and "momentum_buffer" not in states[p]:
            states[p]["momentum_buffer"] = torch.zeros_like(p)
