"""The autoencoder's objective: reconstruction, a small KL term, equivariance, and where asked for an adversary.

Losses are sums over an image divided by the number of its values, so that `kl_weight` means what it means in the
reference implementation (1e-6, relative to sums), whatever the image's size.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from ldm.diffusion.noise import key
from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.models.discriminator import DiscriminatorConfig
from ldm.nn.layers import ResBlock, zero_init
from ldm.training.adversarial import Adversarial, adversarial_losses
from ldm.training.batch import Batch, Draws
from ldm.training.loop import Batches
from ldm.training.optimization import OptimizationConfig
from ldm.training.perceptual import Lpips
from ldm.training.source import Pictures
from ldm.training.update import Losses, Objective


class AutoencoderTraining(OptimizationConfig):
    """The autoencoder stage."""

    # Begins as the autoencoder of `--base`, whose shape it has, instead of anew.
    from_base: bool = False
    crop: PositiveInt = 64
    # Pictures are shrunk to one of these sides before the crop; the autoencoder learns all scales it will meet.
    sides: tuple[PositiveInt, ...] = (256, 128, 64)
    kl_weight: NonNegativeFloat = 1e-6
    # Error of edges: what stands for a perceptual loss where no weights are given for one.
    gradient_weight: NonNegativeFloat = 1.0
    # A file with VGG-16 and LPIPS weights (docs/training.md says how it is made); it takes the place of the edges.
    perceptual: str | None = None
    perceptual_weight: NonNegativeFloat = 1.0
    # Squared error beside the absolute one: large errors, which are wrong colours, go first.
    squared_weight: NonNegativeFloat = 1.0
    # Of this many random crops, the one with most contrast is taken: flat ground teaches little.
    crop_candidates: PositiveInt = 1
    # Probability that a batch trains equivariance instead of plain reconstruction (EQ-VAE, 2502.09509).
    equivariance: float = Field(0.5, ge=0, le=1)

    # A network that tells pictures from reconstructions, and teaches the decoder to fool it (2012.09841, Section 3.1).
    discriminator: DiscriminatorConfig | None = None
    discriminator_weight: NonNegativeFloat = 0.5
    # Both learn to know their job first: steps before the decoder hears of the discriminator.
    discriminator_start: NonNegativeInt = 0

    @model_validator(mode="after")
    def _consistent(self) -> "AutoencoderTraining":
        if self.crop > min(self.sides):
            raise ValueError(f"crop {self.crop} is larger than the smallest side, {min(self.sides)}")
        if self.discriminator is not None and (self.compile or self.strategy == "fsdp"):
            raise ValueError("a discriminator needs gradients within the step: use compile: false and strategy: ddp")
        return self


@torch.no_grad()
def initialise(autoencoder: KLAutoencoder, log_variance: float = -8.0) -> None:
    """Start as a nearly linear map that lets everything through; else colours come hundreds of steps later.

    Convolutions keep the variance of what they read (PyTorch's default shrinks it to a third), residual branches
    start at zero, the 1×1 convolutions around the latent as the identity, and the posterior almost without noise.
    """
    for module in autoencoder.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.mul_(3**0.5)
            if module.bias is not None:
                module.bias.zero_()
    for module in autoencoder.modules():
        if isinstance(module, ResBlock):
            zero_init(module.conv2)
    channels = autoencoder.latent_channels
    for convolution in (autoencoder.quant_conv, autoencoder.post_quant_conv):
        nn.init.zeros_(convolution.weight)
        convolution.weight[:channels, :channels, 0, 0] = torch.eye(channels)
    assert autoencoder.quant_conv.bias is not None
    autoencoder.quant_conv.bias[channels:].fill_(log_variance)


class Reconstruction(nn.Module):
    """Autoencoder and target in one module, so that one forward pass gives all that the loss needs."""

    def __init__(self, autoencoder: KLAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(
        self, image: Float[Tensor, "b c h w"], noise: Float[Tensor, "b z h8 w8"], scale: float, turns: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, its target, and the KL of the posterior; both transformed by `scale` and quarter `turns`.

        The latent is transformed, and the decoder must give the equally transformed image.
        """
        posterior = self.autoencoder.posterior(image)
        latent = transform(posterior.sample(noise), scale, turns)
        target = torch.rot90(image, turns, (2, 3))
        if scale != 1.0:
            size = [side * self.autoencoder.factor for side in latent.shape[2:]]
            target = F.interpolate(target, size=size, mode="bilinear", antialias=True)
        return self.autoencoder.reconstruct(latent), target, posterior.kl()


def transform(latent: Float[Tensor, "b z h w"], scale: float, turns: int) -> Float[Tensor, "b z h2 w2"]:
    """A latent scaled down and turned by quarters."""
    turned = torch.rot90(latent, turns, (2, 3))
    if scale == 1.0:
        return turned
    size = [max(1, round(side * scale)) for side in turned.shape[2:]]
    return F.interpolate(turned, size=size, mode="bilinear", antialias=True)


def gradient_loss(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"], scales: int = 3) -> Float[Tensor, ""]:
    """L1 between horizontal and vertical differences on a pyramid: what makes edges sharp."""
    total = a.new_zeros(())
    for _ in range(scales):
        total = total + (a.diff(dim=3) - b.diff(dim=3)).abs().mean() + (a.diff(dim=2) - b.diff(dim=2)).abs().mean()
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return total / scales


def autoencoder_losses(
    config: AutoencoderTraining,
    shape: AutoencoderConfig,
    perceptual: Lpips | None = None,
    adversary: Adversarial | None = None,
) -> Objective:
    """The loss of one batch of images through an autoencoder of that shape, which `adversary` wraps if there is one."""

    def losses(module: nn.Module, batch: Batch, draws: Draws) -> Losses:
        (image,) = batch.rows
        side = image.shape[-1] // shape.factor
        scale, turns = draws.whole(lambda generator: _transformation(generator, config, side))
        noise = draws.normal(shape.latent_channels, side, side).to(image.device)
        output, target, kl, *verdicts = module(image, noise, scale, turns)
        output = output.float()
        error = output - target
        l1, squared = error.abs().mean(), error.square().mean()
        reconstruction = l1 + config.squared_weight * squared
        kl_mean = kl.mean() / image[0].numel()
        values = {"l1": l1, "squared": squared, "kl": kl_mean}
        if perceptual is not None:
            values["perceptual"] = perceptual.to(image.device)(output, target).mean()
            reconstruction = reconstruction + config.perceptual_weight * values["perceptual"]
        else:
            values["edges"] = gradient_loss(output, target)
            reconstruction = reconstruction + config.gradient_weight * values["edges"]
        values["loss"] = reconstruction + config.kl_weight * kl_mean
        values["error"] = error.detach().square().mean(dim=(1, 2, 3))
        if adversary is not None:
            started = draws.step >= config.discriminator_start
            weight = config.discriminator_weight if started else 0.0
            against = adversarial_losses(reconstruction, verdicts, adversary.last_layer, weight)
            values["loss"] = values["loss"] + against.pop("loss")
            values |= against
        return values

    return losses


def _transformation(generator: torch.Generator, config: AutoencoderTraining, side: int) -> tuple[float, int]:
    """Scale and quarter turns of a batch's latents, of `side` pixels."""
    if torch.rand((), generator=generator) >= config.equivariance:
        return 1.0, 0
    scale = float(torch.randint(side // 2, side + 1, (), generator=generator)) / side
    return scale, int(torch.randint(0, 4, (), generator=generator))


def crops(pictures: Pictures, config: AutoencoderTraining, seed: int) -> Batches:
    """Batches of square crops (b 3 crop crop), each from a picture shrunk to a random one of `config.sides`."""

    def batches(start: int) -> Iterator[Batch]:
        for chosen in pictures(start):
            seeds = [key(seed, chosen.step, f"crop {chosen.first + i}") for i in range(len(chosen))]
            images = cropped(chosen.images, config, seeds)
            yield Batch((images.contiguous(memory_format=torch.channels_last),), keys=chosen.keys)

    return batches


def cropped(
    images: Float[Tensor, "b 3 h w"], config: AutoencoderTraining, seeds: Sequence[int]
) -> Float[Tensor, "b 3 crop crop"]:
    """One random crop of each square picture: of `config.crop_candidates`, the one with most contrast.

    Where to crop is decided on the CPU and nothing is read back, so that pictures on a GPU stay there.
    """
    rngs, size = [np.random.default_rng(own) for own in seeds], config.crop
    sides = np.array([rng.choice(config.sides) for rng in rngs])
    found = [
        rng.integers(0, side - size + 1, (config.crop_candidates, 2)) for rng, side in zip(rngs, sides, strict=True)
    ]
    corners, made = torch.from_numpy(np.stack(found)), images.new_empty(len(images), images.shape[1], size, size)
    for side in set(sides.tolist()):
        rows = torch.from_numpy(np.flatnonzero(sides == side))
        places = (corners[rows][..., None] + torch.arange(size)).to(images.device)  # n candidates (top, left) size
        rows = rows.to(images.device)
        shrunk = images[rows]
        if shrunk.shape[2:] != (side, side):
            shrunk = F.interpolate(shrunk, size=(side, side), mode="area")
        each = torch.arange(len(rows), device=images.device)
        tops, lefts = places[:, :, 0, :, None], places[:, :, 1, None, :]
        candidates = shrunk[each[:, None, None, None], :, tops, lefts]
        best = rearrange(candidates, "n k h w c -> n k (h w c)").std(dim=2).argmax(dim=1)
        made[rows] = rearrange(candidates[each, best], "n h w c -> n c h w")
    return made


@torch.no_grad()
def fit_statistics(
    autoencoder: KLAutoencoder, images: Float[Tensor, "n 3 h w"], batch: int = 16
) -> tuple[AutoencoderConfig, float]:
    """The config with the latents' mean and standard deviation per channel and the least-squares map to colours.

    Also returns R² of that map on the same images. They are encoded where the autoencoder is; the rest is the CPU's.
    """
    device = autoencoder.quant_conv.weight.device
    raw = torch.cat([autoencoder.posterior(chunk.to(device)).mean.cpu() for chunk in images.split(batch)])
    mean, std = raw.mean(dim=(0, 2, 3)), raw.std(dim=(0, 2, 3))
    latents = ((raw - mean[:, None, None]) / std[:, None, None]).permute(0, 2, 3, 1).reshape(-1, raw.shape[1])
    colours = F.interpolate(images, size=raw.shape[2:], mode="area").permute(0, 2, 3, 1).reshape(-1, images.shape[1])
    inputs = torch.cat([latents, torch.ones(len(latents), 1)], dim=1).double()
    solution = torch.linalg.lstsq(inputs, colours.double()).solution
    residual = (colours - inputs @ solution).square().sum()
    r_squared = 1.0 - float(residual / (colours - colours.mean(dim=0)).double().square().sum())
    statistics = {
        "latent_mean": tuple(round(v, 6) for v in mean.tolist()),
        "latent_std": tuple(round(v, 6) for v in std.tolist()),
        "preview": tuple(tuple(round(v, 6) for v in row) for row in solution.tolist()),
    }
    return autoencoder.config.model_copy(update=statistics), r_squared


@torch.no_grad()
def psnr(autoencoder: KLAutoencoder, images: Float[Tensor, "n 3 h w"], batch: int = 8) -> float:
    """Mean peak signal-to-noise ratio of reconstructions in dB, over images in [−1, 1]."""
    values: list[float] = []
    device = autoencoder.quant_conv.weight.device
    for chunk in (part.to(device) for part in images.split(batch)):
        error = (autoencoder.reconstruct(autoencoder.posterior(chunk).mean).clamp(-1, 1) - chunk).float()
        values += (10 * torch.log10(4.0 / error.square().mean(dim=(1, 2, 3)))).tolist()
    return sum(values) / len(values)
