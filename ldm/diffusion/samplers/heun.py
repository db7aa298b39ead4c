"""Heun's method: an Euler step, then the same step along the mean of the slopes at both its ends."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ldm.diffusion.samplers.step import Denoise, Noise, Step, fresh

if TYPE_CHECKING:
    from torch import Tensor


def heun(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    churn: float = 0.0,
    churn_interval: tuple[float, float] = (0.0, float("inf")),
    churn_noise: float = 1.0,
) -> Iterator[Step]:
    """Karras et al. 2022, Algorithm 1, and with `churn` (their S_churn) Algorithm 2.

    Inside `churn_interval` (S_tmin, S_tmax) a step first raises σ by the share γ. `churn_noise` is S_noise.
    """
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(churn / total, 2**0.5 - 1) if churn_interval[0] <= sigma <= churn_interval[1] else 0.0
        raised = sigma * (1.0 + gamma)
        if gamma > 0:
            x = x + fresh(noise, i, "churn", x) * (churn_noise * (raised**2 - sigma**2) ** 0.5)
        x, x0 = heun_step(denoise, x, raised, sigma_next)
        yield Step(i, total, sigma_next, x, x0)


def heun_step(denoise: Denoise, x: "Tensor", sigma: float, sigma_next: float) -> tuple["Tensor", "Tensor"]:
    """x at σ_next, and the clean estimate at σ; a step to 0 is Euler's, since there is no slope at 0."""
    x0 = denoise(x, sigma)
    slope = (x - x0) / sigma
    there = x + (sigma_next - sigma) * slope
    if sigma_next == 0:
        return there, x0
    slope_there = (there - denoise(there, sigma_next)) / sigma_next
    return x + (sigma_next - sigma) * (slope + slope_there) / 2, x0
