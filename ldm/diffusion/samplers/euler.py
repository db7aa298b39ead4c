"""Euler's method on the probability-flow ODE dx/dσ = (x − x0(x, σ))/σ, and its ancestral variant."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ldm.diffusion.samplers.step import Denoise, Noise, Step, ancestral_split, fresh

if TYPE_CHECKING:
    from torch import Tensor


def euler(denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None) -> Iterator[Step]:
    """Karras et al. 2022, Algorithm 1 without its correction."""
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, sigma)
        slope = (x - x0) / sigma
        x = x + slope * (sigma_next - sigma)
        yield Step(i, total, sigma_next, x, x0)


def euler_ancestral(
    denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None, eta: float = 1.0
) -> Iterator[Step]:
    """Euler down to less than the next level, then fresh noise up to it (k-diffusion's `sample_euler_ancestral`)."""
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        down, up = ancestral_split(sigma, sigma_next, eta)
        x0 = denoise(x, sigma)
        slope = (x - x0) / sigma
        x = x + slope * (down - sigma)
        if up > 0:
            x = x + fresh(noise, i, "ancestral", x) * up
        yield Step(i, total, sigma_next, x, x0)
