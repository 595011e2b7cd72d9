"""Run an example in this process and print, as JSON, what its SINGD did to the model's parameters.

    python python_tests/run_example.py examples/plain_pytorch.py --quick

Watches optimizers from outside: parameters are copied before the first step of each.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from singd_ext import SINGD

before: dict[Tensor, Tensor] = {}
models: list[torch.nn.Module] = []


def remember(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            before.setdefault(p, p.detach().clone())
    if isinstance(optimizer, SINGD) and optimizer._model not in models:
        models.append(optimizer._model)


def main() -> None:
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.parent))
    register_optimizer_step_pre_hook(remember)
    runpy.run_path(str(script), run_name="__main__")
    trained = [(n, p) for m in models for n, p in m.named_parameters() if p.requires_grad]
    fates = {
        "moved": [n for n, p in trained if p in before and not torch.equal(p, before[p])],
        "unmoved": [n for n, p in trained if p not in before or torch.equal(p, before[p])],
        "not finite": [n for n, p in trained if not p.isfinite().all()],
    }
    print(json.dumps(fates))


if __name__ == "__main__":
    main()
