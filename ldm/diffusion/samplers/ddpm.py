"""DDPM: ancestral sampling, one draw from the posterior at every step."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from ldm.diffusion.samplers.step import Denoise, Noise, Step, fresh

if TYPE_CHECKING:
    from torch import Tensor


def ddpm(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    variance: Literal["posterior", "beta"] = "posterior",
) -> Iterator[Step]:
    """Ho et al. 2020, Algorithm 2, with x divided by √ᾱ: the mean is x0 + (σ'²/σ²)(x − x0) (their Equation 7).

    Variance: of the posterior, σ'²(1 − σ'²/σ²) (their β̃), or β, which is larger by (1 + σ'²)σ²/((1 + σ²)σ'²).
    Made for all T timesteps (`leading` or `trailing` with steps = T); correct for any falling grid.
    """
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        kept = sigma_next**2 / sigma**2
        x0 = denoise(x, sigma)
        x = x0 + kept * (x - x0)
        spread = sigma_next**2 if variance == "posterior" else sigma**2 * (1 + sigma_next**2) / (1 + sigma**2)
        if sigma_next > 0:
            x = x + fresh(noise, i, "ddpm", x) * (spread * (1.0 - kept)) ** 0.5
        yield Step(i, total, sigma_next, x, x0)
