"""The forward process: how noise is added, in one step from the start or one timestep at a time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule


def alphas_cumprod_at(schedule: NoiseSchedule, t: Int[Tensor, " b"], like: Tensor) -> Float[Tensor, "b 1 1 1"]:
    """ᾱ_t for each image of a batch, shaped to multiply images."""
    table = torch.from_numpy(schedule.alphas_cumprod).to(like.device)
    return table[t.to(like.device)].to(like.dtype)[:, None, None, None]


def diffuse(
    schedule: NoiseSchedule, x0: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], noise: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """x_t ~ q(x_t | x0) in closed form: √ᾱ_t x0 + √(1−ᾱ_t) ε (Ho et al. 2020, Equation 4)."""
    alpha = alphas_cumprod_at(schedule, t, x0)
    return alpha.sqrt() * x0 + (1.0 - alpha).sqrt() * noise


def diffuse_step(
    schedule: NoiseSchedule, previous: Float[Tensor, "b c h w"], t: int, noise: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """x_t ~ q(x_t | x_{t−1}): √(1−β_t) x_{t−1} + √β_t ε (Ho et al. 2020, Equation 2)."""
    beta = float(schedule.betas[t])
    return (1.0 - beta) ** 0.5 * previous + beta**0.5 * noise
