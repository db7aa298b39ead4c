"""The thumbnail stage teaches a text tower what is where, and everything behind it reads with the taught tower."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_training
import torch
from PIL import Image

from ldm.config import parse_yaml, validate
from ldm.data.shards import write_shards
from ldm.errors import SettingError
from ldm.models.text import ClipTextConfig, ClipTextEncoder
from ldm.training.batch import Batch, Draws
from ldm.training.diffusion import UNetTraining
from ldm.training.recipe import Recipe
from ldm.training.run import Run, model_so_far
from ldm.training.stages import thumbnail_stage
from ldm.training.thumbnail import Thumbnail, ThumbnailTraining, thumbnail_losses, thumbnails

ORDERS = {"red left of blue": ("red", "blue"), "blue left of red": ("blue", "red")}
SETTINGS = {"steps": 60, "batch_size": 4, "learning_rate": 1e-2, "precision": "no", "ema_decay": 0.8, "side": 4}


def run(folder: Path, text: dict[str, object] | None = None, **settings: object) -> Run:
    """Two pictures whose captions have the same words in another order, and a stage of thumbnails."""
    samples = []
    for number, (caption, (left, right)) in enumerate(ORDERS.items()):
        picture = Image.new("RGB", (16, 16), left)
        picture.paste(right, (8, 0, 16, 16))
        file = io.BytesIO()
        picture.save(file, "PNG")
        samples.append({"__key__": str(number), "png": file.getvalue(), "txt": caption})
    write_shards(samples, folder / "shards", 2, "orders")
    model = parse_yaml(tiny_training.MODEL, "tiny")
    recipe = {
        "name": "orders",
        "data": {"shards": str(folder / "shards")},
        "model": {**model, "text": text or {**model["text"], "causal": False}},
        "thumbnail_training": {**SETTINGS, **settings},
        "sample_prompts": ["red left of blue"],
    }
    return Run(validate(recipe, Recipe, "orders"), folder)


def states(run: Run) -> torch.Tensor:
    """What the model reads for the two captions."""
    return model_so_far(run).text.encode([*ORDERS]).tokens


def test_a_tower_learns_the_order_of_the_same_words(tmp_path: Path) -> None:
    made = run(tmp_path)
    untaught = states(made)
    losses = [report.losses["loss"] for report in thumbnail_stage(made)]
    # Who draws both halves in the mean of the two pictures is wrong by half of what separates red from blue.
    ignorant = 2 / 3
    assert losses[0] > ignorant > 10 * losses[-1]
    taught = states(made)
    assert not torch.allclose(taught, untaught, atol=0.1)
    assert list(thumbnail_stage(made)) == []  # its product is there


def test_pictures_in_memory_are_those_of_the_shards(tmp_path: Path) -> None:
    read, kept = run(tmp_path / "read", steps=3), run(tmp_path / "kept", steps=3, resident=True)
    losses = [[report.losses["loss"] for report in thumbnail_stage(made)] for made in (read, kept)]
    assert losses[0] == losses[1]


def test_a_unet_stage_that_trains_the_tower_comes_later(tmp_path: Path) -> None:
    made = run(tmp_path)
    assert made.text == made.product("text")
    made.product("text-thumbnail").touch()
    assert made.text == made.product("text-thumbnail")
    stage = UNetTraining(steps=1, batch_size=1, learning_rate=1e-3, side=16, train_text=True)
    later = replace(made, recipe=made.recipe.model_copy(update={"unet_training": (stage,)}))
    later.product("text-0").touch()
    assert later.text == later.product("text-0")


def test_a_model_that_reads_labels_has_nothing_to_learn(tmp_path: Path) -> None:
    made = run(tmp_path, {"kind": "labels", "labels": ["a"], "width": 16})
    with pytest.raises(SettingError, match=r"thumbnail_training: this model reads labels, not words; leave"):
        list(thumbnail_stage(made))


def test_the_loss_is_the_squared_error_of_what_is_drawn() -> None:
    text = tiny_training.model().text
    assert isinstance(text, ClipTextConfig)
    config = ThumbnailTraining(side=4, layers=1, steps=1, batch_size=2, learning_rate=1e-3)
    module = Thumbnail(ClipTextEncoder(text), config)
    ids = module.text.tokenize(["a red", "a blue"])
    drawn = module(ids)
    assert drawn.shape == (2, 3, 4, 4)
    batch = Batch((drawn.detach() + torch.tensor([0.5, -1.5])[:, None, None, None], ids))
    losses = thumbnail_losses()(module, batch, Draws(0, 0, 2))
    assert losses["loss"].item() == pytest.approx((0.5**2 + 1.5**2) / 2, abs=1e-6)


def test_pixels_of_a_thumbnail_are_in_the_order_of_the_picture() -> None:
    """Pixel (row, column) is query row · side + column: what the decoder says of it lands there."""
    text = tiny_training.model().text
    assert isinstance(text, ClipTextConfig)
    module = Thumbnail(ClipTextEncoder(text), ThumbnailTraining(side=4, steps=1, batch_size=1, learning_rate=1e-3))
    ids = module.text.tokenize(["a red"])
    before = module(ids)
    with torch.no_grad():
        module.pixels[4 * 2 + 1] += 1
    changed = (module(ids) - before).abs().sum(dim=(0, 1))
    assert changed.nonzero().tolist() == [[2, 1]]


def test_batches_pair_pictures_with_their_captions() -> None:
    text = tiny_training.model().text
    assert isinstance(text, ClipTextConfig)
    encoder = ClipTextEncoder(text)
    batch, pictures = next(thumbnails(tiny_training.pictures, encoder)(2)), next(tiny_training.pictures(2))
    images, ids = batch.rows
    assert torch.equal(images, pictures.images) and torch.equal(ids, encoder.tokenize(pictures.captions))
    assert batch.keys == pictures.keys
