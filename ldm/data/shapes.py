"""An endless, procedural data set: flat shapes on flat ground, with captions that are exactly true.

A `Scene` is sampled, drawn by `render` and told by `caption`; `parse_caption` reads the caption back into an
`Expectation`, which an evaluator can hold against a generated picture. Some combinations of colour, shape and
relation (`HELD_OUT`) never occur in training, so that a model's ability to compose can be measured.

Coordinates are fractions of the picture's side, x to the right and y down; everything random comes from the
`random.Random` that the caller hands in.
"""

import io
import math
import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from PIL import Image, ImageDraw

from ldm.errors import SettingError

Colour = tuple[int, int, int]
Triple = tuple[str, str, str]
"""(colour, shape, relation), the relation being one of `RELATIONS` or `ALONE`."""

COLOURS: dict[str, Colour] = {
    "red": (215, 25, 35),
    "orange": (255, 130, 0),
    "yellow": (255, 225, 20),
    "green": (25, 145, 50),
    "blue": (25, 70, 215),
    "purple": (150, 40, 160),
    "pink": (255, 120, 190),
    "cyan": (20, 200, 225),
}

BACKGROUNDS: dict[str, Colour] = {
    "white": (255, 255, 255),
    "grey": (190, 190, 190),
    "black": (12, 12, 12),
    "beige": (240, 220, 180),
}
DEFAULT_BACKGROUND = "white"

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")

SIZES: dict[str, tuple[float, float]] = {"small": (0.16, 0.20), "medium": (0.26, 0.32), "large": (0.40, 0.44)}
"""Ranges of a thing's extent. The gaps between the ranges keep the three words apart for the eye."""
DEFAULT_SIZE = "medium"

RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ALONE = "alone"

POSITIONS: dict[str, tuple[int, int]] = {
    "in the top left corner": (-1, -1),
    "at the top": (0, -1),
    "in the top right corner": (1, -1),
    "on the left": (-1, 0),
    "in the centre": (0, 0),
    "on the right": (1, 0),
    "in the bottom left corner": (-1, 1),
    "at the bottom": (0, 1),
    "in the bottom right corner": (1, 1),
}
"""Named places as (column, row) of a 3 × 3 grid, the centre being (0, 0)."""

COUNTS = {2: "two", 3: "three", 4: "four"}

HELD_OUT: frozenset[Triple] = frozenset(
    [
        ("red", "triangle", "alone"), ("orange", "star", "alone"), ("green", "cross", "alone"),
        ("blue", "heart", "alone"), ("pink", "square", "alone"),
        ("red", "star", "left of"), ("orange", "heart", "left of"), ("blue", "circle", "left of"),
        ("purple", "triangle", "left of"), ("cyan", "square", "left of"),
        ("orange", "square", "right of"), ("yellow", "star", "right of"), ("green", "heart", "right of"),
        ("pink", "cross", "right of"), ("cyan", "circle", "right of"),
        ("yellow", "square", "above"), ("green", "circle", "above"), ("blue", "triangle", "above"),
        ("purple", "cross", "above"), ("cyan", "heart", "above"),
        ("red", "square", "below"), ("orange", "cross", "below"), ("yellow", "triangle", "below"),
        ("purple", "star", "below"), ("pink", "circle", "below"),
    ]
)  # fmt: skip
"""25 of the 240 triples, never seen in training. Written out, because changing it would invalidate every score.

Five per relation, three or four per colour, four or five per shape; no (colour, shape) pair is held out twice,
so each held-out pair is seen in training in the other relations.
"""


