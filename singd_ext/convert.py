"""States of the PyPI package `singd` as states of `singd_ext.SINGD`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._warnings import warn_user
from .structured import StructuredMatrix, canonical_spec

if TYPE_CHECKING:
    from .layers import Layer
    from .optimizer import SINGD

_PYPI_ENTRIES = ("steps", "Ks", "Cs", "m_Ks", "m_Cs", "H_Ks", "H_Cs")
_Groups = list[dict[str, Any]]


def from_singd(source: Any, optimizer: SINGD) -> dict[str, Any]:
    """Return a state of PyPI `singd` 0.0.5 as one that `optimizer.load_state_dict` takes.

    Factors, Riemannian momenta, momentum buffers, step count and the options of the groups are
    taken over; options that `singd` does not have stay those of the optimizer, and so does an
    `lr_cov` that is a function. Nothing that is passed in is changed. A factor is a dense matrix
    for a moment, one at a time.

    Args:
        source: A `singd.optim.optimizer.SINGD` or its `state_dict()`. The latter holds objects of
            `singd`: load it with `torch.load(..., weights_only=False)`, only from sources you
            trust, where `singd` is installed.
        optimizer: For the same model, with the same parameters in the same groups.

    Raises:
        TypeError: If the source is neither.
        ValueError: If layers, groups, structures or shapes differ, naming which.
    """
    saved = source if isinstance(source, dict) else _state_of(source)
    missing = [name for name in _PYPI_ENTRIES if name not in saved]
    if missing:
        raise ValueError(f"the state has no {missing}: it is not one of PyPI singd 0.0.5")
    _check_layers(saved, optimizer)
    if saved["H_Ks"] or saved["H_Cs"]:
        warn_user(
            "the state was saved between backward and step: the statistics of that backward pass "
            "are left out; repeat the pass"
        )
    result = optimizer.state_dict()
    result["param_groups"] = _groups(saved, result["param_groups"])
    ids = {
        id(p): key
        for own, group in zip(optimizer.param_groups, result["param_groups"], strict=True)
        for p, key in zip(own["params"], group["params"], strict=True)
    }
    state: dict[Any, dict[str, Any]] = {}
    for layer in optimizer._layers:
        group = result["param_groups"][layer.group]
        for p in layer.parameters:
            has_momentum = group["momentum"] != 0
            buffer = _momentum(saved, ids[id(p)], p) if has_momentum else None
            state[ids[id(p)]] = {} if buffer is None else {"momentum_buffer": buffer}
        state[ids[id(layer.parameters[0])]] |= _factors(saved, layer, group)
    return {**result, "state": state}


def _factors(saved: dict[str, Any], layer: Layer, group: dict[str, Any]) -> dict[str, Tensor]:
    """Return what a layer's state holds beside momentum buffers."""
    entries = {name: torch.zeros((), dtype=torch.int64) for name in ("rejected", "skipped")}
    dims = (layer.dim_K, layer.dim_C)
    for name, spec, dim in zip(("K", "C"), group["structures"], dims, strict=True):
        for prefix in ("", "m_") if group["alpha1"] != 0 else ("",):
            matrix = saved[f"{prefix}{name}s"].get(layer.name)
            what = f"{prefix}{name} of layer '{layer.name}'"
            entries[f"{prefix}{name}"] = _storage(what, matrix, spec, dim)
    return entries


def _state_of(source: Any) -> dict[str, Any]:
    if not hasattr(source, "state_dict"):
        raise TypeError(
            f"expected an optimizer of PyPI singd or its state_dict(), got {type(source).__name__}"
        )
    return source.state_dict()


def _check_layers(saved: dict[str, Any], optimizer: SINGD) -> None:
    own, theirs = {layer.name for layer in optimizer._layers}, set(saved["Ks"])
    if own != theirs:
        raise ValueError(
            f"layers differ: {sorted(theirs - own)} are in the saved state only, "
            f"{sorted(own - theirs)} in the optimizer only"
        )


def _groups(saved: dict[str, Any], own_groups: _Groups) -> _Groups:
    """Return the saved groups with the optimizer's names of structures and further options."""
    if len(saved["param_groups"]) != len(own_groups):
        raise ValueError(
            f"the saved state has {len(saved['param_groups'])} parameter groups, the optimizer "
            f"{len(own_groups)}"
        )
    result = []
    for index, (theirs, own) in enumerate(zip(saved["param_groups"], own_groups, strict=True)):
        if len(theirs["params"]) != len(own["params"]):
            raise ValueError(
                f"parameter group {index} has {len(theirs['params'])} parameters in the saved "
                f"state, {len(own['params'])} in the optimizer"
            )
        if [*map(canonical_spec, theirs["structures"])] != [
            *map(canonical_spec, own["structures"])
        ]:
            raise ValueError(
                f"parameter group {index} was saved with structures={theirs['structures']!r}, but "
                f"the optimizer has {own['structures']!r}"
            )
        group = {**own, **theirs, "structures": own["structures"], "steps": saved["steps"]}
        if callable(group["lr_cov"]) and not isinstance(group["lr_cov"], Tensor):
            group["lr_cov"] = None  # load_state_dict keeps the optimizer's own
        result.append(group)
    return result


def _storage(what: str, matrix: Any, spec: str, dim: int) -> Tensor:
    if matrix is None:
        raise ValueError(f"the saved state has no {what}")
    dense = matrix.to_dense()
    if dense.shape != (dim, dim):
        raise ValueError(
            f"{what} has shape {tuple(dense.shape)} in the saved state, expected {(dim, dim)}"
        )
    try:
        return StructuredMatrix.extract(spec, dense).data
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _momentum(saved: dict[str, Any], key: Any, parameter: Tensor) -> Tensor:
    """Return the momentum buffer, which `singd` creates in the first step only."""
    buffer = saved["state"].get(key, {}).get("momentum_buffer")
    return torch.zeros_like(parameter) if buffer is None else buffer.clone()
