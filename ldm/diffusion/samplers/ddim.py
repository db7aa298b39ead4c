"""DDIM: keep the direction to the noise, shrink it to the next level."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ldm.diffusion.samplers.step import Denoise, Noise, Step, ancestral_split, fresh

if TYPE_CHECKING:
    from torch import Tensor


def ddim(
    denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None, eta: float = 0.0
) -> Iterator[Step]:
    """Song et al. 2021, Equation 12, divided by √ᾱ: x ← x0 + √(σ'² − s²)·ε + s·z with ε = (x − x0)/σ.

    In this coordinate s = η σ' √(1 − σ'²/σ²), so that η = 0 is Euler's method and η = 1 is DDPM's posterior.
    """
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        down, up = ancestral_split(sigma, sigma_next, eta)
        x0 = denoise(x, sigma)
        direction = (x - x0) / sigma
        x = x0 + down * direction
        if up > 0:
            x = x + fresh(noise, i, "ddim", x) * up
        yield Step(i, total, sigma_next, x, x0)
