"""CLIP's objective: an image and its caption are closer than any other pair of the batch."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from pydantic import PositiveFloat
from torch import Tensor, nn

from ldm.images import to_tensor
from ldm.models.clip import Clip
from ldm.training.loop import Batch, Losses, OptimizationConfig


class ClipTraining(OptimizationConfig):
    """The CLIP stage."""

    temperature: PositiveFloat = 0.07


def contrastive_loss(
    images: Float[Tensor, "b e"], texts: Float[Tensor, "n e"], scale: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """InfoNCE both ways (Radford et al. 2021, Figure 3) and the share of images that find their own text first.

    The first b texts belong to the images; further ones are hard negatives, which only images are compared with.
    """
    logits = scale * images @ texts.T
    own = torch.arange(len(images), device=images.device)
    loss = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(images)].T, own))
    return loss, (logits.argmax(dim=1) == own).float().mean()


def clip_losses(config: ClipTraining) -> Callable[[nn.Module, Batch, torch.Generator], Losses]:
    """The loss of one batch of (images, token ids)."""

    def losses(module: nn.Module, batch: Batch, generator: torch.Generator) -> Losses:
        images, ids = batch
        image, text = module(images, ids)
        loss, accuracy = contrastive_loss(image, text, 1.0 / config.temperature)
        return {"loss": loss, "accuracy": accuracy}

    return losses


def pairs(
    samples: Iterator[tuple[Image.Image, str, dict[str, object]]], clip: Clip, batch_size: int
) -> Iterator[tuple[Float[Tensor, "b 3 h w"], Tensor]]:
    """Batches of images and token ids; the "negative" captions of samples that have one follow the true ones."""
    side = clip.config.image_size
    while True:
        images, captions, negatives = [], [], []
        for _ in range(batch_size):
            image, caption, details = next(samples)
            images.append(to_tensor(image.resize((side, side), Image.Resampling.BOX)))
            captions.append(caption)
            if "negative" in details:
                negatives.append(str(details["negative"]))
        yield torch.stack(images), clip.text.tokenize([*captions, *negatives])
