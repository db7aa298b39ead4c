"""What is asked for: one frozen record that checks itself, for the command line, the app, the API and stored settings.

A setting that the user leaves out is None until `resolve` takes it from the model. This module imports no network.
"""

import math
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, TypeVar

import pydantic
from pydantic import BeforeValidator

from ldm import prompts
from ldm.cli import nearest, printable
from ldm.config import Config
from ldm.diffusion.names import CONVENTIONS, GRIDS
from ldm.diffusion.samplers import SAMPLERS, resolve_name
from ldm.errors import SettingError

if TYPE_CHECKING:
    from ldm.models.model_config import ModelConfig

SEEDS = 2**32
RANDOM_SEED = -1
MAX_PROMPT = 10_000
MIN_SIDE, MAX_SIDE = 64, 2048
MAX_STEPS = 1000
# So many names are listed in an error message.
MANY = 13
PROMPT_SYNTAXES = ("plain",)
RNGS = ("keyed", "stream", "philox")
# Without a batch size, as many pictures are drawn at once as have this many pixels together.
BATCH_PIXELS = 512 * 512

WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")

Value = TypeVar("Value")


def shown(value: object) -> str:
    """A value as an error message quotes it: on one line, cut, and in characters that can be written."""
    return printable(str(value), 40)


def whole(low: int, high: int, example: int | str) -> Callable[[object], int]:
    """A check that accepts whole numbers from `low` to `high`, also as ASCII digits."""

    def check(value: object) -> int:
        if isinstance(value, str) and WHOLE.fullmatch(value):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON and sliders do not tell 30.0 from 30
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{shown(value)} is not a whole number; use {example}")
        if not low <= value <= high:
            raise ValueError(f"{shown(value)} is not between {low} and {high}; use {example}")
        return value

    return check


def decimal(low: float, high: float, example: float) -> Callable[[object], float]:
    """A check that accepts finite numbers from `low` to `high`, also as ASCII text."""

    def check(value: object) -> float:
        number = float(value) if isinstance(value, str) and DECIMAL.fullmatch(value) else value
        if not isinstance(number, (int, float)) or isinstance(number, bool) or math.isnan(number):
            comma = isinstance(value, str) and DECIMAL.fullmatch(value.replace(",", ".", 1))
            use = value.replace(",", ".", 1) if isinstance(value, str) and comma else f"{example:g}"
            raise ValueError(f"{shown(value)} is not a number; use {use}")
        if not low <= number <= high:
            raise ValueError(f"{shown(value)} is not between {low:g} and {high:g}; use {example:g}")
        return float(number)

    return check


def one_of(what: str, known: Sequence[str]) -> Callable[[object], str]:
    """A check that accepts one of the `known` names."""
    names = ", ".join(known) if len(known) <= MANY else f"{', '.join(known[:MANY])}, … (--help has them all)"

    def check(value: object) -> str:
        if not isinstance(value, str) or value not in known:
            hint = nearest(value[:100], known) if isinstance(value, str) else ""
            raise ValueError(f"no {what} {shown(value)!r}{hint}; use one of {names}")
        return value

    return check


