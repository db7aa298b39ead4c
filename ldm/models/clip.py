"""CLIP: an image tower and the text tower that meet in one space, so that the text tower learns to see."""

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from ldm.config import Config
from ldm.models.text import ClipTextConfig, ClipTextEncoder, open_clip_module


class ClipConfig(Config):
    """The image tower (open_clip's modified ResNet) and the common space; the text tower has its own config."""

    embedding: PositiveInt = 192
    image_size: PositiveInt = 64
    width: PositiveInt = 32
    layers: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (1, 1, 1, 1)


class TowersConfig(Config):
    """Both towers of a CLIP that is no part of a model."""

    clip: ClipConfig
    text: ClipTextConfig


class Clip(nn.Module):
    """Both towers; a convolutional image tower learns more from few pictures than a transformer (2404.08197)."""

    def __init__(self, config: ClipConfig, text: ClipTextConfig) -> None:
        super().__init__()
        open_clip_module()
        from open_clip.modified_resnet import ModifiedResNet

        self.config = config
        self.image = ModifiedResNet(
            layers=list(config.layers),
            output_dim=config.embedding,
            heads=config.width * 32 // 64,
            image_size=config.image_size,
            width=config.width,
        )
        self.text = ClipTextEncoder(text)
        self.text_projection = nn.Linear(text.width, config.embedding, bias=False)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], ids: Tensor
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "n e"]]:
        """Unit vectors of images and of texts."""
        # A fifth of a training step less on a CPU; the weights may stay as they are.
        images = images.contiguous(memory_format=torch.channels_last)
        image = nn.functional.normalize(self.image(images).float(), dim=-1)
        _, pooled = self.text(ids)
        return image, nn.functional.normalize(self.text_projection(pooled).float(), dim=-1)


def sigmoid_loss(
    images: Float[Tensor, "b e"], texts: Float[Tensor, "b e"], scale: Float[Tensor, " 1"], bias: Float[Tensor, " 1"]
) -> Float[Tensor, ""]:
    """open_clip's SigLIP loss: for every pair whether it belongs together (Zhai et al. 2023, Algorithm 1)."""
    open_clip_module()
    from open_clip.loss import SigLipLoss

    loss: Tensor = SigLipLoss()(images, texts, scale, bias)
    return loss
