"""DPM-Solver++: as DPM-Solver, but of the clean estimate, which guidance disturbs less than the noise; ODE and SDE.

With h = λ' − λ and λ = −log σ, a step that holds x0 fixed is x ← e⁻ʰ·x + (1 − e⁻ʰ)·x0 where x = x0 + σ·noise. The SDE's
step goes on (1 + η)·h in that formula and adds noise for what it went too far.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from ldm.diffusion.samplers.step import Denoise, Estimate, Noise, Step, ancestral_split, fresh, increment

if TYPE_CHECKING:
    from torch import Tensor


def dpmpp_2s(denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None) -> Iterator[Step]:
    """Lu et al. 2022b, Algorithm 1 with r = ½: the clean estimate in the middle holds for the whole step."""
    return dpmpp_2s_ancestral(denoise, x, sigmas, noise, eta=0.0)


def dpmpp_2s_ancestral(
    denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None, eta: float = 1.0
) -> Iterator[Step]:
    """`dpmpp_2s` to less than the next level, then fresh noise up to it (k-diffusion's `sample_dpmpp_2s_ancestral`)."""
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        down, up = ancestral_split(sigma, sigma_next, eta)
        x, x0 = _second(denoise, x, sigma, down)
        if up > 0:
            x = x + fresh(noise, i, "ancestral", x) * up
        yield Step(i, total, sigma_next, x, x0)


def dpmpp_2m(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    before: Sequence[Estimate] = (),
) -> Iterator[Step]:
    """Lu et al. 2022b, Algorithm 2: the clean estimate carried on to the middle of the step from this and the last one.

    `before` are estimates from above sigmas[0], newest last; without them the first step is of first order.
    """
    total, past = len(sigmas) - 1, list(before)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, sigma)
        past = [*past, Estimate(sigma, x, x0)][-2:]
        x = _towards(x, _carried_on(past, sigma_next), sigma, sigma_next) if sigma_next > 0 else x0
        yield Step(i, total, sigma_next, x, x0)


def dpmpp_sde(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    eta: float = 1.0,
    r: float = 1 / 2,
) -> Iterator[Step]:
    """`dpmpp_2s` on the SDE: the point r of the way has its own noise (k-diffusion's `sample_dpmpp_sde`)."""
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, sigma)
        if sigma_next > 0:
            inside = sigma * (sigma_next / sigma) ** r
            x_inside = _ancestral(x, x0, sigma, inside, eta, noise)
            weight = 1 / (2 * r)
            x0_ahead = (1 - weight) * x0 + weight * denoise(x_inside, inside)
            x = _ancestral(x, x0_ahead, sigma, sigma_next, eta, noise)
        else:
            x = x0
        yield Step(i, total, sigma_next, x, x0)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    eta: float = 1.0,
    solver: Literal["midpoint", "heun"] = "midpoint",
    before: Sequence[Estimate] = (),
) -> Iterator[Step]:
    """Lu et al. 2022b, SDE-DPM-Solver++(2M) (k-diffusion's `sample_dpmpp_2m_sde`): `dpmpp_2m` with noise; so is η = 0.

    `solver` weighs the difference to the last estimate: ½, or the integral of a straight line. `before`: as `dpmpp_2m`.
    """
    total, past = len(sigmas) - 1, list(before)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, sigma)
        past = [*past, Estimate(sigma, x, x0)][-2:]
        if sigma_next > 0:
            far = (1 + eta) * math.log(sigma / sigma_next)
            weight = -math.expm1(-far) / 2 if solver == "midpoint" else 1.0 + math.expm1(-far) / far
            x = math.exp(-far) * x - math.expm1(-far) * x0 + weight * _slope(past, sigma_next)
            x = _with_noise(x, sigma, sigma_next, eta, noise)
        else:
            x = x0
        yield Step(i, total, sigma_next, x, x0)


