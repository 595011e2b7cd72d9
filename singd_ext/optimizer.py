"""`SINGD`: structured inverse-free natural gradient descent as a `torch.optim.Optimizer`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import _C, copies
from ._warnings import warn_user
from .checkpoint import checked_state, restore_state, saved_group
from .clipping import divisors
from .construction import (
    check_layers,
    check_model,
    default_parameters,
    untrained_names,
    warn_untrained,
)
from .curvature import gather, gatherer_of, install_hooks, remove, tell_options
from .fallback import OWN, Factory, Fallback, Group, check_new_parameters, is_own, tensor_of
from .groups import listed, split_group
from .hyperparameters import OPTIONS, Hyperparameters, check_flag, check_number
from .incidents import GroupIncidents
from .layers import Layer, find_layers
from .scaling import VoidSteps, is_on_host, is_set_on_host, scales_of_step
from .state import complete_state, new_states
from .step_hooks import noticed
from .structured import StructuredMatrix
from .summary import Summary
from .update import update_factors, update_parameters


class SINGD(torch.optim.Optimizer):
    """Structured inverse-free natural gradient descent (arXiv 2312.05705, Figures 3 and 4).

    Every layer's curvature is approximated by U ⊗ G, whose inverse is kept as KKᵀ ⊗ CCᵀ with
    structured factors K (d_i × d_i) and C (d_o × d_o) that are updated with matrix products only.
    Names, order, defaults and meaning of the arguments are those of PyPI `singd` 0.0.5.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands over its scale and found_inf

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        damping: float = 1e-3,
        alpha1: float = 0.5,
        weight_decay: float = 0.0,
        T: int = 10,
        loss_average: str | None = "batch",
        lr_cov: float | Callable[[int], float] = 1e-2,
        structures: tuple[str, str] = ("dense", "dense"),
        kfac_approx: str = "expand",
        warn_unsupported: bool = True,
        kfac_like: bool = False,
        preconditioner_dtype: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
        init_grad_scale: float = 1.0,
        normalize_lr_cov: bool = False,
        *,
        expm_order: int = 1,
        step_cap: float = 0.5,
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_update_norm: float | None = None,
        kl_clip: float | None = None,
        fallback: str | Factory | None = None,
        fallback_options: dict[str, Any] | None = None,
    ) -> None:
        """Give every layer of the model its factors K = C = I, and observe its backward passes.

        Args:
            model: The network; docs/layers.md lists the layers that are preconditioned.
            params: Parameters or parameter groups to train (see `singd_ext.param_groups`). Default:
                all of the supported layers; with a fallback all of the model.
            lr: β₂, step size of the parameters; a number or a tensor of one element.
            momentum: α₂, momentum of the parameters.
            damping: λ.
            alpha1: α₁, Riemannian momentum of the factors.
            weight_decay: γ, added to the preconditioned gradient.
            T: Steps from one update of the factors to the next; the first step updates.
            loss_average: What the loss is a mean over: "batch", "batch+sequence" (batch and shared
                positions), or None for a sum. Scales G.
            lr_cov: β₁, step size of the factors; a number or a function of the step.
            structures: Structures of K and of C (docs/structures.md).
            kfac_approx: "expand" or "reduce", for positions that share a weight.
            warn_unsupported: Warn of parameters that are left untrained.
            kfac_like: IKFAC: an inverse-free KFAC without momentum and trace factors; needs
                alpha1 = 0, which is set with a warning.
            preconditioner_dtype: dtypes of K and of C; None is the parameter's. float32 is advised
                for sparse structures of bfloat16 parameters.
            init_grad_scale: Accepted for compatibility; statistics are float32 sums that need no
                scaling beforehand.
            normalize_lr_cov: Divide β₁ by max(1, largest |entry| of the factor's momentum).
            expm_order: Order after which the matrix exponential is cut, 1 or 2.
            step_cap: Bound of β₁‖m‖ beyond which a factor's step is shortened; inf switches it off.
            stochastic_rounding: Round bfloat16 stores of parameters and state stochastically.
            seed: Of the stochastic rounding.
            max_update_norm: Bound of the Frobenius norm of lr times each layer's preconditioned
                gradient. This and the next cost another preconditioning in every step.
            kl_clip: Bound of lr² Σ ⟨preconditioned gradient, gradient⟩ over all layers, K-FAC's
                trust region (docs/amp-and-state.md).
            fallback: What trains the parameters that belong to no supported layer: None leaves them
                alone, with a warning; "adamw" is torch's AdamW; or a function from a list of
                parameters or groups to a `torch.optim.Optimizer` (docs/whole-models.md).
            fallback_options: Options of "adamw" that differ from torch's defaults. SINGD's own, lr
                among them, are not handed on.

        Raises:
            ValueError: For a bad option, naming it, its value and what is allowed; for layers that
                share only some of their parameters or whose parameters are spread over groups; for
                a device without kernels in this build; for a parameter given twice; for a fallback
                that does not hold exactly its parameters or needs a closure.
            TypeError: For a model that is no module, or a DataParallel or DistributedDataParallel
                wrapper; for params that are no parameters; for a fallback that is no optimizer.
            RuntimeError: In a process group of several processes; naming the layer, if there is no
                memory for its factors.
        """
        check_model(model, params)
        check_flag("warn_unsupported", warn_unsupported)
        check_number("init_grad_scale", init_grad_scale, positive=True)
        given = locals()
        defaults = {name: given[name] for name in OPTIONS}
        self._model = model
        self._forget_layers()
        self._fallback = Fallback(fallback, fallback_options)
        self._waiting: list[Group] | None = []  # the fallback's groups, until all are known
        if params is None:
            params = default_parameters(model, with_others=bool(self._fallback))
            if warn_unsupported and not self._fallback:
                warn_untrained(untrained_names(model, params))
        super().__init__(params, defaults)
        waiting, self._waiting = self._waiting, None
        self.param_groups += self._fallback.add_groups(waiting, [])

    # ---------------------------------------------------------------- construction

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model with their own options.

        A group with "optimizer": "fallback" is the fallback's. Of another one, the fallback gets
        what belongs to no supported layer, as a group of its own.

        Raises:
            ValueError: For a bad option, if a layer's parameters are in different groups, or a
                parameter is given twice.
        """
        group = listed(param_group)
        names = {id(p): name for name, p in self._model.named_parameters()}
        check_new_parameters(group["params"], [*self.param_groups, *(self._waiting or [])], names)
        own, rest = split_group(self._model, group, self._fallback)
        others = [] if rest is None else [rest]
        added = []
        if self._waiting is None:
            added = self._fallback.add_groups(others, self._fallback_groups())
        if own is not None:
            self._add_own_group({**self.defaults, **own})
        if self._waiting is not None:
            self._waiting += others
        self.param_groups += added

    def _add_own_group(self, group: Group) -> None:
        options, index = Hyperparameters.of_group(group), len(self.param_groups)
        tensors = [tensor_of(entry) for entry in group["params"]]
        layers = find_layers(self._model, tensors, index)
        check_layers(self._model, layers, self._layers, tensors)
        for layer in layers:
            layer.kind.check(layer.name, layer.module, options.structures)
        states = new_states(layers, options)  # for which there may be no memory
        super().add_param_group({**group, "steps": 0, "optimizer": OWN})
        self._incidents[index] = GroupIncidents(self._warned)
        self._know(index, options)
        for layer in layers:
            self._layers.append(layer)
            gather(self, layer)
        for parameter, state in states.items():
            self.state[parameter].update(state)
        self._handles += install_hooks(self, layers)
        self._mark_due()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take the model along."""
        return {**super().__getstate__(), **copies.taken_along(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Train the copied model, which is the one that was copied in the same call, if any.

        Raises:
            RuntimeError: If a layer that holds the optimizer is being copied.
        """
        is_copy = copies.is_copy(state)  # load_state_dict comes by here too
        if is_copy:
            self._forget_layers()
        super().__setstate__(state)
        if is_copy:
            copies.take_up(self)

    def _forget_layers(self) -> None:
        """Set everything to what it is before the first parameter group."""
        self._layers: list[Layer] = []
        self._handles: list[Any] = []
        weakref.finalize(self, remove, self._handles).atexit = False
        self._checked: dict[int, Hyperparameters] = {}  # of the groups that SINGD trains itself
        self._incidents: dict[int, GroupIncidents] = {}
        self._gatherer = gatherer_of(self)
        self._curvature_scale: float | None = None
        self._warned: set[str] = set()
        self._pauses = 0
        self._void_steps = VoidSteps()

    # ---------------------------------------------------------------- what users read

    def summary(self) -> Summary:
        """Print a table of who trains each parameter of the model and how; return it as rows."""
        summary = Summary.of(self)
        print(summary)
        return summary

    def factors(self) -> dict[str, tuple[StructuredMatrix, StructuredMatrix]]:
        """Return {module name: (K, C)}; the matrices share the optimizer's memory."""
        result = {}
        for layer in self._layers:
            state = layer.entries(self.state)
            structures = self.options(layer.group).structures
            result[layer.name] = (
                StructuredMatrix(structures[0], layer.dim_K, state["K"]),
                StructuredMatrix(structures[1], layer.dim_C, state["C"]),
            )
        return result

    def rejections(self) -> dict[str, tuple[int, int]]:
        """Return {module name: (factor updates rejected, parameter updates skipped)}.

        Both happen where a result is not finite; the layer then keeps its state bit for bit.
        """
        states = {layer.name: layer.entries(self.state) for layer in self._layers}
        return {name: (int(s["rejected"]), int(s["skipped"])) for name, s in states.items()}

    def remove_hooks(self) -> None:
        """Stop observing the model: factors stay as they are, `step` goes on using them."""
        remove(self._handles)
        self._drop_statistics()

    def set_current_grad_scale(self, grad_scale: float) -> None:
        """Say by what this step's loss was scaled, if the gradients are not any more.

        `torch.amp.GradScaler` needs no such call; scaling by other means does.
        """
        check_number("grad_scale", grad_scale, positive=True)
        self._curvature_scale = float(grad_scale)

    def options(self, group: int) -> Hyperparameters:
        """Return a group's options, validated again if they were changed.

        Raises:
            ValueError: Naming the option, its value and what is allowed.
        """
        before = self._checked[group]
        if self._gatherer.are_options_known(group):
            before.check_tensors()
            return before
        options = before.updated(self.param_groups[group], group)
        self._know(group, options)
        if (options.momentum, options.alpha1) != (before.momentum, before.alpha1):
            for layer in self._layers:
                if layer.group == group:
                    complete_state(self.state, layer, options)
        return options

    def _know(self, group: int, options: Hyperparameters) -> None:
        """Take options that were checked for a group's."""
        self._checked[group] = options
        tell_options(self, group)

    def factors_due(self, group: int) -> bool:
        """Whether the next step of this group updates the factors."""
        current = self.param_groups[group]
        if current.get("T") is not self._checked[group].T:
            self.options(group)
        return _C.is_due(current)

    def _lr_cov_at(self, group: int, step: int) -> float:
        return self._checked[group].lr_cov_at(step)

    @property
    def is_paused(self) -> bool:
        """Whether a `paused` context is open."""
        return self._pauses > 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore passes whose forward or backward half runs in this context.

        For backward passes that add to the gradients but are no part of the loss, such as
        regularizers. Evaluation and `torch.autograd.grad` need no such care. May be nested.
        """
        self._pause(1)
        try:
            yield
        finally:
            self._pause(-1)

    def _pause(self, more: int) -> None:
        # The next gradients may be those of passes that nothing observes.
        self._gatherer.forget_statistics(self.state, of_all=False)
        self._pauses += more
        self._gatherer.paused = self.is_paused
        self._mark_due()

    def _mark_due(self) -> None:
        """Set the flags that compiled models read: their code is specialized on each value."""
        for group, due in self._gatherer.changes_of_due():
            for layer in self._layers:
                if layer.group == group:
                    layer.due = due

    # ---------------------------------------------------------------- the step

    @noticed
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the factors every T steps, and the parameters; the fallback does its own step.

        Args:
            closure: Clears the gradients, computes the loss, calls backward and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: For an option that was changed to a bad value, a group that was removed or
                has other parameters, or a parameter of another shape; nothing is changed.
            RuntimeError: If only one of a layer's weight and bias has a gradient, or a parameter
                was replaced.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps = self._gatherer.steps()  # all checks, before anything is changed
        scales = scales_of_step(self, self._curvature_scale)
        self._curvature_scale = None
        found_inf = scales.found_inf
        if found_inf is not None and is_set_on_host(found_inf):  # all is void, and comes again
            self._drop_statistics()
            return loss
        if len(steps) < len(self.param_groups):
            self._fallback.step(self._fallback_groups(), self.state, scales)
        bounded = []
        for step in steps:
            if step.factors_are_due:
                update_factors(self, step, scales)
            if step.is_bounded:
                bounded.append(step)
        bounds = divisors(self, bounded, scales.gradient) if bounded else {}
        for step in steps:
            update_parameters(self, step, scales, bounds.get(step.group))
        self._gatherer.count_steps(1)
        if found_inf is not None and not is_on_host(found_inf):
            self._void_steps.note(found_inf)
            self._gatherer.unsettled = True
        self._mark_due()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them the statistics of the same backward passes."""
        super().zero_grad(set_to_none)
        self._drop_statistics()
        self.settle_steps()

    def settle_steps(self) -> None:
        """Take back from the step counts what a GradScaler on a GPU has made void.

        Called by `zero_grad` and before forward passes. It waits for the last step only if that
        was, or the next may be, one of every T that updates the factors: the update is then
        retried at once instead of T steps later. Earlier steps are over by then.
        """
        if not self._void_steps:
            self._gatherer.unsettled = False
            return
        own = [self.param_groups[index] for index in self._checked]
        matters = any(g["T"] > 1 and g["steps"] % g["T"] <= 1 for g in own)
        void = self._void_steps.settle(keep=0 if matters else 1)
        if void:
            self._gatherer.count_steps(-void)
            self._mark_due()

    def _fallback_groups(self) -> list[Group]:
        return [group for group in self.param_groups if not is_own(group)]

    def _drop_statistics(self) -> None:
        self._gatherer.forget_statistics(self.state, of_all=True)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn_user(f"{message} (further warnings of this kind are not shown)")

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and builtins; an `lr_cov` function is not saved."""
        self.settle_steps()
        for group in self._checked:
            self.options(group)
        state_dict = super().state_dict()
        state_dict["param_groups"] = [saved_group(group) for group in state_dict["param_groups"]]
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, which is copied and keeps its dtypes.

        Raises:
            ValueError: If it does not fit, naming the difference; nothing is changed.
        """
        checked = checked_state(self, state_dict)
        lr_cov = {index: self.param_groups[index]["lr_cov"] for index in self._checked}
        saved = [group for group in checked["param_groups"] if not is_own(group)]
        loaded = self._fallback.loaded(self._fallback_groups(), saved, checked["state"])
        super().load_state_dict(checked)
        self._gatherer.unbind()
        restore_state(self, checked, lr_cov, *loaded)
        for group in self._checked:
            self.options(group)  # as loaded: a later change is one of these
        self._mark_due()
