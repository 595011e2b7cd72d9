"""What torch does around an optimizer's step, done only where somebody notices.

torch runs every step as an event of the profiler and calls the hooks of steps. After a backward
pass all that is in no cache: of the step of a small model it takes a part that shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import _C


def noticed(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an optimizer's step as torch does, but for calls that nothing records or hooks."""
    wrapped = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def run(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        is_noticed = (
            _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _C.is_recording()
        )
        return (wrapped if is_noticed else step)(self, *args, **kwargs)

    run.hooked = True  # type: ignore[attr-defined]  # torch wraps steps without this mark
    return run
