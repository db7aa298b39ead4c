"""A bundle of what a run has at this moment: the averaged weights of its newest checkpoint, or its last product."""

from pathlib import Path

from torch import Tensor

from ldm.errors import SettingError
from ldm.training import checkpoint
from ldm.training.run import Run, give_weights, model_so_far


def snapshot(run: Run) -> Path:
    """Write the bundle, named as the recipe, into the run's folder; returns its folder.

    Raises SettingError for a run whose UNet has left nothing yet.
    """
    bundle = model_so_far(run)
    give_weights(bundle, newest_weights(run))
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
