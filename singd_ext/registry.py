"""Which modules are layers that can be preconditioned."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .kinds import ConvKind, LayerKind, LinearKind

# Layer types. Of the classes that a module is an instance of, the most derived one counts.
KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LinearKind(),
    nn.Conv1d: ConvKind(),
    nn.Conv2d: ConvKind(),
    nn.Conv3d: ConvKind(),
}


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a layer, None of what is none."""
    for cls in type(module).__mro__:
        if cls in KINDS:
            return KINDS[cls]
    return None


def supported_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerKind]]:
    """Yield (name, module, kind) of the layers that can be preconditioned.

    Submodules of nn.MultiheadAttention are left out: it reads their weights without calling them.
    """
    inside_attention = {
        child
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None and module not in inside_attention:
            yield name, module, kind
