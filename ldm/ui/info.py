"""What a picture says of how it was made, read as untrusted text: what can be used, what is not, what would change."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ldm import images
from ldm.errors import DataError, SettingError
from ldm.request import GenerationRequest, shown

MAX_TEXT = 100_000
# Settings that a picture may bring to the page; everything else in it is only shown.
FIELDS = (
    *("prompt", "negative_prompt", "width", "height", "steps", "sampler", "schedule", "guidance_scale", "seed"),
    "allow_empty_prompt",
)


@dataclass(frozen=True)
class Info:
    """What one picture says: its raw text, the settings that are valid, and for each other entry why it is ignored."""

    text: str
    usable: dict[str, object] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    model: str = ""  # the name here of the model that drew it, where it is on offer


def read_text(path: Path) -> str:
    """The text that `save_png` stored, or nothing. Raises DataError for a file that is no PNG we can read."""
    try:
        text = images.read_text(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise DataError("picture: not a PNG that can be read; give a PNG file of this program") from None
    if len(text) > MAX_TEXT:
        raise DataError(f"picture: {len(text)} characters of settings are too many; give a picture of this program")
    return text


def settings_of(text: str) -> dict[str, object]:
    """The JSON object in a picture's text, or nothing where there is none."""
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def examine(text: str, hashes: Mapping[str, str] | None = None) -> Info:
    """Sort the entries of a picture's text; a model counts only by a digest that is among `hashes` (digest → name)."""
    settings = settings_of(text)
    usable: dict[str, object] = {}
    ignored = {}
    for key, value in settings.items():
        if key in ("model", "model_sha256"):
            continue
        if key in GenerationRequest.model_fields and value == GenerationRequest.model_fields[key].default:
            continue
        if key not in FIELDS:
            ignored[key] = "not a setting of this page"
            continue
        try:
            request = GenerationRequest(**{"prompt": "x", "allow_empty_prompt": True, key: value})
            usable[key] = getattr(request, key)
        except SettingError as error:
            ignored[key] = str(error)
    model = (hashes or {}).get(str(settings.get("model_sha256")), "")
    if not model and "model" in settings:
        ignored["model"] = f"{shown(settings['model'])} is not on offer here; the chosen model stays"
    return Info(text, usable, ignored, model)


def changes(info: Info, now: Mapping[str, object]) -> list[tuple[str, object, object]]:
    """The settings that using `info` would change: name, value now, value then."""
    then = {**info.usable, **({"model": info.model} if info.model else {})}
    return [(key, now.get(key), value) for key, value in then.items() if now.get(key) != value and key in now]


def rows(items: Iterable[tuple[str, object]]) -> list[tuple[str, str]]:
    """Settings as text for a table: words without underscores, long values cut."""
    return [
        (key.replace("_", " "), str(value) if len(str(value)) <= 300 else f"{str(value)[:299]}…")
        for key, value in items
    ]
