"""Two axes of settings become a table of orders, and its pictures a labelled sheet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ldm.cli import nearest
from ldm.diffusion.grids import GRIDS
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import SettingError
from ldm.images import MAX_SHEET_PIXELS
from ldm.request import RANDOM_SEED, resolve_seed, shown
from ldm.ui.fields import QUALITIES

MAX_CELLS = 64
NOTHING = "nothing"
LABEL_HEIGHT = 28

Settings = dict[str, object]


@dataclass(frozen=True)
class Axis:
    """One direction of the table: its name, the labels of its values, and what each changes in the settings."""

    name: str
    labels: list[str]
    changes: list[Callable[[Settings], Settings]]


def _setting(key: str) -> Callable[[list[str]], list[Callable[[Settings], Settings]]]:
    """Values that replace one setting; the request checks them."""
    # mypy infers no lambda with a default
    return lambda values: [lambda settings, value=value: {**settings, key: value} for value in values]  # type: ignore[misc]


def _named(key: str, known: Sequence[str], where: str) -> Callable[[list[str]], list[Callable[[Settings], Settings]]]:
    """Values that replace one setting and are among the names that are known, in any case."""
    names = {name.casefold(): name for name in known}

    def changes(values: list[str]) -> list[Callable[[Settings], Settings]]:
        for value in values:
            if value.casefold() not in names:
                raise SettingError(f"{key}: no {key} {shown(value)!r}{nearest(value[:100], known)}; {where}")
        return _setting(key)([names[value.casefold()] for value in values])

    return changes


def _word(values: list[str]) -> list[Callable[[Settings], Settings]]:
    """The first value is a part of the prompt; in each cell it is replaced by that cell's value."""

    def replace(settings: Settings, value: str) -> Settings:
        prompt = str(settings["prompt"])
        if values[0] not in prompt:
            raise SettingError(f"prompt word: {values[0]!r} is not in the prompt; begin with a word of the prompt")
        return {**settings, "prompt": prompt.replace(values[0], value)}

    # mypy infers no lambda with a default
    return [lambda settings, value=value: replace(settings, value) for value in values]  # type: ignore[misc]


AXES: dict[str, Callable[[list[str]], list[Callable[[Settings], Settings]]]] = {
    "Seed": _setting("seed"),
    "Steps": _setting("steps"),
    "Guidance": _setting("guidance_scale"),
    "Sampler": _named("sampler", list(SAMPLERS), "the list is on the Create screen under Advanced"),
    "Schedule": _named("schedule", list(GRIDS), "the list is on the Create screen under Advanced"),
    "Quality": _named("quality", QUALITIES, f"use {', '.join(QUALITIES)}"),
    "Prompt word": _word,
    "Model": _setting("model"),
}
EXAMPLES = {
    "Seed": "1, 2, 3",
    "Steps": "5, 10, 20",
    "Guidance": "1, 4, 8",
    "Sampler": "ddim, euler_ancestral",
    "Schedule": "trailing, karras",
    "Quality": "Fast, Balanced, Best",
    "Prompt word": "circle, square, star",
    "Model": "emoji-256, shapes-256",
}


def axis(name: str, values: str) -> Axis:
    """The axis of that name through comma-separated `values`. Raises SettingError for values it does not know."""
    if name == NOTHING:
        return Axis(name, [""], [lambda settings: settings])
    if name not in AXES:
        raise SettingError(f"axis: no axis {shown(name)!r}{nearest(name[:100], list(AXES))}; use {', '.join(AXES)}")
    labels = [value.strip() for value in values.split(",") if value.strip()]
    if not labels:
        raise SettingError(f"{name.lower()}: no values; write for example {EXAMPLES[name]}")
    if len(set(labels)) < len(labels):
        raise SettingError(f"{name.lower()}: a value is given twice; remove one")
    return Axis(name, labels, AXES[name](labels))


def table(x: Axis, y: Axis, settings: Mapping[str, object]) -> list[Settings]:
    """The settings of every cell, row by row. A random seed is drawn once, so that cells differ by the axes alone.

    A quality stays under its name: how many steps it is, the model of the cell says.
    """
    if x.name == y.name != NOTHING or {x.name, y.name} == {"Steps", "Quality"}:
        also = "" if x.name == y.name else " (a quality is a number of steps)"
        raise SettingError(f"{x.name.lower()}: it is on both axes{also}; choose another for Y")
    if (count := len(x.labels) * len(y.labels)) > MAX_CELLS:
        raise SettingError(f"compare: {count} pictures are too many; use at most {MAX_CELLS}")
    base = dict(settings)
    if base.get("seed") == RANDOM_SEED:
        base["seed"] = resolve_seed(RANDOM_SEED)
    return [across(down(base)) for down in y.changes for across in x.changes]


def sheets(x: Axis, y: Axis, pictures: Sequence[Image.Image | None]) -> list[Image.Image]:
    """The finished pictures of a table with labels, as one sheet, or as several where one would be too large."""
    sizes = [picture.size for picture in pictures if picture is not None]
    width, height = (max(side) for side in zip(*sizes, strict=True))
    columns, left = len(x.labels), 120 if y.name != NOTHING else 0
    row_pixels = (left + columns * width) * (height + LABEL_HEIGHT)
    rows_of_a_sheet = max(1, MAX_SHEET_PIXELS // row_pixels)
    made = []
    for first in range(0, len(y.labels), rows_of_a_sheet):
        labels = y.labels[first : first + rows_of_a_sheet]
        sheet = Image.new("RGB", (left + columns * width, LABEL_HEIGHT + len(labels) * height), "white")
        draw = ImageDraw.Draw(sheet)
        font = ImageFont.load_default(size=14)
        for column, label in enumerate(x.labels):
            draw.text((left + column * width + 6, 6), _short(label), fill="black", font=font)
        for row, label in enumerate(labels):
            draw.text((6, LABEL_HEIGHT + row * height + 6), _short(label, 14), fill="black", font=font)
            for column in range(columns):
                picture = pictures[(first + row) * columns + column]
                if picture is not None:
                    sheet.paste(picture, (left + column * width, LABEL_HEIGHT + row * height))
        made.append(sheet)
    return made


def _short(text: str, limit: int = 30) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
