"""Linear multistep methods: the noise ε = dx/dσ of the last steps, carried on over the next one.

They differ in the variable in which ε is taken for a polynomial: σ (LMS), log σ (DEIS), or the number of the step
(PLMS, iPNDM), whose weights are the same on every grid.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ldm.diffusion.samplers.adams import adams_weights
from ldm.diffusion.samplers.step import Denoise, Estimate, Noise, Step

if TYPE_CHECKING:
    from torch import Tensor

# Adams–Bashforth for even steps, orders 1 to 4, oldest first.
EVEN_STEPS: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (-1 / 2, 3 / 2),
    (5 / 12, -16 / 12, 23 / 12),
    (-9 / 24, 37 / 24, -59 / 24, 55 / 24),
)


def lms(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    order: int = 4,
    before: Sequence[Estimate] = (),
) -> Iterator[Step]:
    """Adams–Bashforth with uneven steps: ε is a polynomial in σ (k-diffusion's `sample_lms`).

    `before` are estimates from above sigmas[0], newest last; without them the order grows from 1.
    """
    total, past = len(sigmas) - 1, list(before)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, sigma)
        past = [*past, Estimate(sigma, x, x0)][-order:]
        x = x + _combined(past, adams_weights([known.sigma for known in past], sigma, sigma_next))
        yield Step(i, total, sigma_next, x, x0)


def deis(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    order: int = 3,
    lower_order_final: bool = False,
    before: Sequence[Estimate] = (),
) -> Iterator[Step]:
    """Zhang & Chen 2023, ρAB-DEIS, with ε a polynomial in log σ as diffusers has it.

    A step to 0 goes to the clean estimate. `lower_order_final` lowers the order of the last steps down to 1 in walks of
    less than 15 steps, as diffusers does. `before` is as in `lms`.
    """
    total, past = len(sigmas) - 1, list(before)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, sigma)
        past = [*past, Estimate(sigma, x, x0)][-order:]
        used = past[-(total - i) :] if lower_order_final and total < 15 else past
        if sigma_next > 0:
            nodes = [math.log(known.sigma) for known in used]
            x = x + _combined(used, adams_weights(nodes, math.log(sigma), math.log(sigma_next), math.exp))
        else:
            x = x0
        yield Step(i, total, sigma_next, x, x0)


def ipndm(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    order: int = 4,
    before: Sequence[Estimate] = (),
) -> Iterator[Step]:
    """PNDM without its warm-up, the "iPNDM" of Zhang & Chen 2023: the order grows from 1 instead.

    `before` is as in `lms`.
    """
    total, past = len(sigmas) - 1, list(before)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, sigma)
        past = [*past, Estimate(sigma, x, x0)][-order:]
        x = x + (sigma_next - sigma) * _combined(past, EVEN_STEPS[len(past) - 1])
        yield Step(i, total, sigma_next, x, x0)


def plms(denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None) -> Iterator[Step]:
    """The pseudo linear multistep method of Liu et al. 2022: `ipndm`, but the first step is Heun's, for one call more.

    As CompVis and diffusers have it, which leave out the Runge–Kutta steps that the paper starts with.
    """
    total, past = len(sigmas) - 1, list[Estimate]()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, sigma)
        past = [*past, Estimate(sigma, x, x0)][-4:]
        slope = _combined(past, EVEN_STEPS[len(past) - 1])
        if i == 0 and sigma_next > 0:
            there = x + (sigma_next - sigma) * slope
            slope = (slope + (there - denoise(there, sigma_next)) / sigma_next) / 2
        x = x + (sigma_next - sigma) * slope
        yield Step(i, total, sigma_next, x, x0)


def _combined(past: Sequence[Estimate], weights: Sequence[float]) -> "Tensor":
    """Σ wⱼ·εⱼ over the estimates, oldest first."""
    terms = [weight * known.slope for weight, known in zip(weights, past, strict=True)]
    return sum(terms[1:], start=terms[0])
