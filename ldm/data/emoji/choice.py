"""Which drawings become samples: those that words can ask for, each once, and none of the pairs that are held out."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import reduce
from numpy.typing import NDArray

from ldm.data.emoji.sources import STYLES, Concept, Drawing, Style, code_points, concepts, split_tone
from ldm.data.order import Chance
from ldm.data.records import Reject
from ldm.errors import DataError

MAIN = ("fluent_3d", "fluent_flat", "fluent_bw", "noto", "twemoji")
"""The styles that pairs are held out in."""
HELD_OUT = {
    "smileys & emotion": 2, "people & body": 2, "animals & nature": 4, "food & drink": 4, "travel & places": 3,
    "activities": 2, "objects": 3,
}  # fmt: skip
"""How many concepts of each group are held out in each main style."""

SAME, ALIKE = 0.7, 12.0
"""Mean absolute difference of two pictures of 64×64, of 255: below the first they are one, below the second alike."""
LEAST_INK = 0.004  # share of a picture that is not white; less is an empty file
Thumbnail = NDArray[np.uint8]  # 64 64 3

# What no picture shows, or only as writing.
NOT_DRAWN = re.compile(
    r"^(flag: |keycap: |family: .*(man|boy|girl)|Japanese “|input |(BACK|END|ON!|SOON|TOP) arrow|middle finger$|ZZZ$"
    r"|copyright$|registered$|trade mark$|circled M$|(light|medium|medium-light|medium-dark|dark) skin tone$"
    r"|(red|curly|white) hair$|bald$|(black|white) (small|medium|medium-small) square$|small (orange|blue) diamond$)"
    r"|^[A-Z!0-9]+ button"
)
MISDRAWN = {
    "fxemoji": re.compile(r"^laptop$|^water pistol$|\bcat\b"),  # a monitor, a revolver, foxes
    "emojitwo": re.compile(r"^water pistol$"),
    # Nothing but a colour, in a picture without any.
    "fluent_bw": re.compile(r"\b(red|blond) hair$|^(\w+ )?(red|orange|yellow|green|blue|purple|brown|pink|grey) "
                            r"(heart|circle|square|book|(large )?diamond)$"),
}  # fmt: skip


def drawings(root: Path) -> list[Drawing | Reject]:
    """Every file of every collection that is there, in order of style and code points, as a drawing or a reject."""
    known = concepts(root)
    there = [style for style in STYLES if (root / style.folder).is_dir()]
    if not there:
        folders = ", ".join(dict.fromkeys(style.folder for style in STYLES))
        raise DataError(f"{root}: none of the collections is there, expected clones named {folders}; clone them there")
    return [one for style in there for one in of_style(root / style.folder, style, known)]


def of_style(folder: Path, style: Style, known: Mapping[str, Concept]) -> list[Drawing | Reject]:
    """The files of one collection. Raises DataError where it has none."""
    paths = sorted(folder.glob(style.pattern), key=lambda path: (code_points(path), path.name))
    if not paths:
        raise DataError(f"{folder}: no {style.pattern} there; clone the whole repository again")
    found: list[Drawing | Reject] = []
    taken: set[str] = set()
    for path in paths:
        codes = code_points(path)
        one = drawing(path, codes, style, known)
        if isinstance(one, Drawing) and codes in taken:
            one = Reject(path.name, "listed twice", f"another file shows {codes}")
        taken.add(codes)
        found.append(one)
    return found


def drawing(path: Path, codes: str, style: Style, known: Mapping[str, Concept]) -> Drawing | Reject:
    """A file as a drawing, if words can ask for it."""
    base, tones = split_tone(codes)
    concept = known.get(base)
    if concept is None or concept.group == "component":
        return Reject(path.name, "no name", f"CLDR has no English name for {codes or 'this file'}")
    if NOT_DRAWN.search(concept.name) or (style.source in MISDRAWN and MISDRAWN[style.source].search(concept.name)):
        return Reject(path.name, "not drawn", f"{concept.name} is not what this picture shows, or is writing")
    if len(tones) > 1:
        return Reject(path.name, "several skin tones", f"{len(tones)} tones in one picture")
    if tones and not wanted_tone(style, concept, next(iter(tones))):
        return Reject(path.name, "another skin tone", "of each person and hand some tones are taken")
    return Drawing(style, path, codes, concept, next(iter(tones), None))


def wanted_tone(style: Style, concept: Concept, tone: str) -> bool:
    """Whether this skin tone is one of those taken: `style.tones` of five, for half of the gendered one."""
    tones = ("light", "medium-light", "medium", "medium-dark", "dark")
    chance = Chance(f"tones {style.source} {concept.codes}")
    gendered = bool(re.match(r"(man|woman|men|women)\b", concept.name))
    count = min(style.tones, int(chance("gendered") < 0.5)) if gendered else style.tones
    return tone in sorted(tones, key=chance)[:count]


class Gallery:
    """Pictures among which one looks for another's like.

    Means over 16×16 fields come first: pictures differ by no less than their means do (triangle inequality).
    """

    def __init__(self) -> None:
        self._pictures: list[Thumbnail] = []
        self._means: list[NDArray[np.float64]] = []

    def add(self, picture: Thumbnail) -> None:
        """Hang a picture behind the others."""
        self._pictures.append(picture)
        self._means.append(_means(picture))

    def find(self, picture: Thumbnail, limit: float, but: int | None = None) -> int | None:
        """The first picture, `but` one, whose mean absolute difference is below `limit`; None where there is none."""
        if not self._means:
            return None
        near = np.abs(np.stack(self._means) - _means(picture)).mean(axis=1) < limit
        for place in np.flatnonzero(near).tolist():
            other = self._pictures[place].astype(np.int16)
            if place != but and np.abs(other - picture.astype(np.int16)).mean() < limit:
                return int(place)
        return None


def _means(picture: Thumbnail) -> NDArray[np.float64]:
    return np.asarray(reduce(picture.astype(np.float64), "(y h) (x w) c -> (y x c)", "mean", h=16, w=16))


def distinct(found: Iterable[tuple[Drawing, Thumbnail]]) -> tuple[list[tuple[Drawing, Thumbnail]], list[Reject]]:
    """The drawings that are not empty and not, in their style, the same as one before them."""
    kept: list[tuple[Drawing, Thumbnail]] = []
    left_out: list[Reject] = []
    seen: dict[str, tuple[Gallery, list[str]]] = {}
    for one, picture in found:
        gallery, keys = seen.setdefault(one.style.source, (Gallery(), []))
        if (picture.min(axis=2) < 250).mean() < LEAST_INK:
            left_out.append(Reject(one.path.name, "empty", "next to nothing is drawn"))
        elif (twin := gallery.find(picture, SAME)) is not None:
            left_out.append(Reject(one.path.name, "duplicate", f"shows what {keys[twin]} shows"))
        else:
            gallery.add(picture)
            keys.append(one.key)
            kept.append((one, picture))
    return kept, left_out


def held_out(kept: list[tuple[Drawing, Thumbnail]], seed: int) -> set[tuple[str, str]]:
    """Pairs of a main style and a concept that training never sees together, though it sees both with others.

    A concept is held out in one style and is there in at least three other main ones. It has no neighbour in name
    (`key`, `old key`) or, in that style, in looks, by which its picture could be known.
    """
    there: dict[str, set[str]] = {}
    plain = [(one, picture) for one, picture in kept if one.tone is None and one.style.source in MAIN]
    for one, _ in plain:
        there.setdefault(one.concept.codes, set()).add(one.style.source)
    names = {one.concept.name for one, _ in plain}
    chosen: dict[str, str] = {}
    for source in MAIN:
        own = [(one, picture) for one, picture in plain if one.style.source == source]
        gallery, left = Gallery(), dict(HELD_OUT)
        for _, picture in own:
            gallery.add(picture)
        chance = Chance(f"held out {seed} {source}")
        for place in sorted(range(len(own)), key=lambda place: chance(own[place][0].concept.codes)):
            concept, picture = own[place][0].concept, own[place][1]
            if not left.get(concept.group) or concept.codes in chosen or len(there[concept.codes] - {source}) < 3:
                continue
            alike = (gallery.find(each, ALIKE, but=place) is not None for each in (picture, picture[:, ::-1]))
            if has_sibling(concept.name, names) or any(alike):
                continue
            chosen[concept.codes] = source
            left[concept.group] -= 1
    return {(source, codes) for codes, source in chosen.items()}


@dataclass(frozen=True)
class Choice:
    """Drawings to train on, in an order that mixes styles; drawings that training must not see; and what is neither."""

    training: list[Drawing]
    held_out: list[Drawing]
    left_out: list[Reject]


def choose(found: list[Drawing], thumbnails: Iterable[Thumbnail], seed: int) -> Choice:
    """What becomes of the drawings, whose pictures at 64×64 are given: a function of both and the seed."""
    kept, left_out = distinct(zip(found, thumbnails, strict=True))
    pairs = held_out(kept, seed)
    chance = Chance(f"order {seed}")
    shown = sorted((one for one, _ in kept if not is_held_out(one, pairs)), key=lambda one: chance(one.key))
    return Choice(shown, [one for one, _ in kept if one.pair in pairs and one.tone is None], left_out)


def has_sibling(name: str, names: set[str]) -> bool:
    """Whether one name holds all words of the other."""
    words = set(name.lower().split())
    return any(other != name and (words <= (more := set(other.lower().split())) or more <= words) for other in names)


def is_held_out(one: Drawing, pairs: set[tuple[str, str]]) -> bool:
    """Whether training must not see a drawing; Fluent's 3D drawings have nearly equal ones with gradients."""
    return one.pair in pairs or (one.style.source == "fluent_color" and ("fluent_3d", one.concept.codes) in pairs)
