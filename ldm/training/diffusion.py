"""The UNet's objective: the squared error of its prediction on latents (or pictures, in pixel space)."""

import itertools
from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from ldm.data.latents import LatentShards
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import key
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.autoencoder import Autoencoder
from ldm.models.model_config import ModelConfig
from ldm.training.batch import Batch, Draws, step_generator
from ldm.training.conditioned import Condition
from ldm.training.latents import LatentCache
from ldm.training.loop import Batches
from ldm.training.optimization import OptimizationConfig
from ldm.training.source import Pictures
from ldm.training.update import Losses, Objective
from ldm.training.workers import workers


class DiffusionTraining(OptimizationConfig):
    """One stage of the UNet; stages follow one another, the first at a lower resolution."""

    # Side of the pictures in pixels.
    side: PositiveInt
    # Where latents come from: so many pictures are encoded once and kept in memory; or shards that
    # scripts/cache_latents.py has written are read; or, with neither, every batch is encoded when it is used.
    pictures: PositiveInt | None = None
    latents: str | None = None
    # Probability that a prompt is replaced by the null prompt, for classifier-free guidance.
    caption_dropout: float = Field(0.1, ge=0, le=1)
    # How errors at different noise levels count; by default as they are. `debiased` teaches more at high noise, which
    # decides what is where.
    min_snr_gamma: PositiveFloat | None = None
    debiased: bool = False
    # Share of the samples whose timestep is one of the last tenth, besides those that are there anyway: the more
    # noise, the less the picture itself shows what is where, and the more that has to be learned from the prompt.
    late_share: float = Field(0.0, ge=0, le=1)
    # Noise that is the same at every pixel, beside the other: lets the mean brightness be learned, which one pixel's
    # noise hides from networks of schedules that do not end in pure noise. 0.05 to 0.1 is usual.
    offset_noise: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> "DiffusionTraining":
        if self.pictures is not None and self.latents is not None:
            raise ValueError("give pictures or latents, not both")
        if self.pictures is not None and self.pictures < self.batch_size:
            raise ValueError(f"pictures {self.pictures} do not fill one batch: give {self.batch_size} or more")
        if self.min_snr_gamma is not None and self.debiased:
            raise ValueError("give min_snr_gamma or debiased, not both")
        return self


class UNetTraining(DiffusionTraining):
    """One stage of the UNet's training from nothing, or of all its weights."""

    # The text tower goes on learning, with the UNet, from the pictures' errors: what its own stages did not teach it.
    train_text: bool = False

    @model_validator(mode="after")
    def _reads_captions(self) -> "UNetTraining":
        if self.train_text and self.latents is not None:
            raise ValueError("train_text needs captions, and shards of latents hold text states: give pictures instead")
        return self


def latent_batches(cache: LatentCache, config: DiffusionTraining, seed: int) -> Batches:
    """Batches of (mean, std, condition), and the null condition, from any step on: order = permutation(seed, epoch).

    An epoch is every picture once, with one of its captions; its last ones share a batch with the first of the next.
    """
    mine, size, pictures = workers().share(config.batch_size), config.batch_size, len(cache)

    @lru_cache(2)
    def order(epoch: int) -> Int[Tensor, " n"]:
        return torch.randperm(pictures, generator=step_generator(seed, epoch))

    def batches(start: int) -> Iterator[Batch]:
        for step in itertools.count(start):
            places = torch.arange(step * size, (step + 1) * size)
            epochs = range(int(places[0]) // pictures, int(places[-1]) // pictures + 1)
            parts = [order(epoch)[places[places // pictures == epoch] % pictures] for epoch in epochs]
            chosen = torch.cat(parts)[mine]
            of_captions = torch.Generator().manual_seed(key(seed, step, "caption"))
            drawn = torch.randint(cache.caption.shape[1], (size,), generator=of_captions)[mine]
            rows = cache.mean[chosen], cache.std[chosen], cache.conditions[cache.caption[chosen, drawn]]
            keys = tuple(cache.keys[i] if cache.keys else f"picture {i}" for i in chosen.tolist())
            yield Batch(rows, (cache.conditions[-1:],), keys)

    return batches


def encoded_batches(
    pictures: Pictures, config: DiffusionTraining, autoencoder: Autoencoder, condition: Condition, device: torch.device
) -> Batches:
    """The same from pictures that are encoded when they are used, by networks that do not learn, on `device`.

    At most `micro_batch_size` at once, as everything.
    """

    @torch.no_grad()
    def encoded(images: Float[Tensor, "b c h w"], captions: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            posterior = autoencoder.encode(images.to(device).contiguous(memory_format=torch.channels_last))
        return posterior.mean, posterior.std, condition(captions)

    def batches(start: int) -> Iterator[Batch]:
        with torch.no_grad():
            null = condition([""])
        for chosen in pictures(start):
            size = config.micro_batch_size or len(chosen.images)
            parts = [slice(first, first + size) for first in range(0, len(chosen.images), size)]
            rows = zip(*(encoded(chosen.images[part], chosen.captions[part]) for part in parts), strict=True)
            yield Batch(tuple(torch.cat(each) for each in rows), (null,), chosen.keys)

    return batches


def shard_batches(source: LatentShards, read_ahead: int) -> Batches:
    """The same from latents in shards, of `read_ahead` processes that read while this one trains."""
    assert source.null is not None
    null, me = torch.from_numpy(source.null)[None], workers()

    def batches(start: int) -> Iterator[Batch]:
        for chosen in source.batches(start, me.rank, me.world, read_ahead):
            assert chosen.text is not None
            yield Batch((chosen.mean, chosen.std, chosen.text), (null,), chosen.keys)

    return batches


def timesteps(draws: Draws, count: int, late_share: float) -> Int[Tensor, " b"]:
    """Uniform over `count` timesteps, but for a share that is uniform over the last tenth of them."""
    t = draws.integers(count)
    if late_share == 0:
        return t
    tenth = max(1, count // 10)
    return torch.where(draws.uniform() < late_share, count - tenth + draws.integers(tenth), t)


def diffusion_losses(model: ModelConfig, schedule: NoiseSchedule, config: DiffusionTraining) -> Objective:
    """The loss of one batch: a latent from its posterior, the prompt dropped at times."""

    def losses(network: nn.Module, batch: Batch, draws: Draws) -> Losses:
        (mean, std, text), (null,) = batch.rows, batch.shared
        device, shape = mean.device, mean.shape[1:]
        x0 = mean.float() + std.float() * draws.normal(*shape).to(device)
        noise = draws.normal(*shape).to(device)
        t = timesteps(draws, len(schedule), config.late_share).to(device)
        dropped = (draws.uniform() < config.caption_dropout).to(device)
        if config.offset_noise:
            noise = noise + config.offset_noise * draws.normal(shape[0], 1, 1).to(device)
        text = torch.where(dropped[:, None, None], null, text).float()
        x0 = x0.contiguous(memory_format=torch.channels_last)
        denoiser = Denoiser(network, schedule, model.prediction)
        error = denoiser.loss(x0, noise, t, text, config.min_snr_gamma, config.debiased)
        return {"loss": error.mean(), "error": error, "timestep": t}

    return losses
