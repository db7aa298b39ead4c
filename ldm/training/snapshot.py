"""A bundle of what a run has at this moment: the averaged weights of its newest checkpoint, or its last product."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.bundle import Bundle
from ldm.errors import SettingError
from ldm.training import checkpoint
from ldm.training.run import Run, model_so_far


def snapshot(run: Run) -> Path:
    """Write the bundle, named as the recipe, into the run's folder; returns its folder.

    Raises SettingError for a run whose UNet has left nothing yet.
    """
    bundle = model_so_far(run)
    take(bundle, newest_weights(run))
    return bundle.save(run.folder / run.recipe.name)


def newest_weights(run: Run) -> dict[str, Tensor]:
    """The UNet's weights by name, behind `unet.` and beside the text tower's where both learn."""
    for index in reversed(range(len(run.recipe.unet_training))):
        product = run.product(f"unet-{index}")
        if product.is_file():
            return checkpoint.load_tensors(product)
        saved = checkpoint.newest(run.checkpoints(f"unet-{index}"))
        if saved is not None:
            return checkpoint.read(saved).tensors["ema"]
    raise SettingError(f"{run.folder}: its UNet has no checkpoint yet, nothing to bundle; train it first")


@torch.no_grad()
def take(bundle: Bundle, weights: dict[str, Tensor]) -> None:
    """Give the networks of a bundle their weights."""
    parameters: dict[str, Tensor] = {}
    for part in ("text", "unet"):
        module: nn.Module = getattr(bundle, part)
        parameters |= {f"{part}.{name}": parameter for name, parameter in module.named_parameters()}
    for name, weight in weights.items():
        parameters[name if name in parameters else f"unet.{name}"].copy_(weight)
