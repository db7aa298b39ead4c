"""A CLIP that only judges: trained on the same captioned pictures as the model, of another seed and shape.

What a model is judged by must not be what it was steered by: pictures that please its own text tower say little.
"""

import json
from collections.abc import Iterator

import torch

from ldm.models.clip import Clip
from ldm.training.checkpoint import save_tensors
from ldm.training.clip import Contrast, clip_losses, normalise_globally, pairs
from ldm.training.loop import Report, train
from ldm.training.run import Run
from ldm.training.workers import workers

NAME = "evaluator"


def evaluator_stage(run: Run) -> Iterator[Report]:
    """Train the judge; leaves its weights, with the shapes of both towers in the file's metadata."""
    config, shape = run.recipe.evaluator_training, run.recipe.evaluator
    if config is None or shape is None or run.has(NAME):
        return
    seed = run.recipe.seed + 1  # of the weights, the batches and the choice of captions
    torch.manual_seed(seed)
    clip = Clip(shape.clip, shape.text)
    normalise_globally(clip)
    run = run.resident() if config.resident else run
    yield from train(
        Contrast(clip, config),
        clip_losses(config),
        pairs(run.pictures(config.batch_size, shape.clip.image_size, seed), clip),
        config,
        run.checkpoints(NAME),
        seed,
        run.conduct,
    )
    if workers().main:
        towers = {"image": shape.clip.model_dump(mode="json"), "text": shape.text.model_dump(mode="json")}
        save_tensors(run.product(NAME), dict(clip.state_dict()), {"clip": json.dumps(towers)})
    workers().wait()
