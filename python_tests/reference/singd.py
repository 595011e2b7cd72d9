"""SINGD as in the algorithm box: dense float64 matrices, one layer after the other."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .layers import SUPPORTED, as_matrix, gradient_rows, input_rows, loss_terms, write_matrix
from .masks import project


@dataclass(frozen=True)
class Options:
    """The hyper-parameters of singd_ext.SINGD, with its defaults."""

    lr: float = 1e-3  # beta_2
    momentum: float = 0.9  # alpha_2
    damping: float = 1e-3  # lambda
    alpha1: float = 0.5
    weight_decay: float = 0.0  # gamma
    T: int = 10
    loss_average: str | None = "batch"
    lr_cov: float | Callable[[int], float] = 1e-2  # beta_1
    structures: tuple[str, str] = ("dense", "dense")
    kfac_approx: str = "expand"
    kfac_like: bool = False
    normalize_lr_cov: bool = False
    expm_order: int = 1


class Layer:
    """A layer's factors, and what its uses in this step's backward passes have shown."""

    def __init__(self, module: nn.Module, options: Options) -> None:
        self.module, self.options = module, options
        self.alpha1 = 0.0 if options.kfac_like else options.alpha1
        W = as_matrix(module)
        self.K = torch.eye(W.shape[1], dtype=torch.float64)
        self.C = torch.eye(W.shape[0], dtype=torch.float64)
        self.m_K = torch.zeros_like(self.K)
        self.m_C = torch.zeros_like(self.C)
        self.M = torch.zeros_like(W)
        self.forget()

    def forget(self) -> None:
        self.X: list[Tensor] = []
        self.g: list[Tensor] = []
        self.terms: dict[int, int] = {}

    def record(self, x: Tensor, backward_pass: int, g: Tensor) -> None:
        """One use in a backward pass. A second use in a pass adds rows, but no terms."""
        self.X.append(input_rows(self.module, x, g, self.options.kfac_approx))
        self.g.append(gradient_rows(self.module, g, self.options.kfac_approx))
        self.terms[backward_pass] = loss_terms(self.module, g, self.options.loss_average)

    def curvature(self) -> tuple[Tensor, Tensor]:
        """U and G of all micro-batches, as if they were one batch. A summed loss has no scaling."""
        X, g = torch.cat(self.X), torch.cat(self.g)
        terms = 1 if self.options.loss_average is None else sum(self.terms.values())
        return X.T @ X / X.shape[0], g.T @ g * terms

    def update_factors(self, step: int) -> None:
        o, K, C = self.options, self.K, self.C
        Pi_K, Pi_C = partial(project, o.structures[0]), partial(project, o.structures[1])
        U, G = self.curvature()
        H_K, H_C = Pi_K(K.T @ U @ K), Pi_C(C.T @ G @ C)
        KK, CC = Pi_K(K.T @ K), Pi_C(C.T @ C)
        h_K, h_C, kk, cc = (1.0 if o.kfac_like else average_trace(A) for A in (H_K, H_C, KK, CC))
        scale = 0.5 * (1 - self.alpha1 if o.normalize_lr_cov else 1)
        I_K, I_C = torch.eye(len(K), dtype=K.dtype), torch.eye(len(C), dtype=C.dtype)

        self.m_K = self.alpha1 * self.m_K + scale * (h_C * H_K + o.damping * cc * KK - I_K)
        self.m_C = self.alpha1 * self.m_C + scale * (h_K * H_C + o.damping * kk * CC - I_C)
        self.K = K @ expm(-self.beta1(step, self.m_K) * self.m_K, o.expm_order)
        self.C = C @ expm(-self.beta1(step, self.m_C) * self.m_C, o.expm_order)

    def beta1(self, step: int, m: Tensor) -> float:
        o = self.options
        beta1 = o.lr_cov(step) if callable(o.lr_cov) else o.lr_cov
        return beta1 / max(1.0, m.abs().max().item()) if o.normalize_lr_cov else beta1

    def update_parameters(self) -> None:
        o, K, C = self.options, self.K, self.C
        W, gradient = as_matrix(self.module), as_matrix(self.module, grad=True)
        self.M = o.momentum * self.M + C @ C.T @ gradient @ K @ K.T + o.weight_decay * W
        write_matrix(self.module, W - o.lr * self.M)


def average_trace(matrix: Tensor) -> float:
    return matrix.trace().item() / len(matrix)


def expm(matrix: Tensor, order: int) -> Tensor:
    """The exponential series cut after the given order."""
    result = term = torch.eye(len(matrix), dtype=matrix.dtype)
    for n in range(1, order + 1):
        term = term @ matrix / n
        result = result + term
    return result


class ReferenceSINGD:
    """Trains its own float64 copy, ``self.model``, of a model.

    Takes the options of SINGD by name; ``layer_options`` overrides some of them for single layers,
    by module name. Every backward pass has to be started with ``backward``.
    """

    def __init__(
        self, model: nn.Module, layer_options: dict[str, dict] | None = None, **options
    ) -> None:
        self.model = copy.deepcopy(model).double()
        self.step_count = 0
        self.backward_passes = 0
        self.layers: dict[str, Layer] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, SUPPORTED) and any(p.requires_grad for p in module.parameters()):
                overrides = (layer_options or {}).get(name, {})
                self.layers[name] = Layer(module, replace(Options(**options), **overrides))
                module.register_forward_hook(partial(self._watch_output, self.layers[name]))

    def _watch_output(self, layer: Layer, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        x = inputs[0].detach()
        if output.requires_grad:
            output.register_hook(lambda g: layer.record(x, self.backward_passes, g))

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        self.backward_passes += 1
        loss.backward()

    def step(self) -> None:
        for layer in self.layers.values():
            if layer.X:  # a layer that took no part in this step is left alone
                if self.step_count % layer.options.T == 0:
                    layer.update_factors(self.step_count)
                layer.update_parameters()
            layer.forget()
        self.step_count += 1

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (layer.K, layer.C) for name, layer in self.layers.items()}