@dataclass(frozen=True)
class Thing:
    """One object: names, the centre (x, y) of its frame, and the side `extent` of that square frame."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Scene:
    """What is in a picture. `relation` is that of things[0] to things[1]; a caption is told from things[0]."""

    things: tuple[Thing, ...]
    kind: Literal["one", "two", "count"]
    relation: str | None = None
    position: str | None = None
    background: str = DEFAULT_BACKGROUND


@dataclass(frozen=True)
class Wanted:
    """What a caption says of one object; None where it says nothing."""

    shape: str
    colour: str
    size: str | None = None


@dataclass(frozen=True)
class Expectation:
    """What a caption says of a picture; None where it says nothing. The number of `things` is always meant."""

    things: tuple[Wanted, ...]
    relation: str | None = None
    position: str | None = None
    background: str | None = None


# Sampling ------------------------------------------------------------------------------------------------------

_MARGIN = 0.03  # between an object's frame and the picture's edge
_GAP = 0.06  # the least distance between two objects' frames


def triples(scene: Scene) -> set[Triple]:
    """The (colour, shape, relation) triples that a scene shows, told from either side."""
    if scene.relation is None:
        return {(thing.colour, thing.shape, ALONE) for thing in scene.things}
    first, second = scene.things
    return {
        (first.colour, first.shape, scene.relation),
        (second.colour, second.shape, INVERSE[scene.relation]),
    }


def sample_scene(rng: random.Random, held_out: bool = False, kind: str | None = None) -> Scene:
    """Draw a scene: 35 % one object, 50 % two, 15 % a count of equal ones, or only `kind`.

    With `held_out` the subject (things[0]) is in a held-out triple, and nothing else is; without, no triple of
    the scene is held out.
    """
    if kind is None:
        kind = rng.choices(("one", "two", "count"), (35, 50, 15))[0]
    if kind == "two":
        return _sample_two(rng, held_out)
    if kind == "one":
        return _sample_one(rng, held_out)
    if kind == "count":
        return _sample_count(rng, held_out)
    raise SettingError(f"sample_scene: got kind {kind!r}, expected 'one', 'two' or 'count'")


def _sample_one(rng: random.Random, held_out: bool) -> Scene:
    colour, shape = _sample_pair(rng, ALONE, held_out)
    size = _sample_size(rng)
    extent = rng.uniform(*SIZES[size])
    position = rng.choice(tuple(POSITIONS)) if rng.random() < 0.5 else None
    x, y = _place(rng, position, extent)
    thing = Thing(shape, colour, size, x, y, extent)
    return Scene((thing,), "one", position=position, background=_sample_background(rng))


def _sample_two(rng: random.Random, held_out: bool) -> Scene:
    relation = rng.choice(RELATIONS)
    subject = _sample_pair(rng, relation, held_out)
    other = _sample_pair(rng, INVERSE[relation], False)
    while other == subject:
        other = _sample_pair(rng, INVERSE[relation], False)
    sizes = _sample_size(rng), _sample_size(rng)
    extents = rng.uniform(*SIZES[sizes[0]]), rng.uniform(*SIZES[sizes[1]])
    centres = _place_two(rng, relation, extents)
    things = tuple(
        Thing(shape, colour, size, x, y, extent)
        for (colour, shape), size, (x, y), extent in zip((subject, other), sizes, centres, extents, strict=True)
    )
    return Scene(things, "two", relation=relation, background=_sample_background(rng))


def _sample_count(rng: random.Random, held_out: bool) -> Scene:
    colour, shape = _sample_pair(rng, ALONE, held_out)
    size = rng.choices(("small", "medium"), (40, 60))[0]
    thing = Thing(shape, colour, size, 0.5, 0.5, rng.uniform(*SIZES[size]))
    return Scene(_repeat(rng, thing, rng.choice(tuple(COUNTS))), "count", background=_sample_background(rng))


def _sample_pair(rng: random.Random, relation: str, held_out: bool) -> tuple[str, str]:
    """A (colour, shape) that, in this relation, is held out or is not, as asked."""
    pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s, relation) in HELD_OUT) == held_out]
    return rng.choice(pairs)


def _sample_size(rng: random.Random) -> str:
    return rng.choices(("small", "medium", "large"), (20, 60, 20))[0]


def _sample_background(rng: random.Random) -> str:
    others = [name for name in BACKGROUNDS if name != DEFAULT_BACKGROUND]
    return DEFAULT_BACKGROUND if rng.random() < 0.6 else rng.choice(others)


def _place(rng: random.Random, position: str | None, extent: float) -> tuple[float, float]:
    """A centre in the named cell, or near the middle of the picture where no place is named."""
    if position is None:
        return 0.5 + rng.uniform(-0.08, 0.08), 0.5 + rng.uniform(-0.08, 0.08)
    column, row = POSITIONS[position]
    x, y = (0.5 + 0.3 * step + rng.uniform(-0.04, 0.04) for step in (column, row))
    return _inside(x, extent), _inside(y, extent)


def _place_two(rng: random.Random, relation: str, extents: tuple[float, float]) -> list[tuple[float, float]]:
    """Two centres with a clear gap along the relation's axis, and roughly aligned across it."""
    subject_first = relation in ("left of", "above")
    first, second = extents if subject_first else extents[::-1]
    room = 1 - 2 * _MARGIN - first - second - _GAP
    gap = _GAP + rng.uniform(0, min(room, 0.2))
    start = _MARGIN + rng.uniform(0, room + _GAP - gap)
    along = [start + first / 2, start + first + gap + second / 2]
    if not subject_first:
        along.reverse()
    level = 0.5 + rng.uniform(-0.1, 0.1)
    across = [_inside(level + rng.uniform(-0.05, 0.05), extent) for extent in extents]
    xs, ys = (along, across) if relation in ("left of", "right of") else (across, along)
    return list(zip(xs, ys, strict=True))


