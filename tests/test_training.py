"""Training resumes where it was, averages as its formula says, and goes from nothing to a bundle that draws."""

import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_training
import torch
from PIL import Image
from torch import Tensor, nn

from ldm import config as configuration
from ldm.bundle import Bundle
from ldm.data.digits import BUNDLED, load, read_idx
from ldm.data.pictures import PictureBatch
from ldm.data.shards import write_shards
from ldm.errors import DataError, NotFiniteError, SettingError
from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.pipeline import TextToImage
from ldm.request import GenerationRequest
from ldm.training import checkpoint, latents, stages, state
from ldm.training.autoencoder import (
    AutoencoderTraining,
    Reconstruction,
    autoencoder_losses,
    crops,
    fit_statistics,
    gradient_loss,
    initialise,
    transform,
)
from ldm.training.batch import Batch, Draws
from ldm.training.clip import contrastive_loss
from ldm.training.diffusion import DiffusionTraining, latent_batches
from ldm.training.ema import EMA
from ldm.training.latents import LatentCache
from ldm.training.loop import train
from ldm.training.optimization import OptimizationConfig, learning_rate
from ldm.training.recipe import Recipe
from ldm.training.run import Run, model_so_far
from ldm.training.source import DataConfig
from ldm.training.stages import averaged, finish, latents_stage, unet_stage
from ldm.training.update import Losses, Update
from ldm.training.workers import workers

ROOT = Path(__file__).resolve().parent.parent
QUICK = OptimizationConfig(
    steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=2, ema_decay=0.5, precision="no", save_every=3
)


