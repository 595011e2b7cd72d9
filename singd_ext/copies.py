"""What a copied or pickled optimizer takes along, and how it goes on training the copied model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .curvature import gather, install_hooks
from .fallback import is_own
from .hyperparameters import Hyperparameters
from .incidents import GroupIncidents

if TYPE_CHECKING:
    from .optimizer import SINGD

_TAKEN = ("_model", "_layers", "_fallback", "_waiting")


def taken_along(optimizer: SINGD) -> dict[str, Any]:
    """Return the attributes beside those of `torch.optim.Optimizer`."""
    taken = {name: getattr(optimizer, name) for name in _TAKEN}
    return {**taken, "_observes": bool(optimizer._handles)}


def is_copy(state: dict[str, Any]) -> bool:
    """Whether a state is that of a copy, and not of a checkpoint."""
    return "_layers" in state


def take_up(optimizer: SINGD) -> None:
    """Check and observe the layers of an optimizer that has just received a copy's state.

    Raises:
        RuntimeError: If a layer that holds the optimizer is being copied.
    """
    observes = optimizer.__dict__.pop("_observes")
    for index, group in enumerate(optimizer.param_groups):
        if is_own(group):
            options = Hyperparameters.of_group(group)
            optimizer._incidents[index] = GroupIncidents(optimizer._warned)
            optimizer._know(index, options)
    for layer in optimizer._layers:
        if not hasattr(layer.module, "_modules"):  # its copy is not finished
            raise RuntimeError(
                f"layer '{layer.name}' holds the SINGD that trains it, so that neither can be "
                "copied first: take the optimizer out of the layer"
            )
        layer.forget()
        gather(optimizer, layer)
    if observes:
        optimizer._handles += install_hooks(optimizer, optimizer._layers)
    optimizer._mark_due()
