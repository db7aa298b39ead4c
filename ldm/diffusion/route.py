"""A route is where a sampler goes: noise levels, what the network is told at each, and how x starts and ends."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ldm.diffusion.grids import GRIDS
from ldm.diffusion.samplers import Denoise, Noise, Sampler, Step
from ldm.diffusion.schedule import NoiseSchedule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Route:
    """Falling noise levels, and the timestep that the network is told at each but the last.

    x starts as `start` times unit noise, and what the sampler ends with times `finish` is the latent. A program that
    keeps latents at variance one starts at √(1+σ²), and where it stops short of σ = 0 it ends in 1/√(1+σ²).
    `arrivals` are the levels where the steps end, if some step begins elsewhere than the one before it ended.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    start: float
    finish: float = 1.0
    arrivals: tuple[float, ...] | None = None


Spacing = Callable[[NoiseSchedule, int], Route]


def walk(
    sampler: Sampler, denoise: Denoise, initial: "Tensor", route: Route, noise: Noise | None = None
) -> Iterator[Step]:
    """The steps of a sampler along a route, from unit noise to the latent."""
    x = initial * route.start
    steps = sampler(denoise, x, route.sigmas, noise) if route.arrivals is None else _pieces(sampler, denoise, x, route)
    for step in steps:
        last = step.index == step.total - 1 and route.finish != 1.0
        yield replace(step, x=step.x * route.finish) if last else step


def _pieces(sampler: Sampler, denoise: Denoise, x: "Tensor", route: Route) -> Iterator[Step]:
    """A one-step sampler without noise, whose result at one level is taken, at variance one, for the next one's."""
    assert route.arrivals is not None
    total = len(route.arrivals)
    for i, arrival in enumerate(route.arrivals):
        (step,) = sampler(denoise, x, [route.sigmas[i], arrival])
        yield Step(i, total, arrival, step.x, step.denoised)
        x = step.x * ((1 + route.sigmas[i + 1] ** 2) / (1 + arrival**2)) ** 0.5


def ends_in_zero(
    schedule: NoiseSchedule, levels: Sequence[float], told: Sequence[float] | None = None, unit: bool = False
) -> Route:
    """Levels and then 0. `told` are timesteps other than the levels' own; with `unit`, x starts at √(1+σ₀²), not σ₀."""
    timesteps = [schedule.timestep(level) for level in levels] if told is None else told
    start = (1 + levels[0] ** 2) ** 0.5 if unit else levels[0]
    return Route((*map(float, levels), 0.0), tuple(map(float, timesteps)), float(start))


def variance_one(
    schedule: NoiseSchedule, timesteps: Sequence[int], last: float, arrivals: Sequence[float] | None = None
) -> Route:
    """Whole timesteps and then the level `last`, as latents √ᾱ_t x0 + √(1−ᾱ_t) ε walk them, from start to finish."""
    levels = schedule.levels(timesteps)
    start, finish = (1 + levels[0] ** 2) ** 0.5, 1 / (1 + last**2) ** 0.5
    ends = None if arrivals is None else tuple(arrivals)
    return Route((*levels, last), tuple(map(float, timesteps)), start, finish, ends)


def without_least(spacing: Spacing) -> Spacing:
    """One step more, and the last level before the end left out."""

    def spaced(schedule: NoiseSchedule, steps: int) -> Route:
        found = spacing(schedule, steps + 1)
        return replace(found, sigmas=(*found.sigmas[:-2], found.sigmas[-1]), timesteps=found.timesteps[:-1])

    return spaced


def along(grid: Callable[[NoiseSchedule, int], Sequence[float]]) -> Spacing:
    """The route of a grid: from σ₀·noise to 0, the network told the fractional timestep of each level."""
    return lambda schedule, steps: ends_in_zero(schedule, grid(schedule, steps)[:-1])


# Samplers whose author advises against a step at σ_min (k-diffusion #43), and the grids that would make one.
SKIPS_LEAST = ("dpm_2", "dpm_2_ancestral")
ENDS_AT_LEAST = ("linspace", "karras", "exponential", "polyexponential", "kl_optimal", "align_your_steps")


def exact(sampler: str, grid: str) -> Spacing:
    """Ours: exactly the steps asked for on one of our grids."""
    spacing = along(GRIDS[grid])
    return without_least(spacing) if sampler in SKIPS_LEAST and grid in ENDS_AT_LEAST else spacing


def listed(schedule: NoiseSchedule, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None) -> Route:
    """An explicit list: noise levels that end in 0, or timesteps."""
    if sigmas is not None:
        return ends_in_zero(schedule, sigmas[:-1])
    assert timesteps is not None, "give one of the two"
    return ends_in_zero(schedule, schedule.levels(timesteps), timesteps)