class Line(nn.Module):
    """y = w x + b."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def squared(module: nn.Module, batch: Batch, draws: Draws) -> Losses:
    (x,) = batch.rows
    return {"loss": (module(x) - 3 * x + draws.normal(1)).square().mean()}


def numbers(start: int) -> Iterator[Batch]:
    step = start
    while True:
        x = torch.randn(4, 1, generator=torch.Generator().manual_seed(step))
        yield Batch((x,), keys=tuple(f"number {step}.{i}" for i in range(4)))
        step += 1


def test_a_finished_run_does_nothing_and_gives_the_averaged_weights(tmp_path: Path) -> None:
    first, again = Line(), Line()
    for report in train(first, squared, numbers, QUICK, tmp_path, seed=1):
        averages = report.averages()
    assert list(train(again, squared, numbers, QUICK, tmp_path, seed=1)) == []
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, averages[name])


def test_updates_that_are_not_finite_are_skipped_and_then_stop_the_run(tmp_path: Path) -> None:
    def poisoned(module: nn.Module, batch: Batch, draws: Draws) -> Losses:
        return {"loss": module(batch.rows[0]).mean() * math.nan}

    model = Line()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NotFiniteError, match="5 updates in a row"):
        list(train(model, poisoned, numbers, QUICK, tmp_path, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert checkpoint.newest(tmp_path) is None


def test_a_save_at_a_bad_update_is_made_up_for_at_the_next_good_one(tmp_path: Path) -> None:
    def poisoned(module: nn.Module, batch: Batch, draws: Draws) -> Losses:
        losses = squared(module, batch, draws)
        return {"loss": losses["loss"] * (math.nan if draws.step in (1, 2) else 1.0)}

    config = QUICK.model_copy(update={"steps": 8, "save_every": 3, "keep": 9})
    list(train(Line(), poisoned, numbers, config, tmp_path, seed=1))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_0000000{step}" for step in (4, 6, 8)]


def test_more_than_ten_bad_updates_of_the_last_thousand_stop_the_run_also_after_a_resume(tmp_path: Path) -> None:
    def poisoned(module: nn.Module, batch: Batch, draws: Draws) -> Losses:
        losses = squared(module, batch, draws)
        return {"loss": losses["loss"] * (math.nan if draws.step % 2 else 1.0)}

    config = QUICK.model_copy(update={"steps": 40, "save_every": 5})
    for report in train(Line(), poisoned, numbers, config, tmp_path, seed=1):
        if report.step == 16:
            break
    with pytest.raises(NotFiniteError, match=r"^step 22: .*: 11 of the last 1000 updates"):
        list(train(Line(), poisoned, numbers, config, tmp_path, seed=1))


def test_bad_updates_of_long_ago_are_forgotten() -> None:
    update = Update(state.trainee(Line(), QUICK), Line(), squared, QUICK, [], [], workers())
    for step in range(1, 3001, 100):
        update.learner.bad = 0
        update.leave_out(step, [], "overflow")
    assert update.learner.skipped == 30 and len(update.learner.bad_lately) == 10


def test_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    config = OptimizationConfig(steps=100, batch_size=1, learning_rate=1.0, warmup_steps=10, decay=0.5)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[49] == 1.0
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)


def test_average_follows_its_formula() -> None:
    model = Line()
    ema, known = EMA(model, decay=0.5), model.linear.weight.item()
    for update in range(1, 20):
        with torch.no_grad():
            model.linear.weight.fill_(float(update))
        ema.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        known = decay * known + (1 - decay) * update
    assert ema.shadow["linear.weight"].item() == pytest.approx(known)


def test_contrastive_loss_has_its_known_values() -> None:
    same = torch.eye(4)
    loss, accuracy = contrastive_loss(same, same, scale=100.0)
    assert loss < 1e-6 and accuracy == 1.0
    loss, _ = contrastive_loss(torch.ones(4, 2) / 2**0.5, torch.ones(4, 2) / 2**0.5, scale=1.0)
    assert loss.item() == pytest.approx(math.log(4))
    with_negatives, accuracy = contrastive_loss(same, torch.cat([same, same * 1.01]), scale=100.0)
    assert with_negatives > 0.1 and accuracy == 0.0, "hard negatives count against the image"


def test_gradient_loss_sees_edges_and_not_brightness() -> None:
    image = torch.rand(1, 3, 16, 16)
    assert gradient_loss(image, image + 0.5) < 1e-6
    assert gradient_loss(image, image.flip(3)) > 0.1


def test_transformed_latent_and_image_agree() -> None:
    latent = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(transform(latent, 1.0, 1), torch.rot90(latent, 1, (2, 3)))
    assert transform(latent, 0.5, 0).shape == (1, 1, 2, 2)


def flat_pictures(start: int) -> Iterator[PictureBatch]:
    step = start
    while True:
        rng = np.random.default_rng(abs(step))
        colours = torch.from_numpy(rng.integers(0, 256, (2, 8, 3, 1, 1)) / 127.5 - 1).float()
        images = colours[0].expand(8, 3, 32, 32).clone()
        images[:, :, 8:24, 8:24] = colours[1]
        keys = tuple(f"{step}.{i}" for i in range(8))
        yield PictureBatch(step, 0, keys, images, ("",) * 8, ({},) * 8)
        step += 1


def test_autoencoder_learns_colours_and_knows_its_statistics(tmp_path: Path) -> None:
    config = AutoencoderTraining(
        steps=60, batch_size=8, learning_rate=2e-3, warmup_steps=5, ema_decay=0.8, crop=32, sides=(32,),
        precision="no", equivariance=0.1, save_every=1000,
    )  # fmt: skip
    shape = AutoencoderConfig(
        channels=16, multipliers=(1, 1, 1, 1), res_blocks=1, mid_attention=False, groups=4, latent_std=(1.0,) * 4
    )
    torch.manual_seed(0)
    model = KLAutoencoder(shape)
    initialise(model)
    objective, batches = autoencoder_losses(config, shape), crops(flat_pictures, config, seed=0)
    steps = train(Reconstruction(model), objective, batches, config, tmp_path / "checkpoints", 0)
    losses = [report.losses["squared"] for report in steps]
    assert np.mean(losses[-20:]) < 0.5 * losses[0]
    images = torch.cat([next(flat_pictures(-1 - i)).images for i in range(4)])
    fitted, r_squared = fit_statistics(model, images)
    assert 0.3 < r_squared <= 1.0
    latent = KLAutoencoder(fitted)
    latent.load_state_dict(model.state_dict())
    mean = latent.encode(images).mean
    assert torch.allclose(mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)


def test_latents_are_cached_for_what_they_were_made_from_only(tmp_path: Path) -> None:
    tensors = torch.randn(3, 4, 2, 2), torch.rand(3, 4, 2, 2), torch.randn(2, 5, 8), torch.tensor([[0], [0], [1]])
    for keys in ((), ("00001", "ein Hügel", "a\nb")):
        cache = LatentCache(*tensors, keys)
        latents.save(tmp_path / "a.safetensors", cache, {"of": "this"})
        loaded = latents.load(tmp_path / "a.safetensors", {"of": "this"})
        assert loaded is not None and torch.equal(loaded.conditions, cache.conditions) and loaded.keys == keys
    assert latents.load(tmp_path / "a.safetensors", {"of": "that"}) is None
    assert latents.load(tmp_path / "b.safetensors", {"of": "this"}) is None


def test_every_picture_of_a_cache_is_used_once_an_epoch_and_named() -> None:
    n, config = 7, DiffusionTraining(steps=1, batch_size=4, learning_rate=1.0, side=16)
    numbers = torch.arange(float(n)).reshape(n, 1, 1, 1)
    cache = LatentCache(numbers, numbers, torch.zeros(1, 1, 1), torch.zeros(n, 1, dtype=torch.long))
    named = replace(cache, keys=tuple("abcdefg"))
    steps = [next(latent_batches(named, config, seed=3)(step)) for step in range(14)]
    epochs = torch.cat([batch.rows[0].flatten() for batch in steps]).reshape(-1, n)
    assert all(sorted(epoch.tolist()) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs), "the order changes"
    assert "".join(steps[0].keys) == "".join("abcdefg"[int(i)] for i in steps[0].rows[0].flatten())
    following = itertools.islice(latent_batches(cache, config, seed=3)(0), 14)
    assert all(torch.equal(a.rows[0], b.rows[0]) for a, b in zip(following, steps, strict=True))
    assert next(latent_batches(cache, config, seed=3)(0)).keys[0].startswith("picture ")


def test_every_use_of_a_kept_picture_chooses_among_its_captions() -> None:
    n, k, config = 6, 4, DiffusionTraining(steps=1, batch_size=4, learning_rate=1.0, side=16)
    numbers, captions = torch.arange(float(n)).reshape(n, 1, 1, 1), torch.arange(n * k).reshape(n, k)
    cache = LatentCache(numbers, numbers, torch.arange(n * k + 1.0)[:, None, None], captions)
    steps = list(itertools.islice(latent_batches(cache, config, seed=3)(0), 60))
    pictures, read = (torch.cat([batch.rows[row].flatten() for batch in steps]).long() for row in (0, 2))
    assert torch.equal(read // k, pictures), "none is given another's caption"
    assert all(len(set(read[pictures == picture].tolist())) == k for picture in range(n))
    again = next(latent_batches(cache, config, seed=3)(41))
    assert torch.equal(again.rows[2], steps[41].rows[2]), "a function of the step"


def test_a_cache_keeps_all_captions_that_were_drawn() -> None:
    def batches() -> Iterator[PictureBatch]:
        images, facts = torch.zeros(2, 3, 8, 8), ({}, {})
        yield PictureBatch(0, 0, ("a", "b"), images, ("one", "two"), facts, others=(("uno", "one"), ("two", "")))
        yield PictureBatch(1, 0, ("c", "d"), images, ("one", "three"), facts, others=(("", "drei"), ("never", "seen")))

    words = list[str]()

    def condition(prompts: Sequence[str]) -> Tensor:
        words.extend(prompts)
        return torch.tensor([len(word) for word in prompts]).float()[:, None, None]

    *_, cache = latents.encode(batches(), 3, KLAutoencoder(AutoencoderConfig(channels=8, groups=4)), condition, False)
    assert isinstance(cache, LatentCache)
    read = [[words[index] for index in row] for row in cache.caption.tolist()]
    assert read == [["one", "uno", "one"], ["two", "two", ""], ["one", "", "drei"]]
    assert words[-1] == "" and cache.conditions[-1].item() == 0 and "never" not in words


def digits_recipe() -> Recipe:
    overrides = ["model.unet.channels=16", "model.unet.multipliers=[1,2]", "model.unet.attention=[false,true]",
                 "model.unet.head_width=16", "sample_prompts=['1','2']"]  # fmt: skip
    recipe = configuration.load(ROOT / "configs" / "ddpm-digits.yaml", Recipe, overrides)
    stage = recipe.unet_training[0].model_copy(
        update={"steps": 40, "pictures": 200, "batch_size": 16, "warmup_steps": 5, "precision": "no", "ema_decay": 0.8}
    )
    return recipe.model_copy(update={"unet_training": (stage,)})


@pytest.mark.slow
def test_from_digits_to_a_bundle_that_draws_them(tmp_path: Path) -> None:
    run = Run(digits_recipe(), tmp_path)
    *_, cache = latents_stage(run, run.recipe.unet_training[0], count=200)
    assert isinstance(cache, LatentCache) and cache.mean.shape == (200, 1, 28, 28) and cache.std.abs().max() == 0
    losses = [report.losses["loss"] for report in unet_stage(run, 0, cache, model_so_far(run))]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    bundle = Bundle.load(str(finish(run)))
    request = GenerationRequest(prompt="3", steps=4, seed=1)
    (picture,) = TextToImage(bundle)(request)
    assert picture.image.size == (28, 28) and picture.image.mode == "L"
    assert json.loads((tmp_path / "latents" / "28.json").read_text())


def coloured_recipe(**stage: object) -> Recipe:
    """Two stages of a tiny model, the first with its text tower; pictures of 16×16."""
    first = {"side": 16, "pictures": 12, "steps": 3, "batch_size": 4, "learning_rate": 1e-2, "precision": "no"}
    settings = {
        "name": "coloured",
        "data": {"shards": "unused/*.tar"},
        "model": configuration.parse_yaml(tiny_training.MODEL, "tiny"),
        "unet_training": [{**first, "train_text": True, **stage}, {**first, "train_text": False}],
        "sample_prompts": ["a red"],
    }
    return configuration.validate(settings, Recipe, "coloured")


def coloured(folder: Path) -> Run:
    """A run on two plain pictures."""
    samples = []
    for name in ("red", "blue"):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), name).save(file, "PNG")
        samples.append({"__key__": name, "png": file.getvalue(), "txt": f"a {name}"})
    write_shards(samples, folder / "shards", 2, "coloured")
    data = DataConfig(shards=str(folder / "shards"))
    return Run(coloured_recipe().model_copy(update={"data": data}), folder)


def test_a_text_tower_that_learns_with_the_unet_is_read_with_from_then_on(tmp_path: Path) -> None:
    run = coloured(tmp_path)
    stage, later = run.recipe.unet_training
    untaught = model_so_far(run)
    *_, cache = latents_stage(run, stage, 12)
    assert isinstance(cache, LatentCache) and cache.conditions.shape == (
        3,
        8,
        1,
    )  # ids: two captions, no caption
    bundle = model_so_far(run)
    for report in unet_stage(run, 0, cache, bundle):
        drawing = averaged(bundle, report)
    states = [model.text.encode(["a red"]).tokens for model in (untaught, model_so_far(run), drawing)]
    assert not torch.allclose(states[0], states[1], atol=1e-3)
    assert torch.equal(states[1], states[2])
    *_, cache = latents_stage(run, later, 12)  # the second stage reads states, those of the taught tower
    assert isinstance(cache, LatentCache) and cache.conditions.shape == (3, 8, 16)
    assert any(torch.equal(condition, states[1][0].half()) for condition in cache.conditions)
    assert [*unet_stage(run, 1, cache, model_so_far(run))]
    assert torch.allclose(Bundle.load(str(finish(run))).text.encode(["a red"]).tokens, states[1], atol=1e-2)  # fp16


def test_a_tower_that_learns_later_is_left_as_it_is_before_and_both_stages_share_latents(tmp_path: Path) -> None:
    run = coloured(tmp_path)
    later, first = run.recipe.unet_training
    run = replace(run, recipe=run.recipe.model_copy(update={"unet_training": (first, later)}))
    untaught = model_so_far(run).text.encode(["a red"]).tokens
    *_, cache = latents_stage(run, first, 12)
    assert isinstance(cache, LatentCache) and cache.conditions.shape == (3, 8, 1), "ids, as the later stage needs them"
    bundle = model_so_far(run)
    before = bundle.unet.conv_out.weight.clone()
    assert [*unet_stage(run, 0, cache, bundle)]
    assert torch.equal(bundle.text.encode(["a red"]).tokens, untaught) and not run.has("text-0")
    assert not torch.equal(bundle.unet.conv_out.weight, before)
    again = list(latents_stage(run, later, 12))
    assert len(again) == 1, "nothing is encoded twice"
    assert [*unet_stage(run, 1, cache, model_so_far(run))] and run.has("text-1")
    assert not torch.allclose(model_so_far(run).text.encode(["a red"]).tokens, untaught, atol=1e-3)


def test_encoding_that_is_stopped_goes_on_behind_its_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "PART", 8)
    monkeypatch.setattr(stages, "ENCODED_AT_ONCE", 4)
    whole, parts = coloured(tmp_path / "whole"), coloured(tmp_path / "parts")
    stage = whole.recipe.unet_training[0]
    *_, expected = latents_stage(whole, stage, 20)
    running = latents_stage(parts, stage, 20)
    assert [next(running) for _ in range(3)] == [4, 8, 12]
    running.close()
    progress = list(latents_stage(parts, stage, 20))
    assert progress[:-1] == [12, 16, 20]
    found = progress[-1]
    assert isinstance(found, LatentCache) and isinstance(expected, LatentCache)
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in latents.TENSORS)
    assert found.keys == expected.keys and Counter(found.keys) == {"red": 10, "blue": 10}
    assert found.caption.shape == (20, stages.CAPTIONS_KEPT)
    assert sorted(path.name for path in (parts.folder / "latents").iterdir()) == ["16.json", "16.safetensors"]


def test_joined_caches_keep_each_picture_with_its_caption() -> None:
    def part(first: int, captions: list[int]) -> LatentCache:
        """Pictures and captions that are numbers; the null caption is −1."""
        n, m = len(captions), max(captions) + 1
        numbers = torch.arange(first, first + n).float().reshape(n, 1, 1, 1)
        conditions = torch.tensor([*(10.0 * first + i for i in range(m)), -1.0]).reshape(m + 1, 1, 1)
        keys = tuple(f"key {first + i}" for i in range(n))
        return LatentCache(numbers, numbers / 2, conditions, torch.tensor(captions)[:, None], keys)

    whole = latents.joined([part(0, [0, 1, 0]), part(3, [0, 0, 2, 1])])
    assert whole.mean.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert whole.conditions[whole.caption].flatten().tolist() == [0, 1, 0, 30, 30, 32, 31]
    assert whole.conditions.flatten().tolist() == [0, 1, 30, 31, 32, -1]
    assert whole.keys == tuple(f"key {i}" for i in range(7))


def test_a_text_tower_learns_from_captions_only() -> None:
    with pytest.raises(SettingError, match="train_text needs captions"):
        coloured_recipe(pictures=None, latents="latents/*.tar")


def test_bundled_digits_are_white_on_black_and_enlarged() -> None:
    images, labels = load(BUNDLED)
    assert images.shape == (1797, 28, 28) and set(labels.tolist()) == set(range(10))
    assert images[:, 0, 0].mean() < 20 and images[:, 10:18, 10:18].mean() > 80


def test_idx_files_are_read_and_torn_ones_refused(tmp_path: Path) -> None:
    pixels = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    header = np.array([2051, 2, 28, 28], dtype=">u4").tobytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(np.array([2049, 2], dtype=">u4").tobytes() + bytes([7, 1]))
    images, labels = load(str(tmp_path))
    assert np.array_equal(images, pixels) and labels.tolist() == [7, 1]
    torn = tmp_path / "torn"
    torn.write_bytes(header + pixels.tobytes()[:-1])
    with pytest.raises(DataError, match="torn"):
        read_idx(torn, 2051)
    with pytest.raises(DataError, match="magic number 2049"):
        read_idx(tmp_path / "train-labels-idx1-ubyte", 2051)
    with pytest.raises(DataError, match="no train-images"):
        load(str(tmp_path / "nowhere"))


DISTILLED = {"emoji-256-lcm": "emoji-256"}  # recipe → that of its `--base`


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem not in DISTILLED],
    ids=lambda path: path.stem,
)
def test_every_recipe_is_valid_and_builds(path: Path) -> None:
    from ldm.models.model_config import build

    recipe = configuration.load(path, Recipe)
    assert recipe.model is not None
    with torch.device("meta"):
        *_, unet = build(recipe.model)
    assert recipe.unet_training and sum(p.numel() for p in unet.parameters()) > 0


@pytest.mark.parametrize(("name", "base"), DISTILLED.items())
def test_recipe_of_a_few_step_model_has_the_data_the_size_and_the_guidance_of_its_base(name: str, base: str) -> None:
    recipe, teacher = (configuration.load(ROOT / "configs" / f"{one}.yaml", Recipe) for one in (name, base))
    stage, sampling = recipe.consistency_training, teacher.model.sampling if teacher.model is not None else None
    assert recipe.name == name and recipe.model is None and stage is not None and sampling is not None
    assert (stage.side, stage.guidance_scale) == (sampling.width, sampling.guidance_scale)
    assert (recipe.data.shards, recipe.data.captions) == (teacher.data.shards, teacher.data.captions)
    assert recipe.sample_prompts
