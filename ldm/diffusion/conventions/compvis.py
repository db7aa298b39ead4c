"""CompVis' stable-diffusion: ddim.py, plms.py and dpm_solver.py, with latents at variance one that end at ᾱ₀."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ldm.diffusion.route import Route, Spacing, variance_one
from ldm.diffusion.samplers import Denoise, Noise, Sampler, Step
from ldm.diffusion.samplers.dpmpp import dpmpp_2m
from ldm.diffusion.samplers.euler import euler
from ldm.diffusion.schedule import NoiseSchedule

if TYPE_CHECKING:
    from torch import Tensor


def uniform(schedule: NoiseSchedule, steps: int) -> Route:
    """Every ⌊T/S⌋-th timestep from 1, however many these are: 31 for 30. For 599 of 1,000 numbers, T is among them."""
    timesteps = [t + 1 for t in range(0, len(schedule), len(schedule) // steps)]
    return variance_one(schedule, timesteps[::-1], schedule.sigma_min)


def time_uniform(schedule: NoiseSchedule, steps: int) -> Route:
    """S + 1 levels evenly in the timestep, log ᾱ linear between whole ones."""
    timesteps = np.linspace(len(schedule) - 1, 0, steps + 1)
    log_alphas = np.interp(timesteps, np.arange(len(schedule)), np.log(schedule.alphas_cumprod))
    levels = [float(level) for level in np.sqrt(np.expm1(-log_alphas))]
    start, finish = (1 + levels[0] ** 2) ** 0.5, 1 / (1 + levels[-1] ** 2) ** 0.5
    return Route(tuple(levels), tuple(map(float, timesteps[:-1])), start, finish)


def dpm_solver(denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None) -> Iterator[Step]:
    """`dpmpp_2m`, whose last step is of first order in walks of less than 15 steps."""
    total = len(sigmas) - 1
    if total >= 15:
        yield from dpmpp_2m(denoise, x, sigmas)
        return
    for step in dpmpp_2m(denoise, x, sigmas[:-1]):
        x = step.x
        yield Step(step.index, total, step.sigma, x, step.denoised)
    (last,) = euler(denoise, x, sigmas[-2:])
    yield Step(total - 1, total, last.sigma, last.x, last.denoised)


SAMPLERS: dict[str, Callable[[NoiseSchedule], Sampler]] = {"dpmpp_2m": lambda schedule: dpm_solver}

ROUTES: dict[str, dict[str, Spacing]] = {
    "ddim": {"leading": uniform},
    "plms": {"leading": uniform},
    "dpmpp_2m": {"linspace": time_uniform},
}
