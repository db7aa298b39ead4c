"""The fields of the Create screen: what they are called, how they hang together, and the settings they stand for."""

from collections.abc import Mapping, Sequence

from ldm.errors import SettingError
from ldm.models.model_config import ModelConfig
from ldm.models.text import ClipTextConfig, escape_special, tokenizer
from ldm.request import RANDOM_SEED
from ldm.ui.axes import QUALITIES

NEW_SEED, KEEP_SEED = "New each time", "Keep"
SHAPES = {"Square": (1, 1), "Portrait": (3, 4), "Landscape": (4, 3)}
MAX_STEPS_SHOWN = 150
NAMES = (
    *("prompt", "negative_prompt", "shape", "quality", "steps", "num_images", "model", "sampler", "schedule"),
    *("guidance_scale", "seed", "seed_mode", "width", "height", "preview"),
)
# Those that are settings of a request under the same name.
SETTINGS = (
    *("prompt", "negative_prompt", "steps", "num_images", "sampler", "schedule", "guidance_scale", "width", "height"),
)


def settings(fields: Mapping[str, object]) -> dict[str, object]:
    """The settings of a request that these fields stand for."""
    made = {name: fields[name] for name in SETTINGS if fields[name] not in (None, "")}
    keeps = fields["seed_mode"] == KEEP_SEED
    if keeps and fields["seed"] is None:
        raise SettingError("seed: it is to be kept, but there is none; write a number, or choose a new one each time")
    return {**made, "seed": fields["seed"] if keeps else RANDOM_SEED}


def size_of_shape(shape: str, config: ModelConfig) -> tuple[int, int]:
    """Width and height of a shape: as many pixels as the model's own size, in multiples that the model can draw."""
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


def quality_of_steps(steps: object) -> str | None:
    """The quality that has so many steps, if one has."""
    return next((quality for quality, count in QUALITIES.items() if count == steps), None)


def defaults(name: str, config: ModelConfig) -> dict[str, object]:
    """Every field as a model wants it, with an empty prompt."""
    sampling = config.sampling
    return {
        "prompt": "",
        "negative_prompt": "",
        "shape": shape_of_size(sampling.width, sampling.height, config),
        "quality": quality_of_steps(sampling.steps),
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


def from_picture(usable: Mapping[str, object], model: str, config: ModelConfig) -> dict[str, object]:
    """Every field as the settings of a picture have it, as the model `config` has it where they are silent."""
    made = {**defaults(model, config), **{key: value for key, value in usable.items() if key in NAMES}}
    made["model"], made["num_images"] = model, 1
    made["shape"] = shape_of_size(made["width"], made["height"], config)
    made["quality"] = quality_of_steps(made["steps"])
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
