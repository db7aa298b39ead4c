"""k-diffusion's second-order samplers after DPM-Solver-2: the midpoint method with the middle taken in log σ."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ldm.diffusion.samplers.step import Denoise, Noise, Step, ancestral_split, fresh

if TYPE_CHECKING:
    from torch import Tensor


def dpm_2(denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None) -> Iterator[Step]:
    """To σ_next along the slope in the middle (k-diffusion's `sample_dpm_2`)."""
    return dpm_2_ancestral(denoise, x, sigmas, noise, eta=0.0)


def dpm_2_ancestral(
    denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None, eta: float = 1.0
) -> Iterator[Step]:
    """`dpm_2` down to less than the next level, then fresh noise up to it (`sample_dpm_2_ancestral`)."""
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        down, up = ancestral_split(sigma, sigma_next, eta)
        x, x0 = _midpoint(denoise, x, sigma, down)
        if up > 0:
            x = x + fresh(noise, i, "ancestral", x) * up
        yield Step(i, total, sigma_next, x, x0)


def _midpoint(denoise: Denoise, x: "Tensor", sigma: float, sigma_next: float) -> tuple["Tensor", "Tensor"]:
    """x at σ_next, and the clean estimate at σ; a step to 0, which has no middle in log σ, is Euler's."""
    x0 = denoise(x, sigma)
    slope = (x - x0) / sigma
    if sigma_next > 0:
        middle = (sigma * sigma_next) ** 0.5
        half_way = x + (middle - sigma) * slope
        slope = (half_way - denoise(half_way, middle)) / middle
    return x + (sigma_next - sigma) * slope, x0
