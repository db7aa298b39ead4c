"""What would stop a run hours later is said before it begins."""

from typing import Literal

from ldm.cli import warn
from ldm.data.shards import find_shards
from ldm.errors import SettingError
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.text import ClipTextConfig, LabelConfig, LabelEncoder
from ldm.request import GenerationRequest, resolve
from ldm.training import source
from ldm.training.consistency import stride
from ldm.training.optimization import micro_batches
from ldm.training.recipe import Recipe
from ldm.training.run import Run
from ldm.training.workers import workers


def check(this: Run, stage: str, reads_latents: bool) -> None:
    """Say now what would stop the run later: data that do not fit, samples that cannot be drawn, odd batches.

    `reads_latents`: cached ones that the recipe names must be there, since this stage is the first to run.
    """
    recipe, model = this.recipe, this.model
    check_parts(this, stage)
    check_data(recipe, model.factor, reads_latents)
    if workers().main:
        warn_of_idle_settings(recipe)
    resolve(GenerationRequest(prompt="any"), model)
    adaptations = (recipe.lora_training, recipe.inversion_training, recipe.consistency_training)
    towers = (recipe.clip_training, recipe.thumbnail_training, recipe.evaluator_training)
    for config in (recipe.autoencoder_training, *towers, *adaptations, *recipe.unet_training):
        if config is not None:
            micro_batches(config, workers().world)
    if recipe.consistency_training is not None:
        stride(model.noise_schedule.timesteps)
    for side in {one.side for one in (*recipe.unet_training, *adaptations) if one is not None}:
        for prompt in recipe.sample_prompts:
            resolve(sample_request(prompt, side), model)
    if isinstance(model.text, LabelConfig):
        LabelEncoder(model.text).encode(recipe.sample_prompts)


def check_parts(this: Run, stage: str) -> None:
    """Say now what a stage lacks: a section that says how it is done, or a network that it does not train itself."""
    recipe, model = this.recipe, this.model
    own: dict[str, object] = {
        "vae": recipe.autoencoder_training,
        "clip": recipe.clip_training,
        "thumbnail": recipe.thumbnail_training,
        "evaluator": recipe.evaluator_training,
        "unet": recipe.unet_training,
    }
    if not (any(own.values()) if stage == "all" else own.get(stage, True)):
        raise SettingError(f"{stage}: this recipe has no section for it; add one, or name a stage that it has")
    config, learning = model.autoencoder, recipe.autoencoder_training
    if isinstance(config, AutoencoderConfig) and learning is not None and learning.crop % config.factor:
        raise SettingError(
            f"autoencoder_training.crop: got {learning.crop}, expected a multiple of {config.factor}, by which this "
            f"autoencoder shrinks; use {-(-learning.crop // config.factor) * config.factor}"
        )
    if learning is not None and learning.from_base:
        check_same_shape(this, "autoencoder", "autoencoder_training.from_base")
    if recipe.clip_training is not None and recipe.clip_training.from_base:
        check_same_shape(this, "text", "clip_training.from_base")
    if this.base is not None:
        return
    if recipe.fine_tune:
        raise SettingError("--base: fine_tune begins with the UNet of another model; name it")
    if not (recipe.unet_training and stage in ("all", "unet")):
        return
    comes = {"autoencoder"} if learning is not None and stage == "all" else set()
    if any(one.train_text for one in recipe.unet_training):
        comes.add("text tower")
    if stage == "all" and (recipe.clip_training is not None or recipe.thumbnail_training is not None):
        comes.add("text tower")
    needs = {"autoencoder": (AutoencoderConfig, this.product("autoencoder")), "text tower": (ClipTextConfig, this.text)}
    for name, (kind, product) in needs.items():
        wanted = isinstance(getattr(model, name.split()[0]), kind)
        if wanted and name not in comes and not product.is_file():
            raise SettingError(
                f"{stage}: there is no {name} in {this.folder}; run the stages before this one, or give a --base "
                "that has one"
            )


def check_same_shape(this: Run, part: Literal["autoencoder", "text"], key: str) -> None:
    """Say now that a network cannot begin as the base's; statistics of latents may differ, since they are fitted."""
    kind = AutoencoderConfig if part == "autoencoder" else ClipTextConfig
    own = getattr(this.model, part)
    if this.base is None:
        raise SettingError(f"--base: {key} begins with a network of another model; name it")
    given = getattr(this.base.config, part)
    if not (isinstance(own, kind) and isinstance(given, kind)):
        raise SettingError(f"{key}: both models need a network of that kind that is trained; leave it out")
    fitted = {"latent_mean", "latent_std", "preview"}
    one, other = own.model_dump(exclude=fitted), given.model_dump(exclude=fitted)
    for name in one:
        if one[name] != other[name]:
            raise SettingError(
                f"{key}: model.{part}.{name} is {one[name]}, that of {this.base.name} {other[name]}; "
                f"use {other[name]}, or from_base: false"
            )


def warn_of_idle_settings(recipe: Recipe) -> None:
    """Say which settings of the data do nothing in stages that read cached latents: those are as they were cached."""
    of_stages = (*recipe.unet_training, recipe.lora_training, recipe.inversion_training, recipe.consistency_training)
    cached = sorted({stage.latents for stage in of_stages if stage is not None and stage.latents is not None})
    data, captions = recipe.data, recipe.data.captions
    said = {
        "crop": data.crop != "centre",
        "mirror": data.mirror > 0,
        "grounds": data.grounds > 0,
        "mix": data.mix is not None,
        "captions.exclude": bool(captions.exclude),
        "captions.dropout": captions.dropout > 0,
        "captions.templates": bool(captions.templates),
    }
    idle = [f"data.{name}" for name in said if said[name]]
    if cached and idle:
        warn(f"{', '.join(idle)}: no effect where cached latents are read ({', '.join(cached)})")


def check_data(recipe: Recipe, factor: int, latents: bool) -> None:
    """Say now what would stop a stage when it reads its pictures, or, where they are due, its latents."""
    square = recipe.data.model_copy(update={"buckets": None})
    if recipe.autoencoder_training is not None:
        source.check(square, recipe.autoencoder_training.batch_size, max(recipe.autoencoder_training.sides))
    clip, evaluator, thumbnail = recipe.clip_training, recipe.evaluator_training, recipe.thumbnail_training
    held = square.model_copy(update={"resident": True})
    if clip is not None and recipe.clip is not None:
        source.check(held if clip.resident else square, clip.batch_size, recipe.clip.image_size)
    if thumbnail is not None:
        source.check(held if thumbnail.resident else square, thumbnail.batch_size, thumbnail.side)
    if evaluator is not None and recipe.evaluator is not None:
        source.check(held if evaluator.resident else square, evaluator.batch_size, recipe.evaluator.clip.image_size)
    for stage in (*recipe.unet_training, recipe.lora_training, recipe.inversion_training, recipe.consistency_training):
        if stage is None:
            continue
        if stage.latents is not None:
            if latents:
                find_shards(stage.latents)
        elif stage.pictures is None:
            source.check(recipe.data, stage.batch_size, stage.side, factor)
        elif recipe.data.buckets is not None:
            raise SettingError("data.buckets: pictures that are encoded once are square; use latents, or no buckets")


def sample_request(prompt: str, side: int, steps: int | None = 20) -> GenerationRequest:
    """What samples on the way are drawn with; without `steps`, in as many as the model says."""
    return GenerationRequest(prompt=prompt, width=side, height=side, steps=steps)
