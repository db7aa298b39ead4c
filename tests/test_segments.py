"""A run in segments: a limit of time ends each with its state saved, and what there is can be drawn with."""

import io
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_training
import torch
from PIL import Image

from ldm.bundle import Bundle
from ldm.config import parse_yaml, validate
from ldm.data.resident import ResidentShards
from ldm.data.shards import write_shards
from ldm.errors import SettingError
from ldm.evaluation.towers import open_evaluator
from ldm.training import checkpoint, source
from ldm.training.evaluator import evaluator_stage
from ldm.training.latents import LatentCache
from ldm.training.loop import Report
from ldm.training.preflight import check_data
from ldm.training.recipe import Recipe
from ldm.training.run import Run, model_so_far
from ldm.training.signals import EXIT_SAVED, Stopped, caught
from ldm.training.snapshot import snapshot
from ldm.training.stages import clip_stage, unet_stage

STAGE = {"side": 16, "pictures": 8, "steps": 5, "batch_size": 4, "learning_rate": 1e-2, "precision": "no"}
TOWERS = {"embedding": 8, "image_size": 32, "width": 4}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A tiny model, two stages of its UNet, the first with its text tower, and a judge; four pictures."""
    shown = []
    for name in ("red", "green", "blue", "black"):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), name).save(file, "PNG")
        shown.append({"__key__": name, "png": file.getvalue(), "txt": f"a {name}"})
    write_shards(shown, tmp_path / "shards", 4, "plain")
    model = parse_yaml(tiny_training.MODEL, "tiny")
    settings = {
        "name": "tiny",
        "data": {"shards": str(tmp_path / "shards")},
        "model": model,
        "evaluator": {"clip": TOWERS, "text": {**model["text"], "vocabulary": 700}},
        "evaluator_training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
        "unet_training": [{**STAGE, "train_text": True, "save_every": 2}, STAGE],
        "sample_prompts": ["a red"],
    }
    recipe = validate(settings, Recipe, "tiny")
    return Run(recipe, tmp_path)


def cache(condition: tuple[int, ...]) -> LatentCache:
    """Eight latents, and conditions of this shape for one caption and none."""
    drawn = torch.Generator().manual_seed(0)
    latent = torch.randn(8, 4, 8, 8, generator=drawn)
    return LatentCache(latent, latent.abs(), torch.ones(2, *condition), torch.zeros(8, 1, dtype=torch.long))


def same(bundle: Bundle, part: str, weights: dict[str, torch.Tensor], prefix: str = "") -> bool:
    """Are these, in half precision, the weights of this part?"""
    own = dict(getattr(bundle, part).named_parameters())
    return all(torch.equal(own[name].half(), weights[prefix + name].half()) for name in own)


def test_a_bundle_of_what_there_is_has_the_newest_averages(run: Run) -> None:
    with pytest.raises(SettingError, match="no checkpoint yet"):
        snapshot(run)
    model = model_so_far(run)
    for report in unet_stage(run, 0, cache((8, 1)), model):
        if report.step == 3:
            break  # as a process that is killed: step 2 is saved
    found = checkpoint.newest(run.checkpoints("unet-0"))
    assert found is not None and found.name == "step_00000002"
    ema, drawing = checkpoint.read(found).tensors["ema"], Bundle.load(str(snapshot(run)))
    assert same(drawing, "unet", ema, "unet.") and same(drawing, "text", ema, "text.")
    list(unet_stage(run, 0, cache((8, 1)), model_so_far(run)))
    product, drawing = checkpoint.load_tensors(run.product("unet-0")), Bundle.load(str(snapshot(run)))
    assert same(drawing, "unet", product) and not same(drawing, "unet", ema, "unet.")
    assert same(drawing, "text", checkpoint.load_tensors(run.product("text-0")))
    list(unet_stage(run, 1, cache((8, 16)), model_so_far(run)))
    assert same(Bundle.load(str(snapshot(run))), "unet", checkpoint.load_tensors(run.product("unet-1")))


def test_a_judge_is_trained_beside_the_model_and_opens_by_itself(run: Run) -> None:
    reports = list(evaluator_stage(run))
    assert [report.step for report in reports] == [1, 2] and list(evaluator_stage(run)) == []
    judge = open_evaluator(run.product("evaluator"))
    assert judge.extractor.side == 32 and judge.texts(["a red", "a blue"]).shape == (2, 8)
    assert judge.clip.text.config.vocabulary == 700
    assert not run.product("clip").exists() and not run.product("text").exists()


@pytest.mark.parametrize("stage", [clip_stage, evaluator_stage])
def test_both_clips_see_the_same_pictures_from_memory(
    run: Run, tmp_path: Path, stage: Callable[[Run], Iterator[Report]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = list[int]()
    monkeypatch.setattr(source, "ResidentShards", lambda *how: kept.append(1) or ResidentShards(*how))
    config, shape = run.recipe.evaluator_training, run.recipe.evaluator
    assert config is not None and shape is not None
    name = "clip_training" if stage is clip_stage else "evaluator_training"

    def recipe(resident: bool, crop: str = "centre") -> Recipe:
        sections = {"clip": shape.clip, "clip_training": None, "evaluator_training": None}
        data = run.recipe.data.model_copy(update={"crop": crop})
        own = config.model_copy(update={"resident": resident})
        return run.recipe.model_copy(update={**sections, name: own, "data": data})

    runs = [Run(recipe(resident), tmp_path / str(resident)) for resident in (False, True)]
    losses = [[report.losses["loss"] for report in stage(one)] for one in runs]
    assert losses[0] == losses[1] and kept == [1]
    check_data(recipe(True), 8, latents=False)
    check_data(recipe(False, "random"), 8, latents=False)
    with pytest.raises(SettingError, match="resident: needs mode indexed, crop centre"):
        check_data(recipe(True, "random"), 8, latents=False)


def test_time_that_is_up_is_a_signal_like_others() -> None:
    with caught(minutes=0.003) as stop:
        until = time.monotonic() + 20
        while not stop.number and time.monotonic() < until:
            time.sleep(0.01)
        assert stop.number == signal.SIGALRM
        with pytest.raises(Stopped, match="--minutes") as stopped:
            stop.check()
    assert stopped.value.exit_code == EXIT_SAVED
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_without_a_limit_none_comes() -> None:
    with caught():
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
