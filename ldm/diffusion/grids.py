"""Grids: the noise levels that a sampler visits, from high to low, as many as steps were asked for, and then 0."""

from collections.abc import Callable, Sequence

import numpy as np

from ldm.diffusion.schedule import Array, NoiseSchedule

Grid = Callable[[NoiseSchedule, int], list[float]]

# Sabour et al. 2024, for Stable Diffusion 1: ten steps between eleven levels.
ALIGNED = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


# Evenly in the timestep.


def leading(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Timesteps 1 + i·⌊T/S⌋: DDIM's own spacing (Song et al. 2021), which never starts at the noisiest level."""
    return _at(schedule, _from_one(schedule, [i * (len(schedule) // steps) for i in range(steps)]))


def ddim_uniform(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Timesteps 1 + ⌊i·T/S⌋: ComfyUI's name for `leading`, here also where S does not divide T."""
    return _at(schedule, _from_one(schedule, [i * len(schedule) // steps for i in range(steps)]))


def trailing(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Timesteps T − 1, T − 1 − T/S, …: starts at the noisiest level (Lin et al. 2024, Section 3.3)."""
    return _at(schedule, [round(len(schedule) * (1 - i / steps)) - 1 for i in range(steps)])


def simple(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Timesteps T − 1 − ⌊i·T/S⌋ (ComfyUI): `trailing`, rounded upwards."""
    return _at(schedule, [len(schedule) - 1 - int(i * (len(schedule) / steps)) for i in range(steps)])


def linspace(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Timesteps evenly from T − 1 to 0, fractional (k-diffusion's default; elsewhere "normal" and "uniform")."""
    return _at(schedule, np.linspace(len(schedule) - 1, 0, steps))


def sgm_uniform(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Timesteps evenly from T − 1 to one step above 0, fractional (Stability's generative-models)."""
    return _at(schedule, np.linspace(len(schedule) - 1, 0, steps + 1)[:-1])


def beta(schedule: NoiseSchedule, steps: int, alpha: float = 0.6) -> list[float]:
    """Timesteps at the quantiles of a Beta(α, α) distribution, dense at both ends (Lee et al. 2024, Section 3.3)."""
    return _at(schedule, (len(schedule) - 1) * beta_quantiles(1 - np.arange(steps) / steps, alpha))


# Evenly in a function of σ, over the schedule's full range.


def karras(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Evenly in σ^(1/7) (Karras et al. 2022, Equation 5)."""
    return _ended(karras_levels(schedule.sigma_max, schedule.sigma_min, steps))


def leading_karras(schedule: NoiseSchedule, steps: int) -> list[float]:
    """`karras` between the highest and the lowest level of `leading`."""
    spaced = leading(schedule, steps)
    return _ended(karras_levels(spaced[0], spaced[-2], steps))


def exponential(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Evenly in log σ (k-diffusion)."""
    return polyexponential(schedule, steps)


def polyexponential(schedule: NoiseSchedule, steps: int, rho: float = 1.0) -> list[float]:
    """Evenly in (log σ/σ_min)^(1/ρ): denser at the low end for ρ > 1; k-diffusion's default ρ = 1 is `exponential`."""
    ramp = np.linspace(1, 0, steps) ** rho
    return _ended(schedule.sigma_min * (schedule.sigma_max / schedule.sigma_min) ** ramp)


def kl_optimal(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Evenly in arctan σ (Sabour et al. 2024, Theorem 3.1)."""
    return _ended(np.tan(np.linspace(np.arctan(schedule.sigma_max), np.arctan(schedule.sigma_min), steps)))


def align_your_steps(schedule: NoiseSchedule, steps: int) -> list[float]:
    """The levels that Sabour et al. 2024 optimised for Stable Diffusion 1, linear in log σ between them.

    They are stretched to the schedule's range; for Stable Diffusion's own that is less than 0.6 %.
    """
    levels = np.log(aligned_levels(steps) / ALIGNED[-1]) / np.log(ALIGNED[0] / ALIGNED[-1])
    return _ended(schedule.sigma_min * (schedule.sigma_max / schedule.sigma_min) ** levels)


GRIDS: dict[str, Grid] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "karras": karras,
    "leading_karras": leading_karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "ddim_uniform": ddim_uniform,
    "beta": beta,
    "kl_optimal": kl_optimal,
    "align_your_steps": align_your_steps,
}


# What the conventions of other programs are made of too.


def karras_levels(high: float, low: float, steps: int, rho: float = 7.0) -> Array:
    """Levels from `high` to `low`, evenly in σ^(1/ρ)."""
    return np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho


def aligned_levels(steps: int) -> Array:
    """ALIGNED with `steps` levels, linear in log σ between the given ones."""
    given = np.linspace(0, 1, len(ALIGNED))
    return np.exp(np.interp(np.linspace(0, 1, steps), given, np.log(ALIGNED)))


def beta_quantiles(shares: Array, alpha: float = 0.6) -> Array:
    """The values below which these shares of a Beta(α, α) distribution lie."""
    from scipy.special import betaincinv  # takes a third of a second to import

    return np.asarray(betaincinv(alpha, alpha, shares), dtype=np.float64)


def _from_one(schedule: NoiseSchedule, rising: list[int]) -> list[int]:
    """From high to low, one timestep up where there is one: DDIM's indices start at 1."""
    offset = min(1, len(schedule) - 1 - rising[-1])
    return [offset + t for t in reversed(rising)]


def _at(schedule: NoiseSchedule, timesteps: Sequence[float] | Array) -> list[float]:
    return [*schedule.levels(timesteps), 0.0]


def _ended(levels: Array) -> list[float]:
    return [*(float(level) for level in levels), 0.0]