def _repeat(rng: random.Random, thing: Thing, count: int) -> tuple[Thing, ...]:
    """`count` copies of a thing in different quarters of the picture, jittered without touching."""
    quarters = rng.sample([(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)], count)
    slack = (0.5 - thing.extent - _GAP) / 2
    return tuple(
        replace(thing, x=x + rng.uniform(-slack, slack), y=y + rng.uniform(-slack, slack))
        for x, y in sorted(quarters, key=lambda centre: (centre[1], centre[0]))
    )


def _inside(centre: float, extent: float) -> float:
    """The nearest coordinate at which the whole object stays within the margins."""
    reach = extent / 2 + _MARGIN
    return min(max(centre, reach), 1 - reach)


# Hard negatives ------------------------------------------------------------------------------------------------


def twin(scene: Scene, rng: random.Random) -> Scene:
    """The same scene with one thing changed, such that each one's caption is false of the other's picture.

    Two objects exchange their colours, their shapes or their places (the mirror image); a single object changes
    its colour, its shape, or another facet that its caption mentions; a group changes its number. A scene free of
    held-out triples has a twin free of them.
    """
    twins = {"one": _twins_of_one, "two": _twins_of_two, "count": _twins_of_count}[scene.kind](scene, rng)
    if not triples(scene) & HELD_OUT:
        twins = [other for other in twins if not triples(other) & HELD_OUT]
    return rng.choice(twins)


def _twins_of_one(scene: Scene, rng: random.Random) -> list[Scene]:
    """One candidate per facet. What goes unsaid (medium, white, no place) stays: changing it contradicts nothing."""
    (thing,) = scene.things
    free = triples(scene).isdisjoint(HELD_OUT)

    def allowed(colour: str, shape: str) -> bool:
        return not (free and (colour, shape, ALONE) in HELD_OUT)

    colour = rng.choice([name for name in COLOURS if name != thing.colour and allowed(name, thing.shape)])
    shape = rng.choice([name for name in SHAPES if name != thing.shape and allowed(thing.colour, name)])
    twins = [
        replace(scene, things=(replace(thing, colour=colour),)),
        replace(scene, things=(replace(thing, shape=shape),)),
    ]
    if thing.size != DEFAULT_SIZE:
        size = "small" if thing.size == "large" else "large"
        extent = rng.uniform(*SIZES[size])
        resized = replace(thing, size=size, extent=extent, x=_inside(thing.x, extent), y=_inside(thing.y, extent))
        twins.append(replace(scene, things=(resized,)))
    if scene.position is not None:
        position = rng.choice([name for name in POSITIONS if name != scene.position])
        x, y = _place(rng, position, thing.extent)
        twins.append(replace(scene, things=(replace(thing, x=x, y=y),), position=position))
    if scene.background != DEFAULT_BACKGROUND:
        others = [name for name in BACKGROUNDS if name not in (scene.background, DEFAULT_BACKGROUND)]
        twins.append(replace(scene, background=rng.choice(others)))
    return twins


def _twins_of_two(scene: Scene, rng: random.Random) -> list[Scene]:
    first, second = scene.things
    assert scene.relation is not None
    mirrored = tuple(
        replace(thing, x=1 - thing.x) if scene.relation in ("left of", "right of") else replace(thing, y=1 - thing.y)
        for thing in scene.things
    )
    twins = [replace(scene, things=mirrored, relation=INVERSE[scene.relation])]
    if first.colour != second.colour:
        swapped = replace(first, colour=second.colour), replace(second, colour=first.colour)
        twins.append(replace(scene, things=swapped))
    if first.shape != second.shape:
        swapped = replace(first, shape=second.shape), replace(second, shape=first.shape)
        twins.append(replace(scene, things=swapped))
    recoloured = [
        replace(scene, things=(replace(first, colour=name), second))
        for name in COLOURS
        if name != first.colour
        and (name, first.shape) != (second.colour, second.shape)
        and (name, first.shape, scene.relation) not in HELD_OUT
    ]
    return [*twins, rng.choice(recoloured)]


def _twins_of_count(scene: Scene, rng: random.Random) -> list[Scene]:
    counts = [count for count in COUNTS if count != len(scene.things)]
    return [replace(scene, things=_repeat(rng, scene.things[0], count)) for count in counts]


# Captions ------------------------------------------------------------------------------------------------------

