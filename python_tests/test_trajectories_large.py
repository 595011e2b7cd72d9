"""Layers beyond the sizes where the code changes its way: threads, FFTs, chunks of rows."""

import pytest
import torch
from cases import Case
from reference.masks import SPECS
from torch import nn
from trajectories import check

# More rows than a chunk holds (512).
WIDE = Case(lambda: [nn.Linear(70, 66)], 20, (200, 70), loss_scale=20.0, input_scale=0.5)
# Toeplitz products switch to the FFT beyond 256.
LONG = Case(lambda: [nn.Linear(270, 258)], 20, (3, 270), loss_scale=20.0, input_scale=0.25)
# One step's patches are 4.7 million numbers, more than are formed at once.
BIG_CONVOLUTION = Case(
    lambda: [nn.Conv2d(3, 4, 5, stride=2)], 18, (3, 120, 124), loss_scale=20.0, input_scale=0.5
)
DEFAULT_SIZES = ["block_diagonal", "rank_triu", "rank_tril", "hierarchical"]


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("spec", [*SPECS, *DEFAULT_SIZES])
def test_wide_linear_layer_on_three_threads(spec: str, kfac_approx: str, threads: None) -> None:
    torch.set_num_threads(3)
    check(WIDE, WIDE.steps(6), structures=(spec, spec), kfac_approx=kfac_approx)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("spec", ["triu_toeplitz", "tril_toeplitz"])
def test_long_toeplitz_factors_through_the_fft(spec: str, kfac_approx: str) -> None:
    check(LONG, LONG.steps(6), structures=(spec, spec), kfac_approx=kfac_approx)


@pytest.mark.parametrize("pair", [("hierarchical", "triu"), ("diagonal", "rank_triu_topleft:2")])
def test_big_convolution_in_chunks(pair: tuple[str, str]) -> None:
    check(BIG_CONVOLUTION, BIG_CONVOLUTION.steps(3), structures=pair)
