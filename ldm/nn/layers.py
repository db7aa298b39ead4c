"""Convolution blocks, resampling, the transformer block and the timestep embedding of Stable Diffusion's networks.

Modules and parameters carry the names of the diffusers library, so that its files load without a table.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from ldm.nn import cpu
from ldm.nn.attention import Attention
from ldm.nn.merging import among_fewer
from ldm.nn.packing import Conv2d

Module = TypeVar("Module", bound=nn.Module)


def zero_init(module: nn.Module) -> nn.Module:
    """`module` with all its parameters at zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def channels_last(module: Module) -> Module:
    """`module` with its convolutions laid out as CPUs and tensor cores read them fastest."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this form


def silu(x: Tensor) -> Tensor:
    """SiLU of a state that nobody else reads: in place, unless its gradient needs what was there."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def per_text(x: Float[Tensor, "b *rest"], like: Float[Tensor, "k *other"]) -> Float[Tensor, "k *rest"]:  # noqa: F821
    """`x` as often as `like` has texts for it: before the first cross-attention, all texts have the same state."""
    return x if len(x) == len(like) else repeat(x, "b ... -> (texts b) ...", texts=len(like) // len(x))


def timestep_embedding(t: Float[Tensor, " b"], width: int, max_period: float = 10_000.0) -> Float[Tensor, "b width"]:
    """[cos, sin] of t times geometric frequencies, in fp32 (Vaswani et al. 2017, DDPM's order); t may be fractional."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepMLP(nn.Module):
    """The sinusoidal embedding's two linear layers."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, out_width)
        self.linear_2 = nn.Linear(out_width, out_width)

    def forward(self, embedding: Float[Tensor, "b width"]) -> Float[Tensor, "b out"]:
        return self.linear_2(F.silu(self.linear_1(embedding)))


class ResBlock(nn.Module):
    """norm → SiLU → conv, twice, around a residual; a timestep embedding is added between the two."""

    sparing = False  # whether memory matters more than time, also where there is no need

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_width: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels) if time_width else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if time_width:  # the UNet's blocks start as the identity, the autoencoder's do not: as in the reference
            zero_init(self.conv2)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(
        self,
        x: Float[Tensor, "k c h w"],
        time: Float[Tensor, "b t"] | None = None,
        *,
        out: Float[Tensor, "k out h w"] | None = None,
    ) -> Float[Tensor, "k out h w"]:
        """The block. The result may lie in `out`, or elsewhere."""
        # Compiled, every band would be code of its own.
        banded = self.sparing or (cpu.draws_on_cpu(x) and cpu.large(x.shape) and not torch.compiler.is_compiling())
        if time is None and banded and not torch.is_grad_enabled():
            return self._in_bands(x, out)
        hidden = self.conv1(silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            assert time is not None
            hidden = hidden + per_text(self.time_emb_proj(F.silu(time)), hidden)[:, :, None, None]
        hidden = self.conv2(self.dropout(silu(self.norm2(hidden))))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the result for an `x` of this shape."""
        return (shape[0], self.conv1.out_channels, *shape[2:])

    def _in_bands(
        self, x: Float[Tensor, "b c h w"], out: Float[Tensor, "b out h w"] | None
    ) -> Float[Tensor, "b out h w"]:
        """The same with no more in memory than `x`, the result and a few rows."""
        if out is None:
            shape = self.shape_of(x.shape)
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for conv in (self.conv1, self.conv2):
            conv.unpack()
        cpu.convolved(self.norm1, self.conv1, x, out)
        cpu.convolved(self.norm2, self.conv2, out, out)
        if self.conv_shortcut is None:
            return out.add_(x)
        for top, bottom in cpu.bands(x):
            out[:, :, top:bottom] += self.conv_shortcut(x[:, :, top:bottom])
        return out


class Downsample(nn.Module):
    """Half the side: 3×3 convolution of stride 2, padded on both sides (UNet) or right and below only (autoencoder)."""

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then a 3×3 convolution."""

    sparing = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "b c h w"], *, out: Float[Tensor, "b c h2 w2"] | None = None
    ) -> Float[Tensor, "b c h2 w2"]:
        """The enlarged state, which may lie in `out`, or elsewhere."""
        many = x.shape[2] * x.shape[3] >= cpu.MANY_PIXELS and cpu.draws_on_cpu(x)
        if (many or self.sparing) and not torch.is_grad_enabled():
            return self.conv.doubled(x, out)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the result for an `x` of this shape."""
        batch, channels, height, width = shape
        return batch, channels, 2 * height, 2 * width


class GEGLU(nn.Module):
    """A linear layer whose one half gates the other through GELU (Shazeer 2020)."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Float[Tensor, "b n width"]) -> Float[Tensor, "b n out"]:
        if type(self.proj) is nn.Linear and cpu.draws_on_cpu(x):  # and not one with low-rank additions
            return cpu.gated(x, self.proj)
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, width)])

    def forward(self, x: Float[Tensor, "b n width"]) -> Float[Tensor, "b n width"]:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward, each behind a LayerNorm and a residual."""

    def __init__(self, width: int, heads: int, context_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width, dropout)

    def forward(
        self, x: Float[Tensor, "b n width"], context: Float[Tensor, "k l context"], columns: int, merged: float
    ) -> Float[Tensor, "k n width"]:
        """Of the pixels, which lie row by row in so many `columns`, a share `merged` attends through others."""
        x = per_text(x + among_fewer(self.attn1, self.norm1(x), columns, merged), context)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Pixels as a sequence through transformer blocks, between two projections (Rombach et al. 2022, Section 3.3).

    Stable Diffusion 1 projects with 1×1 convolutions, 2 with linear layers.
    """

    merged = 0.0  # share of the pixels that attend to themselves through others like them

    def __init__(
        self,
        channels: int,
        heads: int,
        context_width: int,
        *,
        depth: int,
        groups: int,
        linear: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_width, dropout) for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Linear(channels, channels) if linear else Conv2d(channels, channels, 1))

    def forward(self, x: Float[Tensor, "b c h w"], context: Float[Tensor, "k l context"]) -> Float[Tensor, "k c h w"]:
        height, width = x.shape[2:]
        hidden = self.norm(x)
        if not self.linear:
            hidden = self.proj_in(hidden)
        hidden = rearrange(hidden, "b c h w -> b (h w) c")
        if self.linear:
            hidden = self.proj_in(hidden)
        for block in self.transformer_blocks:
            hidden = block(hidden, context, width, self.merged)
        if self.linear:
            hidden = self.proj_out(hidden)
        hidden = rearrange(hidden, "b (h w) c -> b c h w", h=height)
        if not self.linear:
            hidden = self.proj_out(hidden)
        return per_text(x, hidden) + hidden


class PixelAttention(Attention):
    """Single-head self-attention over all pixels around a residual, as in the middle of the autoencoder."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:  # type: ignore[override]  # pixels, not a sequence
        sequence = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        return x + rearrange(super().forward(sequence), "b (h w) c -> b c h w", h=x.shape[2])