_RELATION_PHRASES = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below",),
}  # the first is the usual one
_POSITION_PHRASES = {name: (name,) for name in POSITIONS} | {"in the centre": ("in the centre", "in the middle")}


def caption(scene: Scene, rng: random.Random) -> str:
    """Tell the scene in one phrase, from things[0]; medium sizes and the white ground go unsaid."""
    first = scene.things[0]
    if scene.kind == "count":
        text = f"{COUNTS[len(scene.things)]} {_noun(first)}{_plural(first.shape)}"
    else:
        text = _with_article(_noun(first))
    if scene.relation is not None:
        text += f" {_vary(rng, _RELATION_PHRASES[scene.relation])} {_with_article(_noun(scene.things[1]))}"
    if scene.position is not None:
        text += f" {_vary(rng, _POSITION_PHRASES[scene.position])}"
    if scene.background != DEFAULT_BACKGROUND:
        text += f" on {_with_article(scene.background)} background"
    return text


def expectation(scene: Scene) -> Expectation:
    """What the scene's caption says, and no more."""
    return Expectation(
        things=tuple(Wanted(t.shape, t.colour, None if t.size == DEFAULT_SIZE else t.size) for t in scene.things),
        relation=scene.relation,
        position=scene.position,
        background=None if scene.background == DEFAULT_BACKGROUND else scene.background,
    )


def _noun(thing: Thing) -> str:
    size = "" if thing.size == DEFAULT_SIZE else f"{thing.size} "
    return f"{size}{thing.colour} {thing.shape}"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(shape: str) -> str:
    return "es" if shape.endswith("s") else "s"


def _vary(rng: random.Random, phrases: tuple[str, ...]) -> str:
    """Mostly the usual phrase, a quarter of the time another one."""
    return phrases[0] if len(phrases) == 1 or rng.random() < 0.75 else rng.choice(phrases[1:])


def _either(words: Iterable[str]) -> str:
    return "|".join(words)


_RELATION_OF = {phrase: name for name, phrases in _RELATION_PHRASES.items() for phrase in phrases}
_POSITION_OF = {phrase: name for name, phrases in _POSITION_PHRASES.items() for phrase in phrases}
_SHAPE_OF = {shape: shape for shape in SHAPES} | {shape + _plural(shape): shape for shape in SHAPES}
_NOUN = rf"(?:({_either(SIZES)}) )?({_either(COLOURS)}) ({_either(SHAPES)})"
_CAPTION = re.compile(
    rf"(?:an? {_NOUN}(?: ({_either(_RELATION_OF)}) an? {_NOUN}| ({_either(_POSITION_OF)}))?"
    rf"|({_either(COUNTS.values())}) (?:({_either(SIZES)}) )?({_either(COLOURS)}) "
    rf"({_either(shape + _plural(shape) for shape in SHAPES)}))"
    rf"(?: on an? ({_either(BACKGROUNDS)}) background)?"
)


def parse_caption(text: str) -> Expectation:
    """Read any caption of this grammar back; case, spacing and a closing full stop do not matter.

    "medium" and "on a white background" are understood too, and then meant. SettingError for any other text.
    """
    match = _CAPTION.fullmatch(" ".join(text.lower().split()).removesuffix("."))
    if match is None:
        raise SettingError(
            f"parse_caption: got {text!r}, expected a phrase such as 'a red circle', 'a small pink heart below a "
            "large cyan star', 'three purple stars' or 'a red circle in the top left corner', perhaps with 'on a "
            f"grey background'; colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}"
        )
    size, colour, shape, relation, size2, colour2, shape2, place, number, size_n, colour_n, shape_n, ground = (
        match.groups()
    )
    if number is not None:
        count = {word: count for count, word in COUNTS.items()}[number]
        things = (Wanted(_SHAPE_OF[shape_n], colour_n, size_n),) * count
    elif relation is not None:
        things = Wanted(shape, colour, size), Wanted(shape2, colour2, size2)
    else:
        things = (Wanted(shape, colour, size),)
    return Expectation(things, _RELATION_OF.get(relation), _POSITION_OF.get(place), ground)


