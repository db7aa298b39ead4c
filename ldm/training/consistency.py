"""Consistency distillation: a UNet learns to say in one look where guided DDIM of its teacher ends after many steps.

Source: Luo et al. 2023 (latent consistency models, 2310.04378), with one guidance scale, which is built in, and Song et
al. 2023, Algorithm 2. c_skip and c_out, which mix the noisy latent in, are 0 and 1 to five digits at the levels that
are visited, and are left out, as in the sampler.
"""

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.forward import diffuse
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.model_config import ModelConfig, SamplingDefaults
from ldm.training.batch import Batch, Draws
from ldm.training.diffusion import DiffusionTraining
from ldm.training.update import Losses, Objective

STEPS = 4  # that a distilled model draws with, unless it is asked for another number


class ConsistencyTraining(DiffusionTraining):
    """The stage that distils the UNet of `--base` into one that draws in a few steps, without a second text."""

    # How strongly the teacher is guided; the student then is by itself.
    guidance_scale: float = Field(ge=1)
    # Steps of DDIM in which the teacher would go all the way. Of Stable Diffusion's 1,000 timesteps, every 20th.
    teacher_steps: int = Field(50, ge=2)
    # Below it errors count squared, above it as they are (pseudo-Huber).
    huber: PositiveFloat = 1e-3
    # The null prompt is the teacher's; the student is never asked about it.
    caption_dropout: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _of_the_teacher(self) -> "ConsistencyTraining":
        if self.min_snr_gamma is not None or self.debiased or self.late_share or self.offset_noise:
            raise ValueError(
                "min_snr_gamma, debiased, late_share and offset_noise are for errors of noise; leave them out"
            )
        return self


def few_steps(model: ModelConfig) -> ModelConfig:
    """A model's config with the settings that its distilled UNet is drawn with."""
    own = model.sampling
    sampling = SamplingDefaults(
        width=own.width, height=own.height, sampler="lcm", schedule="trailing", steps=STEPS, guidance_scale=1.0
    )
    return model.model_copy(update={"sampling": sampling})


def consistency_losses(
    model: ModelConfig, schedule: NoiseSchedule, config: ConsistencyTraining, teacher: nn.Module
) -> Objective:
    """How far the student's clean estimate is from the one it gives a teacher's step further down."""
    stride = len(schedule) // config.teacher_steps
    alphas = torch.from_numpy(schedule.alphas_cumprod).float()

    def alpha_at(t: Int[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
        """ᾱ at timesteps, 1 before the first."""
        known = alphas.to(t.device)[t.clamp(min=0)]
        return torch.where(t < 0, 1.0, known)[:, None, None, None]

    def losses(network: nn.Module, batch: Batch, draws: Draws) -> Losses:
        (mean, std, text), (null,) = batch.rows, batch.shared
        device, shape = mean.device, mean.shape[1:]
        teacher.to(device)
        x0 = mean.float() + std.float() * draws.normal(*shape).to(device)
        noise = draws.normal(*shape).to(device)
        t = (stride * (1 + draws.integers(config.teacher_steps)) - 1).to(device)
        dropped = (draws.uniform() < config.caption_dropout).to(device)
        text, null = torch.where(dropped[:, None, None], null, text).float(), null.float().expand_as(text)
        x = diffuse(schedule, x0.contiguous(memory_format=torch.channels_last), t, noise)
        with torch.no_grad():
            told, free = teacher(x, t.float(), torch.cat([text, null])).float().chunk(2)
            clean, left = clean_and_noise(
                model.prediction, x, free + config.guidance_scale * (told - free), alpha_at(t)
            )
            lower, alpha = t - stride, alpha_at(t - stride)
            x_lower = alpha.sqrt() * clean + (1.0 - alpha).sqrt() * left
            said = network(x_lower, lower.clamp(min=0).float(), text).float()
            there, _ = clean_and_noise(model.prediction, x_lower, said, alpha_at(lower.clamp(min=0)))
            goal = torch.where((lower < 0)[:, None, None, None], clean, there)
        here, _ = clean_and_noise(model.prediction, x, network(x, t.float(), text).float(), alpha_at(t))
        error = ((here - goal).square() + config.huber**2).sqrt() - config.huber
        error = error.mean(dim=(1, 2, 3))
        return {"loss": error.mean(), "error": error, "timestep": t}

    return losses


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
