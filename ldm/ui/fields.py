"""The fields of the Create screen: what they are called, how they hang together, and the settings they stand for."""

import math
from collections.abc import Mapping, Sequence

from ldm.errors import SettingError
from ldm.models.model_config import ModelConfig
from ldm.models.text import ClipTextConfig, escape_special, tokenizer
from ldm.request import RANDOM_SEED, shown
from ldm.ui.models import Models

NEW_SEED, KEEP_SEED = "New each time", "Keep"
SHAPES = {"Square": (1, 1), "Portrait": (3, 4), "Landscape": (4, 3)}
QUALITIES = ("Fast", "Balanced", "Best")
STEPS_SHOWN = 150
NAMES = (
    *("prompt", "negative_prompt", "shape", "quality", "steps", "num_images", "model", "sampler", "schedule"),
    *("guidance_scale", "seed", "seed_mode", "width", "height", "preview"),
)
# What a quality may change.
PACE = ("steps", "model", "sampler", "schedule", "guidance_scale")
# Those that are settings of a request under the same name.
SETTINGS = (
    *("prompt", "negative_prompt", "steps", "num_images", "sampler", "schedule", "guidance_scale", "width", "height"),
)


def settings(fields: Mapping[str, object]) -> dict[str, object]:
    """The settings of a request that these fields stand for. Raises SettingError where one is missing."""
    if not str(fields["prompt"] or "").strip():
        only = ", and only what to avoid is written" if str(fields["negative_prompt"] or "").strip() else ""
        raise SettingError(f"prompt: the prompt is empty{only}; write what you want to see")
    made = {name: fields[name] for name in SETTINGS if fields[name] not in (None, "")}
    keeps = fields["seed_mode"] == KEEP_SEED
    if keeps and fields["seed"] is None:
        raise SettingError("seed: it is to be kept, but there is none; write a number, or choose a new one each time")
    return {**made, "seed": fields["seed"] if keeps else RANDOM_SEED}


def size_of_shape(shape: str, config: ModelConfig) -> tuple[int, int]:
    """Width and height of a shape: as many pixels as the model's own size, in multiples that the model can draw."""
    if shape not in SHAPES:
        raise SettingError(f"shape: no shape {shown(shape)!r}; use {', '.join(SHAPES)}")
    across, down = SHAPES[shape]
    pixels = config.sampling.width * config.sampling.height

    def side(share: float) -> int:
        return max(1, round((pixels * share) ** 0.5 / config.factor)) * config.factor

    if across == down:
        return config.sampling.width, config.sampling.height
    return side(across / down), side(down / across)


def shape_of_size(width: object, height: object, config: ModelConfig) -> str | None:
    """The shape that has this size, if one has."""
    return next((shape for shape in SHAPES if size_of_shape(shape, config) == (width, height)), None)


def steps_of_quality(quality: str, config: ModelConfig) -> int:
    """Balanced is the number of steps that the model is made for with its own sampler, Fast half, Best twice as many.

    Raises SettingError for another name.
    """
    if quality not in QUALITIES:
        raise SettingError(f"quality: no quality {shown(quality)!r}; use {', '.join(QUALITIES)}")
    own = config.sampling.steps
    steps = {"Fast": -(-own // 2), "Balanced": own, "Best": 2 * own}[quality]
    return min(steps, config.noise_schedule.timesteps)


def of_quality(quality: str, name: str, models: Models) -> dict[str, object]:
    """The fields that a quality moves: the steps, or between a model and its few-step one all of `PACE`.

    Where a model has a few-step one beside it, that one is Fast. Raises SettingError for another name.
    """
    few = models.few_steps
    base = next((whole for whole, distilled in few.items() if distilled == name), name)
    wanted = few[base] if quality == "Fast" and base in few else base
    moved = defaults(wanted, models)
    if wanted == base:
        moved["steps"] = steps_of_quality(quality, models.config(base))
    return {field: moved[field] for field in (PACE if wanted != name else PACE[:1])}


def quality_of_steps(steps: object, name: str, models: Models) -> str | None:
    """The quality that has so many steps with this model, if one has; Balanced before the others."""
    config = models.config(name)
    if name in models.few_steps.values():
        return "Fast" if steps == config.sampling.steps else None
    others = [quality for quality in QUALITIES if quality != "Fast" or name not in models.few_steps]
    order = sorted(others, key="Balanced".__ne__)
    return next((quality for quality in order if steps_of_quality(quality, config) == steps), None)


def whole(value: object, otherwise: int) -> int:
    """The number of a slider, which whoever asks may replace by anything."""
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else otherwise


def defaults(name: str, models: Models) -> dict[str, object]:
    """Every field as a model wants it, with an empty prompt."""
    config = models.config(name)
    sampling = config.sampling
    return {
        "prompt": "",
        "negative_prompt": "",
        "shape": shape_of_size(sampling.width, sampling.height, config),
        "quality": quality_of_steps(sampling.steps, name, models),
        "steps": sampling.steps,
        "num_images": 1,
        "model": name,
        "sampler": sampling.sampler,
        "schedule": sampling.schedule,
        "guidance_scale": sampling.guidance_scale,
        "seed": None,
        "seed_mode": NEW_SEED,
        "width": sampling.width,
        "height": sampling.height,
        "preview": True,
    }


def from_picture(usable: Mapping[str, object], model: str, models: Models) -> dict[str, object]:
    """Every field as the settings of a picture have it, as the model has it where they are silent."""
    made = {**defaults(model, models), **{key: value for key, value in usable.items() if key in NAMES}}
    made["model"], made["num_images"] = model, 1
    made["shape"] = shape_of_size(made["width"], made["height"], models.config(model))
    made["quality"] = quality_of_steps(made["steps"], model, models)
    made["seed_mode"] = KEEP_SEED if made["seed"] is not None else NEW_SEED
    return made


def tokens(prompt: str, config: ModelConfig) -> tuple[int, int, str]:
    """How many tokens a prompt has, how many the model reads, and the words it will not read.

    A model of labels reads one label whole, which counts as one token.
    """
    if not isinstance(config.text, ClipTextConfig):
        return int(bool(prompt.strip())), 1, ""
    room = config.text.context_length - 2  # start and end take two
    coder = tokenizer(config.text.vocabulary, config.text.context_length)
    ids: Sequence[int] = coder.encode(escape_special(prompt[:20_000]))
    return len(ids), room, str(coder.decode(ids[room:])).strip() if len(ids) > room else ""
