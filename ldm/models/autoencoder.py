"""Images become latents and back: Stable Diffusion's KL autoencoder, and the identity for diffusion in pixel space.

Latents leave this file normalised (mean 0, standard deviation 1 per channel, or Stable Diffusion's scalar 0.18215)
and come back so; no other file sees a scale factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from ldm.config import Config
from ldm.machine import give_back_freed_memory
from ldm.nn import cpu
from ldm.nn.layers import Downsample, PixelAttention, ResBlock, Upsample, silu

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Gaussian:
    """A diagonal Gaussian over latents: the autoencoder's posterior q(z|image)."""

    mean: Float[Tensor, "b c h w"]
    std: Float[Tensor, "b c h w"]

    def sample(self, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The latent that standard normal `noise` picks."""
        return self.mean + self.std * noise

    def kl(self) -> Float[Tensor, " b"]:
        """KL(q ‖ N(0, 1)), summed over each latent, in nats (Kingma & Welling 2014, Appendix B)."""
        variance = self.std.square()
        return 0.5 * (self.mean.square() + variance - 1.0 - variance.log()).sum(dim=(1, 2, 3))


class AutoencoderConfig(Config):
    """Shape of the KL autoencoder; the defaults are Stable Diffusion's (83,653,863 parameters)."""

    kind: Literal["kl"] = "kl"
    channels: PositiveInt = 128
    multipliers: tuple[PositiveInt, ...] = (1, 2, 4, 4)
    res_blocks: PositiveInt = 2
    mid_attention: bool = True
    groups: PositiveInt = 32
    image_channels: PositiveInt = 3
    latent_channels: PositiveInt = 4
    # z = (latent − mean) / std. Stable Diffusion's scalar factor 0.18215 is mean 0, std 1 / 0.18215.
    latent_mean: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    latent_std: tuple[float, ...] = (1 / 0.18215, 1 / 0.18215, 1 / 0.18215, 1 / 0.18215)
    # Least-squares map from a normalised latent to RGB in [−1, 1]: one row a latent channel, then the bias.
    preview: tuple[tuple[float, float, float], ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "AutoencoderConfig":
        for multiplier in self.multipliers:
            if self.channels * multiplier % self.groups:
                raise ValueError(
                    f"width {self.channels * multiplier} is not a multiple of the {self.groups} norm groups"
                )
        if not len(self.latent_mean) == len(self.latent_std) == self.latent_channels:
            raise ValueError(f"latent_mean and latent_std need one number for each of {self.latent_channels} channels")
        if min(self.latent_std) <= 0:
            raise ValueError("latent_std must be positive")
        if self.preview is not None and len(self.preview) != self.latent_channels + 1:
            raise ValueError(f"preview needs {self.latent_channels + 1} rows, one a latent channel and the bias")
        return self

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along a side."""
        return 2 ** (len(self.multipliers) - 1)


class PixelConfig(Config):
    """No autoencoder: diffusion in pixel space, as in DDPM's own tutorials."""

    kind: Literal["pixels"]
    image_channels: PositiveInt = 1

    @property
    def factor(self) -> int:
        """One: a latent pixel is an image pixel."""
        return 1

    @property
    def latent_channels(self) -> int:
        """The image's own channels."""
        return self.image_channels


@runtime_checkable
class Autoencoder(Protocol):
    """What the rest of the system knows of an autoencoder."""

    factor: int
    latent_channels: int
    image_channels: int

    def encode(self, image: Tensor) -> Gaussian:
        """Images (b c h w) in [−1, 1] to a Gaussian over normalised latents."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latents to images (b c h w), about [−1, 1]."""
        ...

    def preview(self, latent: Tensor) -> Tensor:
        """A small image (b c h w) of latent size at almost no cost."""
        ...


class _Block(nn.Module):
    """The residual blocks of one resolution, and what leads to the next one."""

    def __init__(
        self, widths: list[tuple[int, int]], groups: int, resample: str | None, module: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(i, o, groups=groups, eps=NORM_EPS) for i, o in widths)
        self.resample = resample
        if resample is not None and module is not None:
            self.add_module(resample, nn.ModuleList([module]))

    def layers(self) -> list[Any]:
        """All layers in order. Who calls them one by one holds only what the next one reads: states are large here."""
        return [*self.resnets, *([] if self.resample is None else [self.get_submodule(f"{self.resample}.0")])]


class _Middle(nn.Module):
    """Residual block, attention over all pixels where asked for, residual block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, groups=groups, eps=NORM_EPS) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Image to the mean and log-variance of its latent, before `quant_conv`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            previous = widths[max(level - 1, 0)]
            pairs = [(previous if j == 0 else width, width) for j in range(config.res_blocks)]
            last = level == len(widths) - 1
            self.down_blocks.append(
                _Block(pairs, config.groups, None, None)
                if last
                else _Block(pairs, config.groups, "downsamplers", Downsample(width, symmetric=False))
            )
        self.mid_block = _Middle(widths[-1], config.groups, config.mid_attention)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z h2 w2"]:
        x = self.conv_in(image)
        for block in self.down_blocks:
            assert isinstance(block, _Block)
            for layer in block.layers():
                x = layer(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latent, after `post_quant_conv`, to image."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0], config.groups, config.mid_attention)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            previous = widths[max(level - 1, 0)]
            pairs = [(previous if j == 0 else width, width) for j in range(config.res_blocks + 1)]
            last = level == len(widths) - 1
            self.up_blocks.append(
                _Block(pairs, config.groups, None, None)
                if last
                else _Block(pairs, config.groups, "upsamplers", Upsample(width))
            )
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, latent: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c h2 w2"]:
        x = self.mid_block(self.conv_in(latent))
        layers = [layer for block in self.up_blocks for layer in cast(_Block, block).layers()]
        shapes = list(accumulate(layers, lambda shape, layer: layer.shape_of(shape), initial=tuple(x.shape)))[1:]
        if cpu.draws_on_cpu(x) and not torch.compiler.is_compiling() and any(map(cpu.large, shapes)):
            return self._through_large_states(x, layers, shapes)
        for layer in layers:
            x = layer(x)
        return self.conv_out(silu(self.conv_norm_out(x)))

    def _through_large_states(
        self, x: Tensor, layers: Sequence[Any], shapes: Sequence[Sequence[int]]
    ) -> Float[Tensor, "b c h2 w2"]:
        """The rest of the way on a CPU: large states share one memory, and the last two layers run in bands.

        What the layers before them have freed is given back: it lies in pieces, into which no large state fits.
        """
        sizes, ends = [prod(shape) for shape in shapes if cpu.large(shape)], None
        for layer, shape in zip(layers, shapes, strict=True):
            if ends is None and cpu.large(shape):
                give_back_freed_memory()
                ends = cpu.TwoEnds(sizes, x.dtype)
            x = layer(x, out=ends.next(shape) if ends is not None and cpu.large(shape) else None)
        image = x.new_empty(x.shape[0], self.conv_out.out_channels, *x.shape[2:])
        return cpu.convolved(self.conv_norm_out, self.conv_out, x, image)


class KLAutoencoder(nn.Module):
    """Stable Diffusion's autoencoder, from its config; at the defaults 512×512×3 becomes 64×64×4.

    Source: Rombach et al. 2022, Section 3.1 and Appendix G.
    """

    sparing = False  # whether memory matters more than time

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.latent_channels = config.latent_channels
        self.image_channels = config.image_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def spare_memory(self) -> None:
        """Compute in bands of rows from now on, on every device: the same pictures, more slowly on a GPU."""
        for module in self.modules():
            if isinstance(module, KLAutoencoder | ResBlock | Upsample):
                module.sparing = True

    def posterior(self, image: Float[Tensor, "b c h w"]) -> Gaussian:
        """The raw posterior, before normalisation; log-variance clamped to [−30, 20] as in the reference."""
        mean, log_variance = self.quant_conv(self.encoder(image)).float().chunk(2, dim=1)
        return Gaussian(mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)))

    def reconstruct(self, raw_latent: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c h2 w2"]:
        """The image of a raw latent: what training sees before the latent's statistics are known."""
        return self.decoder(self.post_quant_conv(raw_latent))

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the raw latent per channel, each (1 z 1 1)."""
        mean = torch.tensor(self.config.latent_mean, dtype=like.dtype, device=like.device)
        std = torch.tensor(self.config.latent_std, dtype=like.dtype, device=like.device)
        return mean[None, :, None, None], std[None, :, None, None]

    def encode(self, image: Float[Tensor, "b c h w"]) -> Gaussian:
        """Images in [−1, 1], sides a multiple of `factor`, to a Gaussian over normalised latents (fp32)."""
        raw = self.posterior(image.to(self.post_quant_conv.weight.dtype))
        mean, std = self.statistics(raw.mean)
        return Gaussian((raw.mean - mean) / std, raw.std / std)

    def decode(self, latent: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Normalised latents to images (fp32), about [−1, 1]."""
        mean, std = self.statistics(latent)
        return self.reconstruct((latent * std + mean).to(self.post_quant_conv.weight.dtype)).float()

    def preview(self, latent: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c h w"]:
        """The linear map that was fitted from latents to colours: a small blurry image, in microseconds."""
        if self.config.preview is None:
            return latent[:, :1].clamp(-1.0, 1.0).expand(-1, self.image_channels, -1, -1)
        matrix = torch.tensor(self.config.preview, dtype=torch.float32, device=latent.device)
        colours = torch.einsum("bzhw,zc->bchw", latent.float(), matrix[:-1])
        return colours + matrix[-1][None, :, None, None]


class PixelAutoencoder(nn.Module):
    """The identity: the latent is the image."""

    def __init__(self, config: PixelConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = 1
        self.latent_channels = self.image_channels = config.image_channels

    def encode(self, image: Float[Tensor, "b c h w"]) -> Gaussian:
        """The image itself, without variance."""
        return Gaussian(image, torch.zeros_like(image))

    def decode(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The latent itself."""
        return latent

    def preview(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The latent itself."""
        return latent
