"""Conventions: what programs do differently that draw with the same network, sampler and number of steps.

A convention is a table: sampler → grid → route, and the samplers that the program runs with other options than ours.
Where a program has no such sampler or grid, ours is walked; `reproduces` tells. Adding one is one file and one line.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from ldm.diffusion.conventions import a1111, compvis, diffusers, k_diffusion
from ldm.diffusion.route import Route, Spacing, exact
from ldm.diffusion.samplers import SAMPLERS, Sampler
from ldm.diffusion.samplers.consistency import tcd
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import SettingError


@dataclass(frozen=True)
class Convention:
    """One program's routes, and its samplers where it runs them otherwise than ours run by default."""

    routes: Mapping[str, Mapping[str, Spacing]] = field(default_factory=dict)
    samplers: Mapping[str, Callable[[NoiseSchedule], Sampler]] = field(default_factory=dict)


def _earlier(schedule: NoiseSchedule, sigma: float) -> float:
    """The level at 0.7 times the timestep of σ (Zheng et al. 2024, γ = 0.3)."""
    return schedule.sigma(0.7 * schedule.timestep(sigma)) if sigma > 0.0 else 0.0


# Ours that depend on the noise schedule.
OURS: dict[str, Callable[[NoiseSchedule], Sampler]] = {
    "tcd": lambda schedule: partial(tcd, earlier=partial(_earlier, schedule)),
}

CONVENTIONS: dict[str, Convention] = {
    "exact": Convention(samplers=OURS),
    "compvis": Convention(compvis.ROUTES, compvis.SAMPLERS),
    "diffusers": Convention(diffusers.ROUTES, diffusers.SAMPLERS),
    "k-diffusion": Convention(k_diffusion.ROUTES),
    "a1111": Convention(a1111.ROUTES),
}


def route(convention: str, sampler: str, grid: str, schedule: NoiseSchedule, steps: int) -> Route:
    """The route of a named convention. Raises SettingError for steps that the program itself cannot run."""
    found = CONVENTIONS[convention].routes.get(sampler, {}).get(grid, exact(sampler, grid))(schedule, steps)
    *levels, last = found.sigmas
    falling = levels and all(a > b for a, b in pairwise(levels)) and levels[-1] >= last
    if not falling or max(found.timesteps) > len(schedule) - 1:
        raise SettingError(
            f"steps: {convention} cannot run {sampler} on {grid} in {steps} steps, it would visit a timestep twice or "
            f"none of the model's {len(schedule)}; use another number, or the convention exact"
        )
    return found


def reproduces(convention: str, sampler: str, grid: str) -> bool:
    """Whether the program has this sampler with this grid, so that its own route is walked."""
    return convention == "exact" or grid in CONVENTIONS[convention].routes.get(sampler, {})


def missing(convention: str, sampler: str, grid: str | None) -> str:
    """What to say where the convention asked for has no say, or nothing; `grid` is None for a list of levels."""
    if convention == "exact" or (grid is not None and reproduces(convention, sampler, grid)):
        return ""
    what = "list of levels" if grid is None else f"{sampler} on {grid}"
    return f"{convention} has no {what}: drawn as exact does"


def sampler_of(convention: str, sampler: str, grid: str | None, schedule: NoiseSchedule) -> Sampler:
    """The sampler with the options that the program runs it with; for a list of levels (`grid` None) as ours."""
    theirs = grid is not None and reproduces(convention, sampler, grid)
    configured = CONVENTIONS[convention if theirs else "exact"].samplers.get(sampler)
    return SAMPLERS[sampler] if configured is None else configured(schedule)
