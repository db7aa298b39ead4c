"""A picture is brought to the size of its batch, and mirrored at times where its name allows it."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from PIL import Image
from pydantic import Field, PositiveInt

from ldm.config import Config
from ldm.data.buckets import Size
from ldm.data.order import Chance

# A mirror image of what these captions say would be another thing.
HANDED = (
    *("left", "right", "east", "west", "clockwise", "anticlockwise", "counterclockwise"),
    *("letter", "letters", "word", "words", "text", "writing", "written", "sign", "symbol", "logo", "label", "button"),
    *("number", "numbers", "digit", "digits", "keycap", "numeral", "alphabet", "character", "characters", "keyboard"),
    *("arrow", "arrows", "clock", "watch", "o'clock", "flag", "flags", "map", "globe", "note", "notes"),
    *("symbols", "mark", "calendar", "chart", "newspaper", "money", "banknote", "dollar", "euro", "pound", "yen"),
    *("hundred", "points", "musical", "stopwatch", "timer", "ticket", "mahjong", "cards", "facing"),
)


class PictureConfig(Config):
    """What happens to a picture on its way into a batch."""

    # Side of a square picture in pixels; with buckets, the area is that of this square.
    side: PositiveInt
    crop: Literal["centre", "random"] = "centre"
    # Probability of a mirror image, for pictures whose captions, and what else names them, have none of the words in
    # `handed`.
    mirror: float = Field(default=0.0, ge=0, le=1)
    handed: tuple[str, ...] = HANDED
    # Probability that a picture on white gets another ground, which its caption then names.
    grounds: float = Field(default=0.0, ge=0, le=1)


def concept(captions: tuple[str, ...], facts: Mapping[str, Any]) -> tuple[str, ...]:
    """All that says what a picture shows: its captions, and the name and group that its facts give it."""
    return (*captions, *(str(facts[name]) for name in ("cldr", "group") if name in facts))


@lru_cache(2**16)
def may_be_mirrored(captions: tuple[str, ...], handed: tuple[str, ...]) -> bool:
    """Whether the mirror image is still what the captions say: no word of them tells left from right."""
    words = {word for caption in captions for word in re.findall(r"[\w']+", caption.lower())}
    # A letter or digit alone is what the picture shows ("b button"); the articles are not.
    alone = {word for word in words if len(word) == 1} - {"a", "s", "t"}
    return not (words & set(handed) or alone)


def cropped(image: Image.Image, config: PictureConfig, size: Size, chance: Chance) -> Image.Image:
    """The part of the picture that this step shows, at `size`."""
    if config.crop == "centre":
        return fit(image, size)
    return fit(image, size, chance("crop x"), chance("crop y"))


def is_mirrored(captions: tuple[str, ...], config: PictureConfig, chance: Chance) -> bool:
    """Whether this step shows the mirror image."""
    return bool(config.mirror) and chance("mirror") < config.mirror and may_be_mirrored(captions, config.handed)


def fit(image: Image.Image, size: Size, x: float = 0.5, y: float = 0.5) -> Image.Image:
    """As much of the picture as `size` can show without stretching, (x, y) in [0, 1] from which part of it."""
    width, height = size
    if image.size == size:
        return image
    scale = min(image.width / width, image.height / height)  # of picture pixels per pixel of the result
    left, top = x * (image.width - scale * width), y * (image.height - scale * height)
    box = (left, top, min(left + scale * width, image.width), min(top + scale * height, image.height))
    return image.resize(size, Image.Resampling.LANCZOS, box=box)