def dpmpp_3m_sde(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    eta: float = 1.0,
    bend: float = 1 / 2,
    before: Sequence[Estimate] = (),
) -> Iterator[Step]:
    """k-diffusion's `sample_dpmpp_3m_sde`, the multistep DPM-Solver++ of its authors' code with three estimates.

    `bend` is the weight of the second difference. Theirs is ½; 1 integrates the parabola through the three estimates
    and is of third order. `before`: as `dpmpp_2m`.
    """
    total, past = len(sigmas) - 1, list(before)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoise(x, sigma)
        past = [*past, Estimate(sigma, x, x0)][-3:]
        if sigma_next > 0:
            far = (1 + eta) * math.log(sigma / sigma_next)
            line = 1.0 + math.expm1(-far) / far
            slope, curve = _parabola(past, sigma_next)
            x = math.exp(-far) * x - math.expm1(-far) * x0 + line * slope + bend * (1.0 - 2.0 * line / far) * curve
            x = _with_noise(x, sigma, sigma_next, eta, noise)
        else:
            x = x0
        yield Step(i, total, sigma_next, x, x0)


def _second(denoise: Denoise, x: "Tensor", sigma: float, sigma_next: float) -> tuple["Tensor", "Tensor"]:
    """x at σ_next by a second-order step with its middle in log σ, and the clean estimate at σ."""
    x0 = denoise(x, sigma)
    if sigma_next == 0:
        return x0, x0
    middle = (sigma * sigma_next) ** 0.5
    return _towards(x, denoise(_towards(x, x0, sigma, middle), middle), sigma, sigma_next), x0


def _towards(x: "Tensor", x0: "Tensor", sigma: float, sigma_next: float) -> "Tensor":
    """The first-order step e⁻ʰ·x + (1 − e⁻ʰ)·x0 with e⁻ʰ = σ'/σ."""
    return (sigma_next / sigma) * x + (1.0 - sigma_next / sigma) * x0


def _ancestral(x: "Tensor", x0: "Tensor", sigma: float, sigma_next: float, eta: float, noise: Noise | None) -> "Tensor":
    """The first-order step to less than σ_next, then the interval's noise up to it."""
    down, up = ancestral_split(sigma, sigma_next, eta)
    x = _towards(x, x0, sigma, down)
    return x + increment(noise, sigma, sigma_next, x) * up if up > 0 else x


def _with_noise(x: "Tensor", sigma: float, sigma_next: float, eta: float, noise: Noise | None) -> "Tensor":
    """The interval's noise, as much as a step of (1 + η)·h in λ went too far: σ'·√(1 − e^(−2ηh))."""
    if eta == 0:
        return x
    spread = sigma_next * (1.0 - (sigma_next / sigma) ** (2 * eta)) ** 0.5
    return x + increment(noise, sigma, sigma_next, x) * spread


def _carried_on(past: Sequence[Estimate], sigma_next: float) -> "Tensor":
    """The clean estimate in the middle of the step ahead."""
    return past[-1].x0 + _slope(past, sigma_next) / 2


def _slope(past: Sequence[Estimate], sigma_next: float) -> "Tensor | float":
    """How far the clean estimate moves over the step ahead, if it goes on in λ as between the last two."""
    if len(past) == 1:
        return 0.0
    last, here = past[-2:]
    r = math.log(last.sigma / here.sigma) / math.log(here.sigma / sigma_next)
    return (here.x0 - last.x0) / r


def _parabola(past: Sequence[Estimate], sigma_next: float) -> tuple["Tensor | float", "Tensor | float"]:
    """a and b of x0 + a·s + b·s² through the last three estimates, where s goes from 0 to 1 over the step ahead."""
    slope = _slope(past, sigma_next)
    if len(past) < 3:
        return slope, 0.0
    older, last, here = past
    h = math.log(here.sigma / sigma_next)
    r0, r1 = math.log(last.sigma / here.sigma) / h, math.log(older.sigma / last.sigma) / h
    curve = (slope - (last.x0 - older.x0) / r1) / (r0 + r1)
    return slope + r0 * curve, curve
