"""Parameter groups of a whole model: what is preconditioned, what is not, what decays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .construction import supported_parameters
from .fallback import FALLBACK, OWN, Fallback, Group, is_own, tensor_of
from .hyperparameters import OPTIONS, check_number
from .layers import find_layers

Selector = str | type[nn.Module]

NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms
)

# Options that both optimizers mean alike: the rest of SINGD's are not handed on.
_SHARED_OPTIONS = ("weight_decay",)


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    exclude: Iterable[Selector] = (),
    no_weight_decay: Iterable[Selector] = (),
) -> list[dict[str, Any]]:
    """Return the model's trainable parameters in groups with and without weight decay.

    There are up to four groups, empty ones left out: layers that SINGD preconditions, with and
    without decay, then the fallback's parameters, with and without decay. Each has "params",
    "weight_decay" and "optimizer" ("SINGD" or "fallback"); other options can be added to the
    dicts. Frozen parameters are left out.

    Weight and bias of a preconditioned layer are updated together and share one decay: its bias
    decays like its weight, unless exclude=["*.bias"] gives the biases to the fallback. Of
    the fallback's parameters, biases, those of normalisation layers and all with at most one
    dimension do not decay.

    A selector is a pattern as of `fnmatch` (`*`, `?`, `[abc]`; case counts) or a module type. A
    pattern selects the parameters whose name it matches, and all within the modules whose name it
    matches; a type selects all within the modules that are instances of it.

    Args:
        model: The network.
        weight_decay: γ of the groups with decay.
        exclude: Selectors of what is left to the fallback although it could be preconditioned.
        no_weight_decay: Selectors of what does not decay, beyond the above.

    Raises:
        ValueError: For a bad weight_decay; for a selector that matches nothing; where
            no_weight_decay selects the bias of a preconditioned layer without its weight, or the
            weight without the bias.
        TypeError: For a selector that is neither a string nor a module type.
    """
    check_number("weight_decay", weight_decay)
    excluded = _selected(model, "exclude", exclude)
    without_decay = _selected(model, "no_weight_decay", no_weight_decay)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in trainable.items()}
    groups: dict[tuple[str, bool], list[Tensor]] = {
        (owner, decays): [] for owner in (OWN, FALLBACK) for decays in (True, False)
    }
    candidates = [p for p in trainable.values() if id(p) not in excluded]
    preconditioned: set[int] = set()
    for layer in find_layers(model, candidates, 0):
        ids = {id(p) for p in layer.parameters}
        new = ids - preconditioned  # several layers may be parts of one parameter
        preconditioned |= ids
        selected = [names[i] for i in ids if i in without_decay]
        if 0 < len(selected) < len(ids):
            raise ValueError(
                f"no_weight_decay selects {selected} of layer '{layer.name}', but not its other "
                "parameters; a preconditioned layer has one weight decay: select the whole layer, "
                f"or give {selected} to the fallback with `exclude`"
            )
        decays = not selected and layer.weight is not None
        groups[OWN, decays] += [p for p in trainable.values() if id(p) in new]
    norms = _within(model, NORMS)
    for name, p in trainable.items():
        if id(p) not in preconditioned:
            flat = p.ndim <= 1 or name.rpartition(".")[2] == "bias" or id(p) in norms
            groups[FALLBACK, not flat and id(p) not in without_decay].append(p)
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "optimizer": owner}
        for (owner, decays), params in groups.items()
        if params
    ]


def split_group(
    model: nn.Module, group: Group, fallback: Fallback
) -> tuple[Group | None, Group | None]:
    """Divide a new group into SINGD's part and the fallback's; None is an empty part.

    A group marked for the fallback is the fallback's as it is. Of another one, it gets what belongs
    to no supported layer, with the group's own options that SINGD does not have, and its
    weight_decay.

    Raises:
        ValueError: For another mark, or one for a fallback that there is not.
    """
    wanted = group.get("optimizer", OWN)
    options = {key: value for key, value in group.items() if key != "optimizer"}
    if wanted not in (OWN, FALLBACK, fallback.name):
        raise ValueError(
            f"'optimizer' of a parameter group is {wanted!r}; it must be '{OWN}' or '{FALLBACK}'"
        )
    if not is_own(group):
        if not fallback:
            raise ValueError(
                "a parameter group is marked for the fallback, but there is none: pass "
                'fallback="adamw", or train it with an optimizer of its own'
            )
        return None, options
    if not fallback:
        return options, None
    supported = {id(p) for p in supported_parameters(model)}
    entries: dict[bool, list[Any]] = {True: [], False: []}
    for entry in group["params"]:
        entries[id(tensor_of(entry)) in supported].append(entry)
    of_singd = set(OPTIONS) - set(_SHARED_OPTIONS)
    rest = {key: value for key, value in options.items() if key not in of_singd}
    return (
        {**options, "params": entries[True]} if entries[True] else None,
        {**rest, "params": entries[False]} if entries[False] else None,
    )


def listed(group: Group) -> Group:
    """Return a copy of a group with its "params" in a list.

    Raises:
        TypeError: If they are a set, or others than parameters.
    """
    params = group["params"]
    if isinstance(params, set):
        raise TypeError("params is a set, whose order is not defined; use a list")
    entries = [params] if isinstance(params, torch.Tensor) else list(params)
    for entry in entries:
        if not isinstance(tensor_of(entry), torch.Tensor):
            raise TypeError(
                f"params contains {entry!r}; it must hold parameters, or pairs of a name and a "
                "parameter, as model.parameters() and model.named_parameters() give them"
            )
    return {**group, "params": entries}


def _selected(model: nn.Module, option: str, selectors: Iterable[Selector]) -> set[int]:
    """Ids of the parameters that the selectors match."""
    if isinstance(selectors, (str, type)):
        raise TypeError(f"{option} is {selectors!r}; it must be a list of patterns or module types")
    result: set[int] = set()
    for selector in selectors:
        if isinstance(selector, str):
            found = _matching(model, selector)
        elif isinstance(selector, type) and issubclass(selector, nn.Module):
            found = _within(model, selector)
        else:
            raise TypeError(
                f"{option} contains {selector!r}; it must be a pattern of names or a type of module"
            )
        if not found:
            raise ValueError(f"{option}: {selector!r} matches no parameter of the model")
        result |= found
    return result


def _matching(model: nn.Module, pattern: str) -> set[int]:
    named = model.named_parameters(remove_duplicate=False)
    found = {id(p) for name, p in named if fnmatchcase(name, pattern)}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and fnmatchcase(name, pattern):
            found |= {id(p) for p in module.parameters()}
    return found


def _within(model: nn.Module, types: type | Sequence[type]) -> set[int]:
    chosen = types if isinstance(types, type) else tuple(types)
    return {
        id(p) for module in model.modules() if isinstance(module, chosen)
        for p in module.parameters()
    }  # fmt: skip
