"""Scenes of flat shapes on flat ground: what can be in one, how one is sampled, and its nearest wrong neighbour.

Some combinations of colour, shape and relation (`HELD_OUT`) never occur in training, so that a model's ability to
compose can be measured. Coordinates are fractions of the picture's side, x to the right and y down; everything random
comes from the `random.Random` that the caller hands in.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal

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
