"""CLIP's objective: an image and its caption are closer than any other pair of the batch, over all processes."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import PositiveFloat, model_validator
from torch import Tensor, nn

from ldm.models.clip import Clip, sigmoid_loss
from ldm.training.batch import Batch, Draws
from ldm.training.conditioned import remembered_ids
from ldm.training.loop import Batches
from ldm.training.optimization import OptimizationConfig
from ldm.training.source import Pictures
from ldm.training.update import Losses, Objective
from ldm.training.workers import rows_of_all, summed, workers


class ClipTraining(OptimizationConfig):
    """The CLIP stage."""

    # The text tower begins as that of `--base`, whose shape it has, instead of anew; the image tower is always new.
    from_base: bool = False
    # infonce: a choice among all captions (Radford et al. 2021); sigmoid: every pair by itself, which small batches
    # prefer, with scale and bias that learn (Zhai et al. 2023).
    loss: Literal["infonce", "sigmoid"] = "infonce"
    temperature: PositiveFloat = 0.07
    bias: float = -10.0
    # All pictures are decoded once, at the start, and kept in memory at the side at which they are read.
    resident: bool = False

    @model_validator(mode="after")
    def _whole_batches(self) -> "ClipTraining":
        if self.micro_batch_size is not None:
            raise ValueError("pairs are compared within the whole batch: leave micro_batch_size out")
        return self


class Contrast(nn.Module):
    """Both towers, and the scale and bias of the sigmoid loss, which learn with them."""

    def __init__(self, clip: Clip, config: ClipTraining) -> None:
        super().__init__()
        self.clip = clip
        if config.loss == "sigmoid":
            self.log_scale = nn.Parameter(torch.tensor([1.0 / config.temperature]).log())
            self.bias = nn.Parameter(torch.tensor([config.bias]))

    def forward(self, images: Float[Tensor, "b 3 h w"], ids: Tensor) -> tuple[Tensor, ...]:
        """Unit vectors of images and texts, and what scales and shifts their products."""
        image, text = self.clip(images, ids)
        return (image, text, self.log_scale.exp(), self.bias) if hasattr(self, "bias") else (image, text)


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation with the mean and variance of the batches of all processes (torch's own is for GPUs only)."""

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "GlobalBatchNorm":
        """The same norm, with the same parameters and buffers."""
        made = cls(norm.num_features, norm.eps, norm.momentum)
        made.load_state_dict(norm.state_dict())
        return made

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        world = workers().world
        if not self.training or world == 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        values = x.float()
        mean, square = summed(torch.stack([values.mean(dim=(0, 2, 3)), values.square().mean(dim=(0, 2, 3))])) / world
        variance = square - mean.square()
        with torch.no_grad():
            count = world * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (values * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


def normalise_globally(module: nn.Module) -> None:
    """Replace every batch norm by one over all processes, where there are several."""
    if workers().world == 1:
        return
    for name, norm in [(n, m) for n, m in module.named_modules() if isinstance(m, nn.BatchNorm2d)]:
        module.set_submodule(name, GlobalBatchNorm.of(norm))


def contrastive_loss(
    images: Float[Tensor, "b e"], texts: Float[Tensor, "n e"], scale: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """InfoNCE both ways (Radford et al. 2021, Figure 3) and the share of images that find their own text first.

    The first b texts belong to the images; further ones are hard negatives, which only images are compared with.
    Without them this is open_clip's `ClipLoss`.
    """
    logits = scale * images @ texts.T
    own = torch.arange(len(images), device=images.device)
    loss = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(images)].T, own))
    return loss, (logits.argmax(dim=1) == own).float().mean()


def clip_losses(config: ClipTraining) -> Objective:
    """The loss of one batch of (images, token ids) through `Contrast`; the same in all processes."""

    def losses(module: nn.Module, batch: Batch, draws: Draws) -> Losses:
        (images, ids), (negatives,) = batch.rows, batch.shared
        own_images, texts, *learned = module(images, torch.cat([ids, negatives]))
        image, text = rows_of_all(own_images), rows_of_all(texts[: len(images)])
        negative = rows_of_all(texts[len(images) :])
        loss, accuracy = contrastive_loss(image, torch.cat([text, negative]), 1.0 / config.temperature)
        if config.loss == "sigmoid":
            loss = sigmoid_loss(image, text, *learned)
        return {"loss": loss, "accuracy": accuracy}

    return losses


def pairs(pictures: Pictures, clip: Clip) -> Batches:
    """Batches of images and token ids; shared by them, ids of the "negative" captions of samples that have one."""
    known = remembered_ids(clip.text)

    def batches(start: int) -> Iterator[Batch]:
        for chosen in pictures(start):
            negatives = [str(facts["negative"]) for facts in chosen.facts if "negative" in facts]
            ids = torch.stack([known(caption) for caption in (*chosen.captions, *negatives)])
            yield Batch((chosen.images, ids[: len(chosen)]), (ids[len(chosen) :],), chosen.keys)

    return batches
