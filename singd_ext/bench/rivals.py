"""The optimizers that are compared: singd_ext, fused AdamW and SGD, Muon, PyPI `singd`.

A rival that can not run here is left out with a reason. Learning rates are such that all weights
move, also in bfloat16, and stay ordinary numbers: others may take another time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .. import SINGD
from ..structured import canonical_spec

ADAMW, SGD, MUON = "AdamW (fused)", "SGD", "Muon"
OURS, PYPI, NONE = "singd_ext", "singd (PyPI)", "no optimizer"

# Every structure of the paper, in default sizes.
STRUCTURES = (
    "diagonal",
    "block_diagonal:32",
    "hierarchical:16,16",
    "rank_triu:1",
    "rank_tril:1",
    "rank_triu_topleft:1",
    "rank_tril_topleft:1",
    "triu_toeplitz",
    "tril_toeplitz",
    "triu",
    "tril",
    "dense",
)
# PyPI's structures by family. It has one size of each: 30, and 15 with 15.
PYPI_STRUCTURES = {
    "dense": "dense",
    "diagonal": "diagonal",
    "block_diagonal": "block30diagonal",
    "hierarchical": "hierarchical15_15",
    "triu_toeplitz": "triutoeplitz",
    "tril_toeplitz": "triltoeplitz",
}
# Of both packages. As much damping as this keeps K and C near I, and training tame, however long.
SINGD_OPTIONS: dict[str, Any] = {
    "lr": 0.05, "momentum": 0.9, "damping": 1.0, "alpha1": 0.5, "weight_decay": 1e-2,
    "lr_cov": 1e-2, "kfac_approx": "expand",
}  # fmt: skip

Build = Callable[[nn.Module, list[nn.Parameter], str | None], "Steps"]


class Steps:
    """One or several optimizers that make one step together."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Update the parameters."""
        for optimizer in self.optimizers:
            optimizer.step()

    def begin_cycle(self, T: int) -> None:
        """Let the next step be one that updates the factors, and then every T-th."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if "T" in group:
                    group["T"] = T
                if "steps" in group:
                    group["steps"] = 0
            if hasattr(optimizer, "set_current_grad_scale") and hasattr(optimizer, "steps"):
                optimizer.steps = -1  # PyPI's count; it asks for the scale of the step before
                optimizer.set_current_grad_scale(1.0)
                optimizer.steps = 0

    def state_bytes(self) -> int:
        """Return the bytes of the tensors that `state_dict` saves."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        tensors = {t.untyped_storage().data_ptr(): t for t in _tensors(states)}
        return sum(t.untyped_storage().nbytes() for t in tensors.values())

    def rejections(self) -> dict[str, tuple[int, int]]:
        """Return the layers of singd_ext whose updates were not finite."""
        ours = [o for o in self.optimizers if isinstance(o, SINGD)]
        return {k: v for o in ours for k, v in o.rejections().items() if v != (0, 0)}


@dataclass(frozen=True)
class Rival:
    """One optimizer of a comparison.

    Attributes:
        name: Of the optimizer.
        structure: Canonical spec or "K/C" of SINGD; "" of others.
        build: Makes it from (model, trained parameters, loss_average).
    """

    name: str
    structure: str
    build: Build

    @property
    def label(self) -> str:
        """Name and structure."""
        return f"{self.name} {self.structure}".strip()

    @property
    def trains(self) -> bool:
        """Whether it is an optimizer at all."""
        return self.name != NONE

    @property
    def has_period(self) -> bool:
        """Whether a step costs more in every T-th step."""
        return self.structure != ""


def pair(structure: str) -> tuple[str, str]:
    """Return the canonical structures of K and C: "diagonal/dense" names two, "dense" one.

    Raises:
        ValueError: For an unknown structure.
    """
    K, slash, C = structure.partition("/")
    return canonical_spec(K), canonical_spec(C if slash else K)


def rivals(
    wanted: Sequence[str], structures: Sequence[str], parameters: Sequence[nn.Parameter]
) -> tuple[list[Rival], list[str]]:
    """Return the optimizers to compare, fused AdamW first, and why others are absent.

    Args:
        wanted: Of "sgd", "muon", "singd", beside AdamW and singd_ext.
        structures: Of SINGD.
        parameters: The trained ones, for what they are like.

    Raises:
        ValueError: For an unknown name or structure.
    """
    unknown = set(wanted) - {"sgd", "muon", "singd"}
    if unknown:
        raise ValueError(f"unknown rivals {sorted(unknown)}; there are sgd, muon and singd")
    chosen = [Rival(NONE, "", _none), Rival(ADAMW, "", _adamw)]
    notes = []
    if "sgd" in wanted:
        chosen.append(Rival(SGD, "", _sgd))
        if not _fused_sgd_works(parameters):
            notes.append(
                f"{SGD} is the foreach one: in 16 bits on CPU, the fused one moves nothing"
            )
    if "muon" in wanted:
        reason = _why_no_muon(parameters)
        if reason:
            notes.append(f"{MUON} is absent: {reason}")
        else:
            notes.append(f"{MUON} trains the weights, fused AdamW the biases")
            chosen.append(Rival(MUON, "", _muon))
    chosen += ours(structures)
    if "singd" in wanted:
        theirs, reasons = _pypi_rivals(structures, parameters)
        chosen += theirs
        notes += reasons
    return chosen, notes


