"""What SINGD checks and says about a model when it is constructed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from . import _C
from ._warnings import warn_user
from .layers import Layer
from .registry import supported_modules


def supported_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the layers that can be preconditioned, frozen ones too."""
    unique = {
        id(p): p
        for _, module, kind in supported_modules(model)
        for p in kind.parameters(module).values()
    }
    return list(unique.values())


def default_parameters(model: nn.Module, with_others: bool) -> list[nn.Parameter]:
    """Return the trainable parameters of the layers that can be preconditioned, or of all.

    Raises:
        ValueError: If there are none.
    """
    candidates = model.parameters() if with_others else supported_parameters(model)
    parameters = [p for p in candidates if p.requires_grad]
    if not parameters:
        what = "" if with_others else " of a supported layer (docs/layers.md)"
        raise ValueError(
            f"the model has no trainable parameter{what}: unfreeze some with requires_grad_()"
            + ("" if with_others else ', or train all others with fallback="adamw"')
        )
    return parameters


def untrained_names(model: nn.Module, trained: Iterable[Tensor]) -> list[str]:
    """Return the names of the model's trainable parameters that are not among the given ones."""
    ids = {id(p) for p in trained}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ids]


def check_layers(
    model: nn.Module, layers: Sequence[Layer], taken: Sequence[Layer], params: Sequence[Tensor]
) -> None:
    """Check the layers of a new parameter group against those of the groups before it.

    Warns of parameters in the group that belong to no supported layer.

    Raises:
        ValueError: If a layer's parameters are in different groups, or on a device without kernels.
        TypeError: For parameters that are not real floating-point numbers.
    """
    names_taken = {name for layer in taken for name in (layer.name, *layer.tied)}
    for layer in layers:
        if not names_taken.isdisjoint((layer.name, *layer.tied)):
            raise ValueError(
                f"the parameters of layer '{layer.name}' are in different parameter groups; K and "
                "C belong to the whole layer: put its weight and bias in one group, as "
                "singd_ext.param_groups does; where one was frozen at construction, construct "
                "SINGD again, or give it to the fallback"
            )
        for p in layer.parameters:
            if not p.is_floating_point():
                raise TypeError(
                    f"layer '{layer.name}' has parameters of dtype {p.dtype}; only real "
                    "floating-point parameters can be trained"
                )
            _check_device(layer.name, p.device)
    trained = {id(p) for layer in layers for p in layer.parameters}
    names = {id(p): name for name, p in model.named_parameters()}
    warn_untrained([names.get(id(p), "<not in model>") for p in params if id(p) not in trained])


def warn_untrained(names: Sequence[str]) -> None:
    """Name parameters that stay as they are."""
    if names:
        warn_user(
            f"SINGD does not train the parameters {list(names)}: they are not the trainable weight "
            'or bias of a supported layer. fallback="adamw" trains them in the same optimizer; or '
            "train them with a second one: warn_unsupported=False silences this for `params=None`"
        )


def check_model(model: nn.Module, params: Any) -> None:
    """Check the first two arguments, which other optimizers have in another order.

    Raises:
        TypeError: For a model that is no module, or params that cannot be parameters.
        RuntimeError: In a process group of several processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is {_described(model)}; SINGD takes the network itself, whose layers it "
            "observes: SINGD(model, ...), with `params` for some of its parameters"
        )
    if params is not None and (isinstance(params, str) or not isinstance(params, Iterable)):
        raise TypeError(
            f"params is {_described(params)}; it must hold parameters of the model or parameter "
            "groups: give other arguments by name, as in SINGD(model, lr=1e-3)"
        )
    _refuse_data_parallel(model)


def _described(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def _refuse_data_parallel(model: nn.Module) -> None:
    """Refuse what would train silently with different factors on every process."""
    for module in model.modules():
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            raise TypeError(
                f"{type(module).__name__} is not supported: construct SINGD with the wrapped model"
            )
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized()
    if several and distributed.get_world_size() > 1:
        raise RuntimeError(
            "SINGD does not reduce its statistics over several processes: every process would "
            "train with factors of its own"
        )


def _check_device(layer: str, device: torch.device) -> None:
    available = _C.build_info()["devices"].split()
    if device.type not in available:
        raise ValueError(
            f"layer '{layer}' is on {device}, but this build of singd_ext has kernels for "
            f"{', '.join(available)} only: move the model there before constructing SINGD"
        )
