"""The text tower learns what is where: from the states of a caption alone, a small decoder draws its thumbnail.

CLIP asks which caption belongs to a picture, and in a batch hardly two differ by the order of their words alone; a
UNet learns to lay things out from its last, noisiest timesteps, where a wrong order costs next to nothing. So neither
teaches a small tower that "a above b" is not "b above a" (docs/experiments.md). A thumbnail is all layout.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ldm.models.text import ClipTextEncoder
from ldm.training.batch import Batch, Draws
from ldm.training.conditioned import remembered_ids, without_idle_block
from ldm.training.loop import Batches
from ldm.training.optimization import OptimizationConfig
from ldm.training.source import Pictures
from ldm.training.update import Losses, Objective

HEAD_WIDTH = 32


class ThumbnailTraining(OptimizationConfig):
    """The thumbnail stage, behind CLIP's."""

    # Pixels along a side of the thumbnail.
    side: int = Field(8, ge=2, le=32)
    # Layers of the decoder: the fewer, the more the states themselves must say.
    layers: PositiveInt = 2
    # All pictures are decoded once, at the start, and kept as thumbnails in memory.
    resident: bool = False


class DecoderLayer(nn.Module):
    """Every pixel reads the text states by cross-attention, and then thinks by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, max(1, width // HEAD_WIDTH), batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "b p d"], states: Float[Tensor, "b l d"]) -> Float[Tensor, "b p d"]:
        x = x + self.attention(self.norm1(x), states, states, need_weights=False)[0]
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class Thumbnail(nn.Module):
    """A text tower and the decoder that draws from its states; only the tower is kept."""

    def __init__(self, text: ClipTextEncoder, config: ThumbnailTraining) -> None:
        super().__init__()
        self.side, width = config.side, text.config.width
        self.text = without_idle_block(text)
        self.pixels = nn.Parameter(0.1 * torch.randn(config.side**2, width))
        self.layers = nn.ModuleList(DecoderLayer(width) for _ in range(config.layers))
        self.out = nn.Linear(width, 3)

    def forward(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b 3 s s"]:
        """The thumbnails of captions, in [−1, 1] where they are right."""
        states, _ = self.text(ids)
        x = self.pixels.expand(len(ids), -1, -1)
        for layer in self.layers:
            x = layer(x, states)
        drawn: Tensor = self.out(x).transpose(1, 2).unflatten(2, (self.side, self.side))
        return drawn


def thumbnail_losses() -> Objective:
    """The mean squared error of thumbnails drawn from captions alone."""

    def losses(module: nn.Module, batch: Batch, draws: Draws) -> Losses:
        images, ids = batch.rows
        error = (module(ids).float() - images).square().mean(dim=(1, 2, 3))
        return {"loss": error.mean()}

    return losses


def thumbnails(pictures: Pictures, text: ClipTextEncoder) -> Batches:
    """Batches of pictures, which are read at the thumbnail's side, and the token ids of their captions."""
    known = remembered_ids(text)

    def batches(start: int) -> Iterator[Batch]:
        for chosen in pictures(start):
            yield Batch((chosen.images, torch.stack([known(c) for c in chosen.captions])), keys=chosen.keys)

    return batches
