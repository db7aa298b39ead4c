"""Consistency distillation: a UNet learns to say in one look where guided DDIM of its teacher ends after many steps.

Source: Luo et al. 2023 (latent consistency models, 2310.04378), with one guidance scale, which is built in. The goal is
what the student says itself, not an average of it (Song & Dhariwal 2024, Section 3.2). c_skip and c_out, which mix the
noisy latent in, are 0 and 1 to five digits at the levels that are visited, and are left out, as in the sampler.
"""

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.forward import alphas_cumprod_at, diffuse
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import SettingError
from ldm.models.model_config import ModelConfig, SamplingDefaults
from ldm.training.batch import Batch, Draws
from ldm.training.diffusion import DiffusionTraining
from ldm.training.update import Losses, Objective

STEPS = 4  # that a distilled model draws with, unless it is asked for another number
# In which the teacher would go all the way, and on whose timesteps alone the student is asked. Other programs' samplers
# expect so many.
TEACHER_STEPS = 50


class ConsistencyTraining(DiffusionTraining):
    """The stage that distils the UNet of `--base` into one that draws in a few steps, without a second text."""

    # How strongly the teacher is guided; the student then is by itself.
    guidance_scale: float = Field(ge=1)
    # Below it errors count squared, above it as they are (pseudo-Huber).
    huber: PositiveFloat = 1e-3
    # The null prompt is the teacher's; a student draws without it.
    caption_dropout: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _of_the_teacher(self) -> "ConsistencyTraining":
        if self.min_snr_gamma is not None or self.debiased or self.late_share or self.offset_noise:
            raise ValueError(
                "min_snr_gamma, debiased, late_share and offset_noise are for errors of noise; leave them out"
            )
        return self


def few_steps(model: ModelConfig) -> ModelConfig:
    """A model's config with the settings that its distilled UNet is drawn with: at levels that it was asked about."""
    sampling = SamplingDefaults(
        width=model.sampling.width,
        height=model.sampling.height,
        sampler="lcm",
        schedule="leading",
        convention="diffusers",
        steps=STEPS,
        guidance_scale=1.0,
    )
    return model.model_copy(update={"sampling": sampling})


def stride(timesteps: int, steps: int = TEACHER_STEPS) -> int:
    """Timesteps in one step of the teacher. Raises SettingError where they do not divide the schedule's."""
    if timesteps % steps:
        raise SettingError(
            f"model.noise_schedule.timesteps: {timesteps} cannot be gone in {steps} equal steps, as distilling needs; "
            "choose another --base"
        )
    return timesteps // steps


def consistency_losses(
    model: ModelConfig,
    schedule: NoiseSchedule,
    config: ConsistencyTraining,
    teacher: nn.Module,
    steps: int = TEACHER_STEPS,
) -> Objective:
    """How far the student's clean estimate is from the one it gives a teacher's step further down.

    Raises SettingError where the schedule cannot be gone in so many steps.
    """
    down = stride(len(schedule), steps)

    def estimates(
        network: nn.Module, x: Tensor, t: Tensor, text: Tensor, guidance: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Clean latent and noise that a network sees in x at timesteps t, guided to the first text from the second."""
        told, *free = network(x, t.float(), text).float().split(len(x))
        output = free[0] + guidance * (told - free[0]) if free else told
        return clean_and_noise(model.prediction, x, output, alphas_cumprod_at(schedule, t, x))

    def goal(network: nn.Module, x: Tensor, t: Tensor, text: Tensor, null: Tensor) -> Tensor:
        """Where the student says the trajectory ends, from a step of guided DDIM further down."""
        clean, noise = estimates(teacher, x, t, torch.cat([text, null]), config.guidance_scale)
        lower = (t - down).clamp(min=0)
        alpha = alphas_cumprod_at(schedule, lower, x)
        there, _ = estimates(network, alpha.sqrt() * clean + (1.0 - alpha).sqrt() * noise, lower, text)
        return torch.where((t < down)[:, None, None, None], clean, there)

    def losses(network: nn.Module, batch: Batch, draws: Draws) -> Losses:
        (mean, std, text), (null,) = batch.rows, batch.shared
        device, shape = mean.device, mean.shape[1:]
        x0 = mean.float() + std.float() * draws.normal(*shape).to(device)
        noise = draws.normal(*shape).to(device)
        t = (down * (1 + draws.integers(steps)) - 1).to(device)
        dropped = (draws.uniform() < config.caption_dropout).to(device)
        text, null = torch.where(dropped[:, None, None], null, text).float(), null.float().expand_as(text)
        x = diffuse(schedule, x0.contiguous(memory_format=torch.channels_last), t, noise)
        with apart(device):
            end = goal(network, x, t, text, null)
        here, _ = estimates(network, x, t, text)
        error = ((here - end).square() + config.huber**2).sqrt() - config.huber
        error = error.mean(dim=(1, 2, 3))
        return {"loss": error.mean(), "error": error, "timestep": t}

    return losses


@contextlib.contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Without gradients, and so that what follows is as if nothing had been: the same dropout, weights cast anew."""
    dtype, on = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), torch.autocast(device.type, dtype, on, cache_enabled=False):
        yield


def clean_and_noise(
    prediction: Prediction,
    x: Float[Tensor, "b c h w"],
    output: Float[Tensor, "b c h w"],
    alpha: Float[Tensor, "b 1 1 1"],
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """x0 and ε that an output means at x = √ᾱ x0 + √(1−ᾱ) ε (for v: Salimans & Ho 2022, Appendix D)."""
    signal, noisy = alpha.sqrt(), (1.0 - alpha).sqrt()
    if prediction == "eps":
        return (x - noisy * output) / signal, output
    if prediction == "v":
        return signal * x - noisy * output, noisy * x + signal * output
    return output, (x - signal * output) / noisy