def numbers(value: object, example: str) -> tuple[float, ...]:
    """Finite numbers of a list, or of text with commas between them."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, Sequence):
        raise ValueError(f"{shown(value)} is not a list of numbers; use for example {example}")
    if len(parts) > MAX_STEPS + 1:
        raise ValueError(f"{len(parts)} numbers are too many; use at most {MAX_STEPS} steps")
    check = decimal(0.0, 1e6, 1.0)
    return tuple(check(part.strip() if isinstance(part, str) else part) for part in parts)


def falling(example: str, ends_in_zero: bool) -> Callable[[object], tuple[float, ...]]:
    """A check that accepts numbers from high to low, with 0 as the end of the last step or without it."""

    def check(value: object) -> tuple[float, ...]:
        found = numbers(value, example)
        if any(low >= high for high, low in pairwise(found)):
            raise ValueError(f"the numbers do not fall; use for example {example}")
        if not found:
            raise ValueError(f"no number is in it; use for example {example}")
        if ends_in_zero and (len(found) == 1 or found[-1] != 0.0):
            raise ValueError(f"the last number must be 0, behind at least one more; use for example {example}")
        return found

    return check


def interval(value: object) -> tuple[float, ...]:
    """A check that accepts two noise levels LOW,HIGH."""
    found = numbers(value, "0.2,3")
    if len(found) != 2 or found[0] >= found[1]:
        raise ValueError(f"{shown(value)} is not LOW,HIGH; use for example 0.2,3")
    return found


def prompt_text(value: object) -> str:
    """A check that accepts text of at most 10,000 characters that is valid Unicode, and cleans it."""
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not text; write what the picture shows")
    if len(value) > MAX_PROMPT:
        raise ValueError(f"{len(value)} characters are too many; use at most {MAX_PROMPT}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start + 1} is not valid Unicode; give the text as UTF-8") from None
    return prompts.clean(value)


def optional(check: Callable[[object], Value]) -> Callable[[object], Value | None]:
    """`check` that lets None through: the setting is left to the model."""
    return lambda value: None if value is None else check(value)


Side = Annotated[int | None, BeforeValidator(optional(whole(1, MAX_SIDE, 512)))]
Prompt = Annotated[str, BeforeValidator(prompt_text)]


class GenerationRequest(Config):
    """Pictures to draw from one prompt. Every violation raises SettingError: *setting: what is wrong; what to do*.

    Numbers may be given as text, as a command line has them. Image i is drawn from seed + i, modulo 2^32.
    """

    prompt: Prompt = ""
    negative_prompt: Prompt = ""
    width: Side = None
    height: Side = None
    steps: Annotated[int | None, BeforeValidator(optional(whole(1, 1000, 30)))] = None
    sampler: Annotated[str | None, BeforeValidator(optional(one_of("sampler", list(SAMPLERS))))] = None
    schedule: Annotated[str | None, BeforeValidator(optional(one_of("schedule", GRIDS)))] = None
    convention: Annotated[str | None, BeforeValidator(optional(one_of("convention", CONVENTIONS)))] = None
    sigmas: Annotated[tuple[float, ...] | None, BeforeValidator(optional(falling("14.6,3,0.5,0", True)))] = None
    timesteps: Annotated[tuple[float, ...] | None, BeforeValidator(optional(falling("999,666,333", False)))] = None
    guidance_scale: Annotated[float | None, BeforeValidator(optional(decimal(0.0, 30.0, 7.5)))] = None
    guidance_rescale: Annotated[float, BeforeValidator(decimal(0.0, 1.0, 0.7))] = 0.0
    guidance_interval: Annotated[tuple[float, float] | None, BeforeValidator(optional(interval))] = None
    perp_neg: Annotated[float, BeforeValidator(decimal(0.0, 30.0, 1.0))] = 0.0
    reuse: Annotated[int, BeforeValidator(whole(1, 20, 1))] = 1
    merge_tokens: Annotated[float, BeforeValidator(decimal(0.0, 0.75, 0.5))] = 0.0
    prompt_syntax: Annotated[str, BeforeValidator(one_of("prompt syntax", PROMPT_SYNTAXES))] = "plain"
    rng: Annotated[str, BeforeValidator(one_of("rng", RNGS))] = "keyed"
    seed: Annotated[int, BeforeValidator(whole(RANDOM_SEED, SEEDS - 1, "-1 for a random one"))] = RANDOM_SEED
    num_images: Annotated[int, BeforeValidator(whole(1, 10_000, 1))] = 1
    batch_size: Annotated[int | None, BeforeValidator(optional(whole(1, 1000, 1)))] = None
    batch_exact: bool = False
    allow_empty_prompt: bool = False

    def __init__(self, **settings: object) -> None:
        try:
            super().__init__(**_ours(settings))
        except pydantic.ValidationError as error:
            raise SettingError(_first_violation(error, list(type(self).model_fields))) from None
        if self.sigmas is not None and self.timesteps is not None:
            raise SettingError("sigmas: given together with timesteps; use one of the two")
        if not self.prompt.strip() and not self.allow_empty_prompt:
            only = " and only a negative prompt, what to avoid, is given" if self.negative_prompt.strip() else ""
            raise SettingError(
                f"prompt: the prompt is empty{only}; write what the picture shows, "
                "or allow an empty prompt (--allow-empty-prompt)"
            )

    @property
    def seeds(self) -> list[int]:
        """The seed of every image."""
        return [(self.seed + index) % SEEDS for index in range(self.num_images)]

    @property
    def passes(self) -> int:
        """Texts that the network reads of each image in one call: the prompt; with guidance what is held against it."""
        return 1 if self.guidance_scale == 1 else 3 if self.perp_neg else 2

    @property
    def listed_steps(self) -> int | None:
        """The number of steps of an explicit list of noise levels or timesteps."""
        if self.sigmas is not None:
            return len(self.sigmas) - 1
        return None if self.timesteps is None else len(self.timesteps)

    def batches(self) -> Iterator["GenerationRequest"]:
        """Requests of at most `batch_size` images each that together draw this one. Needs a resolved request."""
        assert self.batch_size is not None, "resolve the request first"
        for first in range(0, self.num_images, self.batch_size):
            count = min(self.batch_size, self.num_images - first)
            seed = (self.seed + first) % SEEDS
            yield self.model_copy(update={"seed": seed, "num_images": count, "batch_size": count})

    def settings(self) -> dict[str, object]:
        """The settings that are known, as JSON values: what is stored in a picture."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> tuple["GenerationRequest", dict[str, object]]:
        """The request of stored settings, through the same checks, and the entries that are no setting."""
        known = {key: value for key, value in settings.items() if key in cls.model_fields}
        return cls(**known), {key: value for key, value in settings.items() if key not in known}


