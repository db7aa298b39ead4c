"""A bundle of what a run has at this moment: the averaged weights of its newest checkpoint, or its last product."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ldm.errors import SettingError
from ldm.training import checkpoint
from ldm.training.consistency import few_steps
from ldm.training.run import Run, give_weights, model_so_far


def snapshot(run: Run) -> Path:
    """Write the bundle, named as the recipe, into the run's folder; returns its folder.

    Raises SettingError for a run whose UNet has left nothing yet.
    """
    bundle = model_so_far(run)
    if run.recipe.consistency_training is not None:
        bundle = replace(bundle, config=few_steps(bundle.config))
    give_weights(bundle, newest_weights(run))
    return bundle.save(run.folder / run.recipe.name)


def newest_weights(run: Run) -> dict[str, Tensor]:
    """The UNet's weights by name, behind `unet.` and beside the text tower's where both learn."""
    distilled = [("unet-consistency", "consistency")] if run.recipe.consistency_training is not None else []
    names = [(f"unet-{index}", f"unet-{index}") for index in reversed(range(len(run.recipe.unet_training)))]
    for product, stage in distilled or names:
        if run.product(product).is_file():
            return checkpoint.load_tensors(run.product(product))
        saved = checkpoint.newest(run.checkpoints(stage))
        if saved is not None:
            return checkpoint.read(saved).tensors["ema"]
    raise SettingError(f"{run.folder}: its UNet has no checkpoint yet, nothing to bundle; train it first")
