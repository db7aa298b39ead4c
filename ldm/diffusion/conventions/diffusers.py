"""diffusers: its schedulers, with steps_offset 1, set_alpha_to_one and clip_sample off, as Stable Diffusion has them.

They space timesteps alike and do the rest in four ways: DDIM's, DDPM's, that of k-diffusion's descendants, and that of
the multistep solvers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from ldm.diffusion.grids import beta_quantiles, karras_levels
from ldm.diffusion.route import Route, Spacing, ends_in_zero, variance_one
from ldm.diffusion.samplers import Sampler
from ldm.diffusion.samplers.consistency import tcd
from ldm.diffusion.samplers.linear_multistep import deis
from ldm.diffusion.samplers.unipc import unipc
from ldm.diffusion.schedule import NoiseSchedule

Timesteps = Callable[[int, int], list[float]]
Shape = Callable[[float, float, int], Sequence[float]]


def leading(timesteps: int, steps: int) -> list[float]:
    """1 + i·⌊T/S⌋."""
    return [1.0 + i * (timesteps // steps) for i in reversed(range(steps))]


def trailing(timesteps: int, steps: int) -> list[float]:
    """T − i·T/S, rounded, − 1. For 62 of 1,000 numbers of steps, rounding adds a timestep −1, left out here."""
    return [float(t) - 1 for t in np.arange(timesteps, 0, -timesteps / steps).round() if t > 0]


def linspace(timesteps: int, steps: int) -> list[float]:
    """Evenly from T − 1 to 0, fractional."""
    return [float(t) for t in np.linspace(0, timesteps - 1, steps)[::-1]]


def without_lowest(spaced: Timesteps) -> Timesteps:
    """The same for one step more, without the lowest."""
    return lambda timesteps, steps: spaced(timesteps, steps + 1)[:-1]


def karras(high: float, low: float, steps: int) -> list[float]:
    """Evenly in σ^(1/7)."""
    return [float(level) for level in karras_levels(high, low, steps)]


def exponential(high: float, low: float, steps: int) -> list[float]:
    """Evenly in log σ."""
    return [float(level) for level in np.exp(np.linspace(np.log(high), np.log(low), steps))]


def beta(high: float, low: float, steps: int) -> list[float]:
    """Quantiles of σ."""
    return [float(level) for level in low + (high - low) * beta_quantiles(1 - np.linspace(0, 1, steps))]


SPACINGS: dict[str, Timesteps] = {"leading": leading, "trailing": trailing, "linspace": linspace}
SHAPES: dict[str, Shape] = {"karras": karras, "exponential": exponential, "beta": beta}


def ddim(schedule: NoiseSchedule, steps: int, spaced: Timesteps) -> Route:
    """Whole timesteps; a step arrives at t − ⌊T/S⌋, also where the next begins elsewhere, and the last one at ᾱ₀."""
    timesteps = [round(t) for t in spaced(len(schedule), steps)]
    stride = len(schedule) // steps
    arrivals = [schedule.sigma(t - stride) if t >= stride else schedule.sigma_min for t in timesteps]
    chained = all(t - stride == after for t, after in pairwise(timesteps))
    return variance_one(schedule, timesteps, arrivals[-1], None if chained else arrivals)


def ddpm(schedule: NoiseSchedule, steps: int, spaced: Timesteps) -> Route:
    """Whole timesteps, one after the other, and then 0."""
    return variance_one(schedule, [round(t) for t in spaced(len(schedule), steps)], 0.0)


def descendant(schedule: NoiseSchedule, steps: int, spaced: Timesteps, shape: Shape | None = None) -> Route:
    """σ linear between whole timesteps, or shaped between the first and last; `leading` starts at √(1+σ₀²), not σ₀."""
    told = spaced(len(schedule), steps)
    levels = [float(s) for s in np.interp(told, np.arange(len(schedule)), schedule.sigmas)]
    if shape is None:
        return ends_in_zero(schedule, levels, told, unit=spaced is leading)
    return ends_in_zero(schedule, shape(levels[0], levels[-1], steps), unit=spaced is leading)


def rounded(spacing: Spacing) -> Spacing:
    """The network is told whole timesteps, the levels stay."""

    def spaced(schedule: NoiseSchedule, steps: int) -> Route:
        found = spacing(schedule, steps)
        return Route(found.sigmas, tuple(float(round(timestep)) for timestep in found.timesteps), found.start)

    return spaced


def multistep(schedule: NoiseSchedule, steps: int, spaced: Timesteps, to_zero: bool = True) -> Route:
    """Whole timesteps, and then 0 or ᾱ₀."""
    last = 0.0 if to_zero else schedule.sigma_min
    return variance_one(schedule, [round(t) for t in spaced(len(schedule), steps)], last)


def multistep_shaped(schedule: NoiseSchedule, steps: int, shape: Shape, whole: Callable[[float], int]) -> Route:
    """Levels over the schedule's whole range, of which the network is told whole timesteps."""
    levels = shape(schedule.sigma_max, schedule.sigma_min, steps)
    return ends_in_zero(schedule, levels, [whole(schedule.timestep(level)) for level in levels], unit=True)


