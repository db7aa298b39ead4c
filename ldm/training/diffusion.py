"""The UNet's objective: the squared error of its prediction on cached latents (or pictures, in pixel space)."""

from collections.abc import Callable, Iterator

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.model_config import ModelConfig
from ldm.training.latents import LatentCache
from ldm.training.loop import Batch, Losses, OptimizationConfig, step_generator


class DiffusionTraining(OptimizationConfig):
    """One stage of the UNet; stages follow one another, the first at a lower resolution."""

    # Side of the pictures in pixels, and how many of them are encoded.
    side: PositiveInt
    pictures: PositiveInt
    # Probability that a prompt is replaced by the null prompt, for classifier-free guidance.
    caption_dropout: float = Field(0.1, ge=0, le=1)
    min_snr_gamma: PositiveFloat | None = None


def latent_batches(cache: LatentCache, config: DiffusionTraining, seed: int) -> Callable[[int], Iterator[Batch]]:
    """Batches of (mean, std, text states, null states) from any step on: order = permutation(seed, epoch)."""

    def batches(start: int) -> Iterator[Batch]:
        step = start
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        per_epoch = max(1, len(cache) // config.batch_size)
        while True:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(len(cache), generator=step_generator(seed, epoch))
            position = (step % per_epoch) * config.batch_size
            chosen = order[position : position + config.batch_size]
            yield cache.mean[chosen], cache.std[chosen], cache.states[cache.caption[chosen]], cache.states[-1:]
            step += 1

    return batches


def diffusion_losses(
    model: ModelConfig, schedule: NoiseSchedule, config: DiffusionTraining
) -> Callable[[nn.Module, Batch, torch.Generator], Losses]:
    """The loss of one batch: a latent from its posterior, t uniform over all timesteps, the prompt dropped at times."""

    def losses(network: nn.Module, batch: Batch, generator: torch.Generator) -> Losses:
        mean, std, text, null = batch
        device = mean.device
        x0 = mean.float() + std.float() * torch.randn(mean.shape, generator=generator).to(device)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        t = torch.randint(0, len(schedule), (len(mean),), generator=generator).to(device)
        dropped = (torch.rand(len(mean), generator=generator) < config.caption_dropout).to(device)
        text = torch.where(dropped[:, None, None], null, text).float()
        x0 = x0.contiguous(memory_format=torch.channels_last)
        denoiser = Denoiser(network, schedule, model.prediction)
        error = denoiser.loss(x0, noise, t, text, config.min_snr_gamma)
        return {"loss": error.mean()}

    return losses