def held_out_prompts(n: int, kind: Literal["one", "two"], seed: int) -> list[str]:
    """`n` captions whose subject is in a held-out triple, the same for the same (n, kind, seed).

    "one": every other prompt is plain ("a red triangle"), the rest vary size, place and ground. "two": relations
    between medium things, four in five on white. Prompts repeat only where the grammar has no more to offer.
    """
    if kind not in ("one", "two"):
        raise SettingError(f"held_out_prompts: got kind {kind!r}, expected 'one' or 'two'")
    rng = random.Random(f"held-out prompts {kind} {seed}")
    plain = sorted(f"{_with_article(f'{c} {s}')}" for c, s, relation in HELD_OUT if relation == ALONE)
    prompts: list[str] = []
    while len(prompts) < n:
        if kind == "one" and len(prompts) % 2 == 0:
            prompts.append(plain[len(prompts) // 2 % len(plain)])
            continue
        for _ in range(100):  # redraw what was drawn before, while there is something new to draw
            scene = sample_scene(rng, held_out=True, kind=kind)
            if kind == "two":
                scene = replace(scene, things=tuple(replace(thing, size=DEFAULT_SIZE) for thing in scene.things))
                if rng.random() < 0.5:  # 0.6 + 0.4 · 0.5 = four in five on white
                    scene = replace(scene, background=DEFAULT_BACKGROUND)
            text = caption(scene, rng)
            if text not in prompts and text not in plain:
                break
        prompts.append(text)
    return prompts


# Drawing -------------------------------------------------------------------------------------------------------

_SUPERSAMPLING = 4


def _star(points: int = 5, waist: float = 0.45) -> list[tuple[float, float]]:
    radii = (1.0, waist)
    turns = [math.pi * i / points for i in range(2 * points)]
    return [(radii[i % 2] * math.sin(turn), -radii[i % 2] * math.cos(turn)) for i, turn in enumerate(turns)]


def _heart(steps: int = 64) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / steps for i in range(steps)]
    return [
        (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
        for t in turns
    ]


def _cross(arm: float = 0.17) -> list[tuple[float, float]]:
    quarter = [(arm, -0.5), (arm, -arm), (0.5, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


def _framed(outline: list[tuple[float, float]], side: float = 1.0) -> tuple[tuple[float, float], ...]:
    """Stretch an outline so that its bounding box is a square of this side around the origin."""
    xs, ys = zip(*outline, strict=True)
    return tuple(
        (
            side * ((x - min(xs)) / (max(xs) - min(xs)) - 0.5),
            side * ((y - min(ys)) / (max(ys) - min(ys)) - 0.5),
        )
        for x, y in outline
    )


SQUARE_SIDE = 0.88
"""A square fills only this much of its frame, so that it does not look larger than a circle of the same extent."""

OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": _framed([(math.cos(math.pi * i / 48), math.sin(math.pi * i / 48)) for i in range(96)]),
    "square": _framed([(0, 0), (1, 0), (1, 1), (0, 1)], SQUARE_SIDE),
    "triangle": _framed([(0, 0), (1, 2), (-1, 2)]),
    "star": _framed(_star()),
    "heart": _framed(_heart()),
    "cross": _framed(_cross()),
}
"""Polygons around the origin; their bounding box is the frame [−½, ½]², the square's a little less."""


def silhouette(shape: str, width: int, height: int, x: float, y: float, extent: float) -> Image.Image:
    """An anti-aliased mask (mode "L") of a shape with its centre at (x, y); everything in pixels."""
    scale = _SUPERSAMPLING
    mask = Image.new("L", (width * scale, height * scale))
    # Pillow addresses pixels by their centres, hence the half.
    corners = [((x + u * extent) * scale - 0.5, (y + v * extent) * scale - 0.5) for u, v in OUTLINES[shape]]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return mask.reduce(scale)


def render(scene: Scene, size: int) -> Image.Image:
    """Draw the scene as an RGB picture of size × size pixels."""
    image = Image.new("RGB", (size, size), BACKGROUNDS[scene.background])
    for thing in scene.things:
        x, y, extent = thing.x * size, thing.y * size, thing.extent * size
        left, top = math.floor(x - extent / 2), math.floor(y - extent / 2)
        right, bottom = math.ceil(x + extent / 2), math.ceil(y + extent / 2)
        mask = silhouette(thing.shape, right - left, bottom - top, x - left, y - top, extent)
        image.paste(COLOURS[thing.colour], (left, top, right, bottom), mask)
    return image


def shard_sample(index: int, seed: int, resolution: int) -> dict[str, object]:
    """The `index`-th training sample of the data set that `seed` names, as `write_shards` takes it.

    Its "negative" is a caption that is nearly right, for contrastive training.
    """
    rng = random.Random(f"shapes {seed} {index}")
    scene = sample_scene(rng)
    text, wrong = caption(scene, rng), caption(twin(scene, rng), rng)
    png = io.BytesIO()
    render(scene, resolution).save(png, "PNG", compress_level=6)
    return {
        "__key__": f"{index:08d}",
        "png": png.getvalue(),
        "txt": text,
        "json": {"source": "shapes", "seed": seed, "index": index, "negative": wrong, "scene": asdict(scene)},
    }
