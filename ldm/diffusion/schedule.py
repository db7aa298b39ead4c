"""Noise schedules (β → ᾱ → σ) and the grids of noise levels that a sampler visits.

Everywhere else a noisy latent is x = x0 + σ·noise. Discrete timesteps and ᾱ exist only here and in the denoiser:
x_t = √ᾱ_t x0 + √(1−ᾱ_t) ε is that x times √ᾱ_t, with σ_t = √((1−ᾱ_t)/ᾱ_t).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class NoiseSchedule:
    """ᾱ for timesteps 0 … T−1, in float64, and what follows from it."""

    alphas_cumprod: Array
    sigmas: Array = field(init=False)
    log_sigmas: Array = field(init=False)

    def __post_init__(self) -> None:
        sigmas = np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "log_sigmas", np.log(sigmas))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def betas(self) -> Array:
        """Variance added by each step (Ho et al. 2020, Equation 2)."""
        previous = np.concatenate([[1.0], self.alphas_cumprod[:-1]])
        return 1.0 - self.alphas_cumprod / previous

    @property
    def sigma_min(self) -> float:
        """The noise level of timestep 0."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The noise level of timestep T−1."""
        return float(self.sigmas[-1])

    def timestep(self, sigma: float) -> float:
        """The fractional timestep of a noise level, linear in log σ; clamped to 0 … T−1."""
        if sigma <= self.sigma_min:
            return 0.0
        return float(np.interp(math.log(sigma), self.log_sigmas, np.arange(len(self))))

    def sigma(self, timestep: float) -> float:
        """The noise level of a fractional timestep: the inverse of `timestep`."""
        return float(np.exp(np.interp(timestep, np.arange(len(self)), self.log_sigmas)))


def _alphas_cumprod(betas: NDArray[np.floating]) -> Array:
    return np.asarray(np.cumprod(1.0 - betas), dtype=np.float64)


def linear(beta_start: float, beta_end: float, timesteps: int) -> NoiseSchedule:
    """β linear from start to end (Ho et al. 2020: 1e-4 to 0.02 in 1,000 steps)."""
    return NoiseSchedule(_alphas_cumprod(np.linspace(beta_start, beta_end, timesteps)))


def scaled_linear(beta_start: float, beta_end: float, timesteps: int) -> NoiseSchedule:
    """√β linear from start to end (latent diffusion and Stable Diffusion: 0.00085 to 0.012 in 1,000 steps)."""
    return NoiseSchedule(_alphas_cumprod(np.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2))


NOISE_SCHEDULES: dict[str, Callable[[float, float, int], NoiseSchedule]] = {
    "scaled_linear": scaled_linear,
    "linear": linear,
}


# Grids: noise levels from high to low, `steps` of them and then 0. All run exactly the number of steps asked for.


def leading(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Timesteps 1 + i·⌊T/S⌋: DDIM's own spacing (Song et al. 2021), which never starts at the noisiest level."""
    stride = len(schedule) // steps
    offset = min(1, len(schedule) - 1 - (steps - 1) * stride)
    return _at(schedule, [offset + i * stride for i in reversed(range(steps))])


def trailing(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Timesteps T − 1, T − 1 − T/S, …: starts at the noisiest level (Lin et al. 2024, Section 3.3)."""
    return _at(schedule, [round(len(schedule) * (1 - i / steps)) - 1 for i in range(steps)])


def linspace(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Timesteps evenly from T − 1 to 0, fractional (k-diffusion's default)."""
    return _at(schedule, [float(t) for t in np.linspace(len(schedule) - 1, 0, steps)])


def karras(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> list[float]:
    """Evenly in σ^(1/ρ) over the schedule's full range (Karras et al. 2022, Equation 5)."""
    ramp = np.linspace(schedule.sigma_max ** (1 / rho), schedule.sigma_min ** (1 / rho), steps) ** rho
    return [*(float(s) for s in ramp), 0.0]


def _at(schedule: NoiseSchedule, timesteps: list[int] | list[float]) -> list[float]:
    return [*(schedule.sigma(t) for t in timesteps), 0.0]


Grid = Callable[[NoiseSchedule, int], list[float]]

GRIDS: dict[str, Grid] = {"leading": leading, "trailing": trailing, "linspace": linspace, "karras": karras}