def ours(structures: Sequence[str]) -> list[Rival]:
    """Return singd_ext with each of the structures."""
    pairs = dict.fromkeys(pair(structure) for structure in structures)
    return [Rival(OURS, _title(specs), _ours(specs)) for specs in pairs]


def _pypi_rivals(
    structures: Sequence[str], parameters: Sequence[nn.Parameter]
) -> tuple[list[Rival], list[str]]:
    if find_spec("singd") is None:
        return [], [f"{PYPI} is absent: not installed (`pip install singd`)"]
    if any(p.ndim not in (1, 2, 4) for p in parameters):
        return [], [f"{PYPI} is absent: it trains Linear and Conv2d, not Conv1d and Conv3d"]
    found: dict[str, Rival] = {}
    missing = []
    for structure in structures:
        families = [spec.partition(":")[0] for spec in pair(structure)]
        if all(family in PYPI_STRUCTURES for family in families):
            specs = PYPI_STRUCTURES[families[0]], PYPI_STRUCTURES[families[1]]
            title = _title((canonical_spec(specs[0]), canonical_spec(specs[1])))
            found[title] = Rival(PYPI, title, _pypi(specs))
        else:
            missing.append(structure)
    notes = [f"{PYPI} is release {version('singd')}; block size 30 and border 15 + 15 are fixed"]
    if missing:
        notes.append(f"{PYPI} does not have {', '.join(missing)}")
    return list(found.values()), notes


def _why_no_muon(parameters: Sequence[nn.Parameter]) -> str:
    if not hasattr(torch.optim, "Muon"):
        return f"torch {torch.__version__} has no torch.optim.Muon"
    if any(p.ndim > 2 for p in parameters):
        return "torch.optim.Muon takes matrices only, and here convolutions are trained"
    return ""


class _Idle(torch.optim.Optimizer):
    """Clears gradients and leaves the parameters."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def _none(model: nn.Module, parameters: list[nn.Parameter], loss_average: str | None) -> Steps:
    return Steps(_Idle(parameters, {}))


def _adamw(model: nn.Module, parameters: list[nn.Parameter], loss_average: str | None) -> Steps:
    return Steps(torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2, fused=True))


def _sgd(model: nn.Module, parameters: list[nn.Parameter], loss_average: str | None) -> Steps:
    how = "fused" if _fused_sgd_works(parameters) else "foreach"
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-2, how: True}
    return Steps(torch.optim.SGD(parameters, lr=0.05, **options))


def _fused_sgd_works(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether fused SGD trains: of 16-bit numbers on CPU it skips most (pytorch issue 191763)."""
    return not any(p.device.type == "cpu" and p.element_size() < 4 for p in parameters)


def _muon(model: nn.Module, parameters: list[nn.Parameter], loss_average: str | None) -> Steps:
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=1e-3)
    return Steps(muon, *_adamw(model, others, loss_average).optimizers) if others else Steps(muon)


def _ours(structures: tuple[str, str]) -> Build:
    def build(model: nn.Module, parameters: list[nn.Parameter], loss_average: str | None) -> Steps:
        options = SINGD_OPTIONS | {"structures": structures, "loss_average": loss_average}
        return Steps(SINGD(model, parameters, T=1, **options))

    return build


def _pypi(structures: tuple[str, str]) -> Build:
    def build(model: nn.Module, parameters: list[nn.Parameter], loss_average: str | None) -> Steps:
        package = import_module("singd.optim.optimizer")
        options = SINGD_OPTIONS | {"structures": structures, "loss_average": loss_average}
        return Steps(package.SINGD(model, parameters, T=1, **options))

    return build


def _title(specs: tuple[str, str]) -> str:
    return specs[0] if specs[0] == specs[1] else "/".join(specs)


def _tensors(item: Any) -> Iterable[Tensor]:
    """All tensors in nested containers, and in PyPI's structured matrices."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from _tensors(value)
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from _tensors(value)
    elif hasattr(item, "named_tensors"):
        for _, tensor in item.named_tensors():
            yield tensor