def _ours(settings: dict[str, object]) -> dict[str, object]:
    """`settings` with our name for a sampler that another program names otherwise, and the grid that its name says."""
    name = settings.get("sampler")
    if not isinstance(name, str) or name in SAMPLERS:
        return settings
    sampler, grid = resolve_name(name)
    says = {} if grid is None or settings.get("schedule") is not None else {"schedule": grid}
    return {**settings, "sampler": sampler, **says}


def _first_violation(error: pydantic.ValidationError, fields: Sequence[str]) -> str:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{shown(field)}: no such setting{nearest(field[:100], fields)}; remove or rename it"
    if first["type"] == "value_error":
        return f"{field}: {first['ctx']['error']}"
    return f"{field}: {shown(first['input'])}: {first['msg']}; correct the value"


def resolve_seed(seed: int) -> int:
    """`seed` itself, or a random one for −1."""
    return secrets.randbelow(SEEDS) if seed == RANDOM_SEED else seed


def resolve(request: GenerationRequest, model_config: "ModelConfig") -> GenerationRequest:
    """`request` with everything that was left out taken from the model; the seed stays as it is.

    Raises SettingError for a size or a number of steps that this model cannot draw.
    """
    given = {**model_config.sampling.model_dump(), **request.model_dump(exclude_none=True)}
    if request.listed_steps is not None:
        given = {**given, "steps": _listed(request, model_config), "schedule": None}
    resolved = GenerationRequest(**given)
    assert resolved.width is not None and resolved.height is not None and resolved.steps is not None
    if model_config.unet.in_channels != model_config.autoencoder.latent_channels:
        raise SettingError(
            f"model: its UNet reads {model_config.unet.in_channels} channels, the noise with a picture and a mask, for "
            "inpainting; text alone cannot draw with it, use a model that is not for inpainting"
        )
    _check_sides(resolved.width, resolved.height, model_config)
    timesteps = model_config.noise_schedule.timesteps
    if resolved.steps > timesteps:
        raise SettingError(f"steps: {resolved.steps} is more than the model's {timesteps} timesteps; use {timesteps}")
    if resolved.sampler is not None and SAMPLERS[resolved.sampler].calls is None:
        # Images drawn at once would share the length of their steps.
        return resolved.model_copy(update={"batch_size": 1})
    if resolved.batch_size is not None:
        return resolved
    return resolved.model_copy(update={"batch_size": max(1, BATCH_PIXELS // (resolved.width * resolved.height))})


def _listed(request: GenerationRequest, model_config: "ModelConfig") -> int:
    """The number of steps of an explicit list that nothing else contradicts."""
    field, last = "timesteps" if request.sigmas is None else "sigmas", model_config.noise_schedule.timesteps - 1
    if request.schedule is not None:
        raise SettingError(f"{field}: given together with schedule {request.schedule}; use one of the two")
    if request.steps not in (None, request.listed_steps):
        raise SettingError(f"{field}: {request.listed_steps} steps, but steps is {request.steps}; leave steps out")
    if request.timesteps is not None and request.timesteps[0] > last:
        raise SettingError(f"timesteps: {request.timesteps[0]:g} is above the model's last, {last}; start there")
    assert request.listed_steps is not None
    return request.listed_steps


def _check_sides(width: int, height: int, model_config: "ModelConfig") -> None:
    factor, sampling = model_config.factor, model_config.sampling
    low = factor if min(sampling.width, sampling.height) < MIN_SIDE else -(-MIN_SIDE // factor) * factor
    high = MAX_SIDE // factor * factor
    for name, side in (("width", width), ("height", height)):
        if not low <= side <= high:
            use = low if side < low else high
            raise SettingError(f"{width}x{height}: {name} must be between {low} and {high}; use {use}")
        if side % factor:
            below = side // factor * factor
            raise SettingError(
                f"{width}x{height}: {name} must be a multiple of {factor}; nearest: {below} or {below + factor}"
            )
