"""`SINGD.summary`: who trains each parameter of the model, how, and with how much state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .fallback import OWN, is_own

if TYPE_CHECKING:
    from .optimizer import SINGD

FROZEN, UNTRAINED = "frozen", "untrained"


@dataclass(frozen=True)
class Row:
    """One parameter."""

    parameter: str  # its name; others that it has, if it is tied, after "="
    shape: tuple[int, ...]
    trained_by: str  # "SINGD", the class of the fallback, "frozen" or "untrained"
    how: str  # kind of layer and treatment of shared positions; whether the fallback is fused
    structures: str  # of K and C
    group: int | None  # index in `param_groups`
    state_bytes: int  # of all tensors; K, C and their momenta count with a layer's first parameter

    @property
    def numbers(self) -> int:
        """Numbers in the parameter."""
        result = 1
        for size in self.shape:
            result *= size
        return result


@dataclass(frozen=True, repr=False)
class Summary:
    """The rows of the table; `str` of it is the table."""

    rows: list[Row]

    @classmethod
    def of(cls, optimizer: SINGD) -> Summary:
        """Look at the optimizer's model as it is now."""
        return cls(list(_rows(optimizer)))

    def __repr__(self) -> str:
        return f"Summary of {len(self.rows)} parameters"

    def __str__(self) -> str:
        header = ("parameter", "shape", "trained by", "how", "K, C", "group", "state")
        assert len(header) == len(fields(Row))
        lines = [header, *(_texts(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        table = [
            "  ".join(
                text.rjust(width) if name in ("group", "state") else text.ljust(width)
                for text, width, name in zip(line, widths, header, strict=True)
            ).rstrip()
            for line in lines
        ]
        rule = "-" * max(map(len, table))
        return "\n".join([table[0], rule, *table[1:], rule, *self._totals()])

    def _totals(self) -> Iterator[str]:
        parameters, numbers, state = Counter[str](), Counter[str](), Counter[str]()
        for row in self.rows:
            for name in (row.trained_by, "total"):
                parameters[name] += 1
                numbers[name] += row.numbers
                state[name] += row.state_bytes
        width = max(map(len, parameters))
        for name in sorted(parameters, key=lambda n: (n == "total", n in (FROZEN, UNTRAINED))):
            plural = "s" if parameters[name] != 1 else ""
            yield (
                f"{name:{width}}  {parameters[name]} parameter{plural} of {numbers[name]:,} "
                f"numbers, state {_size(state[name])}"
            )


def _rows(optimizer: SINGD) -> Iterator[Row]:
    layers = {id(p): layer for layer in optimizer._layers for p in layer.parameters}
    groups = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    for name, p in _named_parameters(optimizer):
        index, layer = groups.get(id(p)), layers.get(id(p))
        who, how, structures = _unused(p), "", ""
        if index is not None and not is_own(group := optimizer.param_groups[index]):
            who, how = group["optimizer"], "fused" if group.get("fused") else ""
        elif layer is not None:
            options = optimizer.options(layer.group)
            who, structures = OWN, ", ".join(options.structures)
            how = f"{type(layer.module).__name__}, {options.kfac_approx}"
        if who not in (FROZEN, UNTRAINED) and not p.requires_grad:
            how = f"{how}, frozen now".removeprefix(", ")
        state = optimizer.state.get(p, {})
        yield Row(name, tuple(p.shape), who, how, structures, index, _bytes(state))


def _unused(parameter: Tensor) -> str:
    return UNTRAINED if parameter.requires_grad else FROZEN


def _named_parameters(optimizer: SINGD) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's parameters, each once with all its names, then those that are not the model's."""
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, p in optimizer._model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
        parameters[id(p)] = p
    for group in optimizer.param_groups:
        for p in group["params"]:
            names.setdefault(id(p), ["<not in model>"])
            parameters[id(p)] = p
    for key, p in parameters.items():
        yield " = ".join(names[key]), p


def _bytes(state: dict[str, Any]) -> int:
    return sum(value.nbytes for value in state.values() if isinstance(value, Tensor))


def _texts(row: Row) -> tuple[str, ...]:
    name, shape, who, how, structures, group, state = astuple(row)
    sizes = " × ".join(map(str, shape)) or "scalar"
    return name, sizes, who, how, structures, "" if group is None else str(group), _size(state)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
