"""Where drawings of emoji lie in clones of public collections, and what Unicode calls each of them.

Beside one another in one folder: fluentui-emoji-unicode (Microsoft's Fluent, files renamed by code point), noto-emoji,
twemoji-assets, emojitwo, fxemoji; and for the words cldr-json. Groups are those of emojibase's data, which
twemoji-assets brings along.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.emoji.names import TONES
from ldm.errors import DataError


@dataclass(frozen=True)
class Style:
    """One collection of drawings: files by a pattern below `folder`, and the words for how they look.

    `margin` is white around pictures that are drawn to their edge, in pixels of 512.
    """

    source: str
    word: str
    licence: str
    folder: str
    pattern: str
    label: str
    icon: str
    margin: int = 0
    shaded: bool = False  # of many colours, which lossless files are too large for
    tones: int = 2  # skin tones that are taken of each person or hand


FLUENT = "fluentui-emoji-unicode"
STYLES = (
    Style("fluent_3d", "3D", "MIT", FLUENT, "assets/*_3d.png", "a Fluent 3D", "a 3D icon", shaded=True),
    Style("fluent_flat", "flat", "MIT", FLUENT, "assets/*_flat.svg", "a Fluent flat", "a flat icon"),
    Style("fluent_bw", "black and white", "MIT", FLUENT, "assets/*_high-contrast.svg", "a Fluent high contrast",
          "a black and white icon", tones=0),
    Style("fluent_color", "gradient", "MIT", FLUENT, "assets/*_color.svg", "a Fluent color",
          "an icon with smooth gradients", shaded=True),
    Style("noto", "cartoon", "Apache-2.0", "noto-emoji", "png/512/*.png", "a Noto", "a cartoon icon", 16),
    Style("twemoji", "simple", "CC-BY-4.0", "twemoji-assets", "assets/svg/*.svg", "a Twemoji",
          "a simple vector icon", 32),
    Style("emojitwo", "clip art", "CC-BY-4.0", "emojitwo", "svg/*.svg", "an EmojiTwo",
          "a clip art picture", 32, tones=1),
    Style("fxemoji", "retro", "CC-BY-4.0", "fxemoji", "svgs/FirefoxEmoji/*.svg", "an FxEmoji",
          "a retro icon", 32, tones=0),
)  # fmt: skip

GROUPS = (
    *("smileys & emotion", "people & body", "component", "animals & nature", "food & drink", "travel & places"),
    *("activities", "objects", "symbols", "flags"),
)
ANNOTATIONS = (
    ("cldr-annotations-full/annotations/en/annotations.json", "annotations"),
    ("cldr-annotations-derived-full/annotationsDerived/en/annotations.json", "annotationsDerived"),
)
RUDE = frozenset(
    {"rude", "sexy", "butt", "hell", "damn", "crap", "suck", "stupid", "drunk", "wtf", "sex", "horny", "hot"}
)


@dataclass(frozen=True)
class Concept:
    """What Unicode says of an emoji without its skin tone: code points, short name, group and keywords."""

    codes: str
    name: str
    group: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """One emoji in one style: its file, what it is of, and the skin tone where it has one."""

    style: Style
    path: Path
    codes: str
    concept: Concept
    tone: str | None

    @property
    def key(self) -> str:
        """Its name within a data set."""
        return f"{self.style.source}_{self.codes}"

    @property
    def pair(self) -> tuple[str, str]:
        """Style and concept, whatever the skin tone: what is held out together."""
        return self.style.source, self.concept.codes


def code_points(path: Path) -> str:
    """The code points in a file's name, as `1f481-1f3fb-200d-2642`; what only asks for colour (fe0f) is left out."""
    stem = re.sub(
        r"^(emoji_u|u)(?=[0-9a-fA-F])", "", path.stem.split("_")[0] if path.stem.endswith(ENDS) else path.stem
    )
    codes: list[str] = []
    for part in re.split(r"[-_]", stem.lower()):
        if not re.fullmatch(r"[0-9a-f]{2,6}", part) or (path.stem.startswith("u") and codes):
            break  # FxEmojis have words behind the code point
        codes.append(part.zfill(4))
    return "-".join(code for code in codes if code != "fe0f")


ENDS = ("_3d", "_flat", "_high-contrast", "_color")


def split_tone(codes: str) -> tuple[str, set[str]]:
    """The emoji without skin tones, and the tones."""
    parts = codes.split("-")
    return "-".join(code for code in parts if code not in TONES), {TONES[code] for code in parts if code in TONES}


def concepts(root: Path) -> dict[str, Concept]:
    """All that CLDR names, by code points. Raises DataError where cldr-json or emojibase's data is not there."""
    groups = _groups(root)
    found: dict[str, Concept] = {}
    for place, kind in ANNOTATIONS:
        values = _json(root / "cldr-json" / "cldr-json" / place)[kind]["annotations"]
        for text, words in values.items():
            codes = "-".join(f"{ord(character):04x}" for character in text if character != "\ufe0f")
            if "tts" not in words or codes not in groups:
                continue
            name = words["tts"][0]
            known = set(re.findall(r"\w+", name.lower()))
            keywords = sorted(
                {word for word in words.get("default", ()) if not known & set(word.lower().split())} - RUDE
            )
            found[codes] = Concept(codes, name, GROUPS[groups[codes]], tuple(keywords))
    return found


def _groups(root: Path) -> dict[str, int]:
    """The group of every emoji by code points."""
    places = sorted((root / "twemoji-assets").rglob("emojibase.data.json"))
    rows = _json(places[0] if places else root / "twemoji-assets" / "emojibase.data.json")
    with_skins = [(row["group"], one) for row in rows if "group" in row for one in (row, *row.get("skins", ()))]
    return {re.sub("-fe0f", "", one["hexcode"].lower()): group for group, one in with_skins}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; clone that repository beside the others") from None
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error}); clone that repository again") from None
