"""Which modules are layers that can be preconditioned."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .attention import PROJECTIONS
from .kinds import Conv1DKind, ConvKind, LayerKind, LinearKind, TransposedKind

# Types of modules, by class or by the full name of a class that need not be installed, and the
# layers in each by name; the name of a module that is one layer is empty. Of the classes that a
# module is an instance of, the most derived one counts.
KINDS: dict[type[nn.Module] | str, dict[str, LayerKind]] = {
    nn.Linear: {"": LinearKind()},
    nn.Conv1d: {"": ConvKind()},
    nn.Conv2d: {"": ConvKind()},
    nn.Conv3d: {"": ConvKind()},
    nn.ConvTranspose1d: {"": TransposedKind()},
    nn.ConvTranspose2d: {"": TransposedKind()},
    nn.ConvTranspose3d: {"": TransposedKind()},
    nn.MultiheadAttention: dict(PROJECTIONS),
    "transformers.pytorch_utils.Conv1D": {"": Conv1DKind()},
    "torch_geometric.nn.dense.linear.Linear": {"": LinearKind()},
}


def register_layer(module_type: type[nn.Module] | str, kind: LayerKind) -> None:
    """Let every SINGD that is constructed from now on precondition a type of module.

    Subclasses are of the same kind unless they are registered themselves. Registering a type again
    replaces its kind.

    Args:
        module_type: The class, or its full name ("package.module.Class") if it is not to be
            imported here.
        kind: How the modules look to the algorithm (docs/layers.md).

    Raises:
        TypeError: If module_type is neither a module class nor a name with a dot, or kind is not an
            instance of `LayerKind`.
    """
    is_class = isinstance(module_type, type) and issubclass(module_type, nn.Module)
    if not is_class and not (isinstance(module_type, str) and "." in module_type):
        raise TypeError(
            f"module_type is {module_type!r}; it must be a subclass of torch.nn.Module or the full "
            "name of one, such as 'package.module.Class'"
        )
    if not isinstance(kind, LayerKind):
        raise TypeError(
            f"kind is {kind!r}; it must be an instance of singd_ext.kinds.LayerKind, such as "
            "LinearKind()"
        )
    KINDS[module_type] = {"": kind}


def kinds_of(module: nn.Module) -> dict[str, LayerKind]:
    """Return the layers in a module by name, none for an unknown type."""
    for cls in type(module).__mro__:
        for key in (cls, f"{cls.__module__}.{cls.__qualname__}"):
            if key in KINDS:
                return KINDS[key]
    return {}


def supported_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerKind]]:
    """Yield (name, module, kind) of the layers that can be preconditioned.

    Submodules of nn.MultiheadAttention are left out: it reads their weights without calling them,
    and has kinds for them.
    """
    inside_attention = {
        child
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
        if child is not module
    }
    for name, module in model.named_modules():
        if module not in inside_attention:
            for part, kind in kinds_of(module).items():
                yield ".".join(filter(None, (name, part))), module, kind
