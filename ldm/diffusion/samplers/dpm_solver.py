"""DPM-Solver: the part of the ODE that is linear in x solved exactly, the rest by Taylor's series in λ = −log σ.

In the coordinate x = x0 + σ·noise the paper's α is 1.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ldm.diffusion.samplers.step import Denoise, Noise, Step

if TYPE_CHECKING:
    from torch import Tensor


def dpm_solver_1(denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None) -> Iterator[Step]:
    """Lu et al. 2022a, Equation 3.7, which is DDIM."""
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, sigma)
        x = first(x, (x - x0) / sigma, sigma, sigma_next) if sigma_next > 0 else x0
        yield Step(i, total, sigma_next, x, x0)


def dpm_solver_2(
    denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None, r1: float = 1 / 2
) -> Iterator[Step]:
    """Lu et al. 2022a, Algorithm 1, where r₁ = ½: two calls a step, the second r₁ of the way in λ."""
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, sigma)
        x = second(denoise, x, (x - x0) / sigma, sigma, sigma_next, r1) if sigma_next > 0 else x0
        yield Step(i, total, sigma_next, x, x0)


def dpm_solver_3(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    r1: float = 1 / 3,
    r2: float = 2 / 3,
) -> Iterator[Step]:
    """Lu et al. 2022a, Algorithm 2: three calls a step, the second and third r₁ and r₂ of the way in λ."""
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, sigma)
        x = third(denoise, x, (x - x0) / sigma, sigma, sigma_next, r1, r2)[0] if sigma_next > 0 else x0
        yield Step(i, total, sigma_next, x, x0)


def dpm_fast(denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None) -> Iterator[Step]:
    """Lu et al. 2022a, DPM-Solver-fast: as many calls as the grid has steps, in third-order steps and lower last ones.

    Of the grid it takes the number of steps and the ends: its own steps are even in λ. A grid that ends in 0 gives the
    last call to the step from its last level to 0. (k-diffusion's `sample_dpm_fast`.)
    """
    levels = [sigma for sigma in sigmas if sigma > 0]
    orders = orders_of_fast(len(levels) - 1)
    total = len(orders) + (sigmas[-1] == 0)
    for i, order in enumerate(orders):
        sigma = levels[0] * (levels[-1] / levels[0]) ** (i / len(orders))
        sigma_next = levels[0] * (levels[-1] / levels[0]) ** ((i + 1) / len(orders))
        x0 = denoise(x, sigma)
        slope = (x - x0) / sigma
        if order == 1:
            x = first(x, slope, sigma, sigma_next)
        elif order == 2:
            x = second(denoise, x, slope, sigma, sigma_next)
        else:
            x = third(denoise, x, slope, sigma, sigma_next)[0]
        yield Step(i, total, sigma_next, x, x0)
    if sigmas[-1] == 0:
        x = denoise(x, levels[-1])
        yield Step(total - 1, total, 0.0, x, x)


def orders_of_fast(calls: int) -> list[int]:
    """Orders of the steps that together make so many calls: 3, 3, … and at the end 2, 1, or 2 and 1."""
    full, left = divmod(calls, 3)
    return [3] * full + [left] if left else [3] * (full - 1) + [2, 1] if full else []


def first(x: "Tensor", slope: "Tensor", sigma: float, sigma_next: float) -> "Tensor":
    """DPM-Solver-1 from σ to σ_next, both above 0."""
    h = math.log(sigma / sigma_next)
    return x - sigma_next * math.expm1(h) * slope


def second(
    denoise: Denoise, x: "Tensor", slope: "Tensor", sigma: float, sigma_next: float, r1: float = 1 / 2
) -> "Tensor":
    """DPM-Solver-2 from σ, where the slope is known, to σ_next."""
    h = math.log(sigma / sigma_next)
    difference = _inner(denoise, first(x, slope, sigma, sigma * math.exp(-r1 * h)), sigma * math.exp(-r1 * h)) - slope
    return first(x, slope, sigma, sigma_next) - sigma_next / (2 * r1) * math.expm1(h) * difference


def third(
    denoise: Denoise,
    x: "Tensor",
    slope: "Tensor",
    sigma: float,
    sigma_next: float,
    r1: float = 1 / 3,
    r2: float = 2 / 3,
) -> tuple["Tensor", "Tensor"]:
    """DPM-Solver-3 from σ, where the slope is known, to σ_next; and DPM-Solver-2 with r₁, which it contains."""
    h = math.log(sigma / sigma_next)
    sigma_1, sigma_2 = sigma * math.exp(-r1 * h), sigma * math.exp(-r2 * h)
    difference_1 = _inner(denoise, first(x, slope, sigma, sigma_1), sigma_1) - slope
    bend = sigma_2 * (r2 / r1) * (math.expm1(r2 * h) / (r2 * h) - 1.0)
    difference_2 = _inner(denoise, first(x, slope, sigma, sigma_2) - bend * difference_1, sigma_2) - slope
    straight = first(x, slope, sigma, sigma_next)
    order_2 = straight - sigma_next / (2 * r1) * math.expm1(h) * difference_1
    order_3 = straight - sigma_next / r2 * (math.expm1(h) / h - 1.0) * difference_2
    return order_3, order_2


def _inner(denoise: Denoise, x: "Tensor", sigma: float) -> "Tensor":
    """The slope at a point inside a step."""
    return (x - denoise(x, sigma)) / sigma
