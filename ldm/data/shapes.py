"""An endless, procedural data set: flat shapes on flat ground, with captions that are exactly true.

A `Scene` is sampled (`ldm.data.scenes`), drawn by `render` and told by `caption`; `parse_caption` reads it back
into an `Expectation`, which an evaluator can hold against a generated picture.
"""

import io
import math
import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from PIL import Image

from ldm.data.outlines import silhouette
from ldm.data.scenes import (
    ALONE,
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    DEFAULT_BACKGROUND,
    DEFAULT_SIZE,
    HELD_OUT,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    sample_scene,
    twin,
)
from ldm.errors import SettingError


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
