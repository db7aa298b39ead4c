"""The denoising network: Stable Diffusion's cross-attention UNet, from its config."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from ldm.config import Config
from ldm.nn.layers import (
    Downsample,
    ResBlock,
    SpatialTransformer,
    TimestepMLP,
    Upsample,
    per_text,
    silu,
    timestep_embedding,
    zero_init,
)

NORM_EPS = 1e-5


class UNetConfig(Config):
    """Shape of the UNet; the defaults are Stable Diffusion 1.x's (859,520,964 parameters)."""

    in_channels: PositiveInt = 4
    out_channels: PositiveInt = 4
    channels: PositiveInt = 320
    multipliers: tuple[PositiveInt, ...] = (1, 2, 4, 4)
    res_blocks: PositiveInt = 2
    # Per level, finest first: does it have transformer blocks? The middle always has.
    attention: tuple[bool, ...] = (True, True, True, False)
    transformer_depth: PositiveInt = 1
    # One of the two: a fixed number of heads (Stable Diffusion 1: 8) or a fixed width per head (2: 64).
    heads: PositiveInt | None = 8
    head_width: PositiveInt | None = None
    context_width: PositiveInt = 768
    linear_projection: bool = False
    groups: PositiveInt = 32
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> "UNetConfig":
        if len(self.attention) != len(self.multipliers):
            raise ValueError(f"attention has {len(self.attention)} levels, multipliers has {len(self.multipliers)}")
        if (self.heads is None) == (self.head_width is None):
            raise ValueError("give either heads or head_width, and null for the other")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"width {width} is not a multiple of the {self.groups} norm groups")
            divisor = self.heads or self.head_width or 1
            if width % divisor:
                raise ValueError(f"width {width} is not a multiple of heads or head_width ({divisor})")
        return self

    @property
    def widths(self) -> list[int]:
        """Channels per level, finest first."""
        return [self.channels * m for m in self.multipliers]

    @property
    def factor(self) -> int:
        """Sides of the latent must be a multiple of this."""
        return 2 ** (len(self.multipliers) - 1)


class _Level(nn.Module):
    """The blocks of one resolution: pairs of a residual block and, where the level has them, a transformer."""

    def __init__(self, config: UNetConfig, pairs: list[tuple[int, int]], attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(i, o, groups=config.groups, eps=NORM_EPS, time_width=4 * config.channels, dropout=config.dropout)
            for i, o in pairs
        )
        self.attentions = nn.ModuleList(transformer(config, o) for _, o in pairs if attention)

    def block(self, index: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[index](x, time)
        return self.attentions[index](x, context) if len(self.attentions) else x


class DownLevel(_Level):
    """Blocks, then half the side; keeps every state for the way up."""

    def __init__(self, config: UNetConfig, pairs: list[tuple[int, int]], attention: bool, last: bool) -> None:
        super().__init__(config, pairs, attention)
        if not last:
            self.downsamplers = nn.ModuleList([Downsample(pairs[-1][1], symmetric=True)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.block(index, x, time, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class UpLevel(_Level):
    """Blocks that read the states of the way down, then twice the side."""

    def __init__(self, config: UNetConfig, pairs: list[tuple[int, int]], attention: bool, last: bool) -> None:
        super().__init__(config, pairs, attention)
        if not last:
            self.upsamplers = nn.ModuleList([Upsample(pairs[-1][1])])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.finest(self.coarse(x, time, context, skips), time, context, skips)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x

    def coarse(self, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """All blocks but the last two."""
        return self._blocks(range(len(self.resnets) - 2), x, time, context, skips)

    def finest(self, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """The last two blocks, which on the finest level read the first two states of the way down."""
        return self._blocks(range(len(self.resnets) - 2, len(self.resnets)), x, time, context, skips)

    def _blocks(self, indices: range, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for index in indices:
            x = self.block(index, torch.cat([x, per_text(skips.pop(), x)], dim=1), time, context)
        return x


class Middle(_Level):
    """Residual block, transformer, residual block at the coarsest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        width = config.widths[-1]
        super().__init__(config, [(width, width), (width, width)], attention=False)
        self.attentions = nn.ModuleList([transformer(config, width)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


def transformer(config: UNetConfig, width: int) -> SpatialTransformer:
    """The spatial transformer of a level that is `width` channels wide."""
    return SpatialTransformer(
        width,
        config.heads or width // (config.head_width or width),
        config.context_width,
        depth=config.transformer_depth,
        groups=config.groups,
        linear=config.linear_projection,
        dropout=config.dropout,
    )


class UNet(nn.Module):
    """Noisy latent, timestep and text states to the network's prediction (ε, v or x0: the caller knows).

    Source: Rombach et al. 2022, Section 3.3; module names are those of diffusers' UNet2DConditionModel.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(config.channels, 4 * config.channels)
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        for level, width in enumerate(widths):
            previous = widths[max(level - 1, 0)]
            pairs = [(previous if j == 0 else width, width) for j in range(config.res_blocks)]
            last = level == len(widths) - 1
            self.down_blocks.append(DownLevel(config, pairs, config.attention[level], last))
            skips += [width] * (config.res_blocks + (not last))
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList()
        previous = widths[-1]
        for level in reversed(range(len(widths))):
            pairs = []
            for _ in range(config.res_blocks + 1):
                pairs.append((previous + skips.pop(), widths[level]))
                previous = widths[level]
            self.up_blocks.append(UpLevel(config, pairs, config.attention[level], last=level == 0))
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        zero_init(self.conv_out)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        context: Float[Tensor, "k l width"],
        keep: Callable[[Tensor], None] | None = None,
    ) -> Float[Tensor, "k out h w"]:
        """`x` with unit variance at timestep `t` (0…999, may be fractional); sides a multiple of `config.factor`.

        There may be several texts for each of b latents, k = texts · b rows, the first text of all latents first: what
        comes before the first cross-attention is then computed once for all texts. `keep` gets the state that the last
        two blocks start from, in which all coarser levels have had their say.
        """
        time = self.embedded(t, x)
        x = self.conv_in(x)
        skips = [x]
        for down in self.down_blocks:
            x = down(x, time, context, skips)
        x = self.mid_block(x, time, context)
        *coarser, last = self.up_blocks
        for up in coarser:
            x = up(x, time, context, skips)
        assert isinstance(last, UpLevel)
        x = last.coarse(x, time, context, skips)
        if keep is not None:
            keep(x)
        return self.said(last.finest(x, time, context, skips))

    def finest_transformers(self) -> list[SpatialTransformer]:
        """The transformers of the finest level that has some, of the way down and up; the middle always has one."""
        levels = [*zip(self.down_blocks, reversed(self.up_blocks), strict=True), (self.mid_block,)]
        modules = ([module for block in level for module in block.modules()] for level in levels)
        found = ([module for module in level if isinstance(module, SpatialTransformer)] for level in modules)
        return next(transformers for transformers in found if transformers)

    def embedded(self, t: Float[Tensor, " b"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b width"]:
        """What every block is told of the timestep, in the dtype of `x`."""
        return self.time_embedding(timestep_embedding(t, self.config.channels).to(x.dtype))

    def said(self, x: Float[Tensor, "k c h w"]) -> Float[Tensor, "k out h w"]:
        """The prediction, from the last state."""
        return self.conv_out(silu(self.conv_norm_out(x)))
