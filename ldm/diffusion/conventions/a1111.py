"""AUTOMATIC1111's web UI: sd_schedulers.py over k-diffusion's samplers, and sd_samplers_timesteps_impl.py."""

import numpy as np

from ldm.diffusion.grids import ALIGNED, GRIDS, aligned_levels, beta_quantiles
from ldm.diffusion.route import Route, Spacing, along, variance_one, without_least
from ldm.diffusion.schedule import NoiseSchedule

SAMPLERS = (
    *("euler", "euler_ancestral", "heun", "lms", "dpmpp_2s_ancestral"),
    *("dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde"),
)
# Those where the level before the last is left out, on every grid.
SKIP_LEAST = ("dpm_2", "dpm_2_ancestral", "dpmpp_3m_sde")


def uniform(schedule: NoiseSchedule, steps: int) -> Route:
    """CompVis' timesteps, clipped to the last one; the step from the lowest is not made, so that it ends there."""
    timesteps = [min(t + 1, len(schedule) - 1) for t in range(0, len(schedule), len(schedule) // steps)]
    if len(timesteps) == 1:
        return Route((schedule.sigma(timesteps[0]),), (), 1.0)  # it makes no step at all
    return variance_one(schedule, timesteps[:0:-1], schedule.sigma(timesteps[0]))


def ddim(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Every ⌊T/S⌋-th timestep from 1, as many as there are."""
    timesteps = range(1, len(schedule), max(len(schedule) // steps, 1))
    return [*schedule.levels(timesteps[::-1]), 0.0]


def beta(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Quantiles of σ, where the paper has quantiles of the timestep."""
    quantiles = beta_quantiles(1 - np.linspace(0, 1, steps))
    return [*(float(s) for s in schedule.sigma_min + (schedule.sigma_max - schedule.sigma_min) * quantiles), 0.0]


def align_your_steps(schedule: NoiseSchedule, steps: int) -> list[float]:
    """The published levels as they are; a single step starts at the lowest."""
    return [*(float(s) for s in (aligned_levels(steps) if steps > 1 else ALIGNED[-1:])), 0.0]


def kl_optimal(schedule: NoiseSchedule, steps: int) -> Route:
    """S + 1 levels without a 0 behind them: it ends at σ_min."""
    levels = np.tan(np.linspace(np.arctan(schedule.sigma_max), np.arctan(schedule.sigma_min), steps + 1))
    told = tuple(schedule.timestep(float(level)) for level in levels[:-1])
    return Route(tuple(map(float, levels)), told, float(levels[0]))


SPACINGS: dict[str, Spacing] = {
    **{name: along(GRIDS[name]) for name in ("linspace", "karras", "exponential", "polyexponential")},
    **{name: along(GRIDS[name]) for name in ("sgm_uniform", "simple")},
    "ddim_uniform": along(ddim),
    "beta": along(beta),
    "align_your_steps": along(align_your_steps),
    "kl_optimal": kl_optimal,
}

SKIPPING = {name: without_least(spacing) for name, spacing in SPACINGS.items()}

ROUTES: dict[str, dict[str, Spacing]] = {
    **dict.fromkeys(SAMPLERS, SPACINGS),
    **dict.fromkeys(SKIP_LEAST, SKIPPING),
    "ddim": {"leading": uniform},
    "plms": {"leading": uniform},
}