def cut(timestep: float) -> int:
    """The whole timestep below. The noisiest is 999 only to single precision, and becomes 998."""
    return max(0, int(timestep - 1e-4))


def distilled(schedule: NoiseSchedule, steps: int, to_zero: bool = True) -> Route:
    """Of the 50 timesteps that latent consistency models are distilled on, every ⌊50·i/S⌋-th from the noisiest."""
    known = [(i + 1) * (len(schedule) // 50) - 1 for i in reversed(range(50))]
    last = 0.0 if to_zero else schedule.sigma_min
    return variance_one(schedule, [known[int(i * (50 / steps))] for i in range(steps)], last)


# With its options, where they are not our defaults.
SAMPLERS: dict[str, Callable[[NoiseSchedule], Sampler]] = {
    "deis": lambda schedule: partial(deis, order=2, lower_order_final=True),
    "unipc": lambda schedule: partial(unipc, lower_order_final=True),
    "tcd": lambda schedule: partial(tcd, earlier=lambda sigma: schedule.sigma(int(0.7 * schedule.timestep(sigma)))),
}

DDIM: dict[str, Spacing] = {name: partial(ddim, spaced=spaced) for name, spaced in SPACINGS.items()}
DDPM: dict[str, Spacing] = {name: partial(ddpm, spaced=spaced) for name, spaced in SPACINGS.items()}
SPACED: dict[str, Spacing] = {name: partial(descendant, spaced=spaced) for name, spaced in SPACINGS.items()}
SHAPED: dict[str, Spacing] = {
    **{name: partial(descendant, spaced=linspace, shape=shape) for name, shape in SHAPES.items()},
    "leading_karras": partial(descendant, spaced=leading, shape=karras),
}
MULTISTEP_TIMESTEPS = {
    "leading": without_lowest(leading),
    "trailing": trailing,
    "linspace": without_lowest(linspace),
}
MULTISTEP: dict[str, Spacing] = {
    **{name: partial(multistep, spaced=spaced) for name, spaced in MULTISTEP_TIMESTEPS.items()},
    "karras": partial(multistep_shaped, shape=karras, whole=round),
    "exponential": partial(multistep_shaped, shape=exponential, whole=cut),
    "beta": partial(multistep_shaped, shape=beta, whole=cut),
}

SPACED_OR_SHAPED = {**SPACED, **SHAPED}
ROUNDED = {**SPACED_OR_SHAPED, **{name: rounded(SHAPED[name]) for name in ("karras", "leading_karras")}}
DEIS = {name: partial(multistep, spaced=spaced, to_zero=False) for name, spaced in MULTISTEP_TIMESTEPS.items()}

ROUTES: Mapping[str, Mapping[str, Spacing]] = {
    "ddim": DDIM,
    "plms": {"leading": DDIM["leading"]},
    "ddpm": DDPM,
    "euler_ancestral": SPACED,
    **dict.fromkeys(("euler", "heun", "lms", "dpmpp_sde"), SPACED_OR_SHAPED),
    **dict.fromkeys(("dpm_2", "dpm_2_ancestral"), ROUNDED),
    **dict.fromkeys(("dpmpp_2m", "dpmpp_2m_sde", "unipc"), MULTISTEP),
    "deis": DEIS,
    "lcm": {"leading": distilled},
    "tcd": {"leading": partial(distilled, to_zero=False)},
}
