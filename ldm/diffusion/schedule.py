"""Noise schedules: β → ᾱ → σ, and between a noise level and its fractional timestep.

Everywhere else a noisy latent is x = x0 + σ·noise. Discrete timesteps and ᾱ exist only here and in the denoiser:
x_t = √ᾱ_t x0 + √(1−ᾱ_t) ε is that x times √ᾱ_t, with σ_t = √((1−ᾱ_t)/ᾱ_t).
"""

import math
from collections.abc import Callable, Sequence
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
        return self.levels([timestep])[0]

    def levels(self, timesteps: Sequence[float] | Array) -> list[float]:
        """The noise levels of fractional timesteps."""
        return [float(s) for s in np.exp(np.interp(timesteps, np.arange(len(self)), self.log_sigmas))]


def _alphas_cumprod(betas: NDArray[np.floating]) -> Array:
    return np.asarray(np.cumprod(1.0 - betas), dtype=np.float64)


def linear(beta_start: float, beta_end: float, timesteps: int) -> NoiseSchedule:
    """β linear from start to end (Ho et al. 2020: 1e-4 to 0.02 in 1,000 steps)."""
    return NoiseSchedule(_alphas_cumprod(np.linspace(beta_start, beta_end, timesteps)))


def scaled_linear(beta_start: float, beta_end: float, timesteps: int) -> NoiseSchedule:
    """√β linear from start to end (latent diffusion and Stable Diffusion: 0.00085 to 0.012 in 1,000 steps)."""
    return NoiseSchedule(_alphas_cumprod(np.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2))


def scaled_linear_zero_snr(beta_start: float, beta_end: float, timesteps: int) -> NoiseSchedule:
    """`scaled_linear` whose last timestep is pure noise; for networks that predict v or x0."""
    return zero_terminal_snr(scaled_linear(beta_start, beta_end, timesteps))


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """`schedule` with √ᾱ shifted and stretched so that it starts as before and ends in 0 (Lin et al. 2024, Alg. 1).

    The last ᾱ is 2⁻²⁴ and not 0, as in diffusers: σ is then 4096 and not infinite, and x0 + σ·noise keeps one part of
    the image in 4096 of noise, less than half precision can tell from none.
    """
    roots = np.sqrt(schedule.alphas_cumprod)
    alphas_cumprod = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    alphas_cumprod[-1] = 2.0**-24
    return NoiseSchedule(alphas_cumprod)


NOISE_SCHEDULES: dict[str, Callable[[float, float, int], NoiseSchedule]] = {
    "scaled_linear": scaled_linear,
    "linear": linear,
    "scaled_linear_zero_snr": scaled_linear_zero_snr,
}
