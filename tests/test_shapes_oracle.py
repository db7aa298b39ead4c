"""The oracle against known answers: right of what was drawn, wrong of what was not, and never sure of a blob."""

import random

import numpy as np
import pytest
from helpers import few
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from ldm.data.scenes import COLOURS, SHAPES, Scene, Thing, sample_scene, twin
from ldm.data.shapes import caption, expectation, parse_caption, render
from ldm.evaluation.shapes_oracle import UNKNOWN, Verdict, judge, read

KINDS = [(kind, held_out) for kind in ("one", "two", "count") for held_out in (False, True)]


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, held_out, kind) for i in range(count) for kind, held_out in [KINDS[i % len(KINDS)]]]


def degraded(image: Image.Image, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blurred by a pixel, with noise of 6 in 255."""
    pixels = ndimage.gaussian_filter(np.asarray(image, dtype=float), (1.0, 1.0, 0))
    return np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).round().astype(np.uint8)


def wobbled(image: Image.Image, rng: np.random.Generator, strength: float = 0.004) -> NDArray[np.uint8]:
    """Warped by a smooth random field whose standard deviation is this share of the side."""
    side = image.width
    field = np.stack([ndimage.zoom(rng.normal(0, 1, (8, 8)), side / 8, order=3) for _ in range(2)])
    places = np.mgrid[:side, :side] + field / field.std() * strength * side
    pixels = np.asarray(image, dtype=float)
    warped = [ndimage.map_coordinates(pixels[..., c], places, order=1, mode="nearest") for c in range(3)]
    return np.stack(warped, axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("count", few([200, 500], 200))
def test_reads_every_kind_of_scene(count: int) -> None:
    verdicts = [judge(read(render(scene, 128)), expectation(scene)) for scene in scenes(count)]
    assert sum(verdict.right and verdict.background for verdict in verdicts) >= 0.995 * len(verdicts)


@pytest.mark.parametrize("side", [64, 256])
def test_reads_at_other_sizes(side: int) -> None:
    verdicts = [judge(read(render(scene, side)), expectation(scene)) for scene in scenes(36, seed=1)]
    assert all(verdict.right and verdict.background for verdict in verdicts)


def test_tolerates_blur_and_noise() -> None:
    rng = np.random.default_rng(0)
    verdicts = [judge(read(degraded(render(s, 128), rng)), expectation(s)) for s in scenes(120, seed=2)]
    assert sum(verdict.right for verdict in verdicts) >= 0.995 * len(verdicts)


def test_tolerates_wobbly_edges() -> None:
    rng = np.random.default_rng(0)
    verdicts = [judge(read(wobbled(render(s, 128), rng)), expectation(s)) for s in scenes(60, seed=3)]
    assert sum(verdict.right for verdict in verdicts) >= 0.975 * len(verdicts)


def test_twins_are_wrong_both_ways() -> None:
    rng = random.Random(0)
    pairs = [(scene, twin(scene, rng)) for scene in scenes(120, seed=4)]
    wrong = [not judge(read(render(b, 128)), expectation(a)).right for a, b in pairs]
    wrong += [not judge(read(render(a, 128)), expectation(b)).right for a, b in pairs]
    assert sum(wrong) >= 0.99 * len(wrong)


def test_noise_and_flat_pictures_are_wrong() -> None:
    rng = np.random.default_rng(0)
    expectations = [expectation(scene) for scene in scenes(12)]
    pictures = [rng.integers(0, 256, (128, 128, 3), dtype=np.uint8) for _ in range(3)]
    pictures += [np.full((128, 128, 3), level, dtype=np.uint8) for level in (0, 128, 255)]
    for reading in map(read, pictures):
        assert not any(judge(reading, wanted).right for wanted in expectations)
    assert read(pictures[-1]).background == "white"
    assert read(pictures[-1]).things == ()


def test_blobs_have_no_shape() -> None:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:128, :128]
    named = 0
    for _ in range(40):
        field = ndimage.gaussian_filter(rng.normal(0, 1, (128, 128)), 6)
        blob = field / field.std() + 2 - np.hypot(rows - 64, columns - 64) / 12 > 0
        reading = read(np.where(blob[..., None], COLOURS["red"], 255).astype(np.uint8))
        named += any(thing.shape in ("star", "cross", "triangle", "square") for thing in reading.things)
    assert named <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_half_a_shape_is_not_that_shape(shape: str) -> None:
    image = render(Scene((Thing(shape, "green", "large", 0.5, 0.5, 0.42),), "one"), 128)
    image.paste("white", (64, 0, 128, 128))
    assert read(image).things[0].shape != shape


def test_colours_outside_the_palette_are_unknown() -> None:
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((40, 40, 88, 88), fill=(110, 95, 85))
    reading = read(image)
    assert (reading.things[0].shape, reading.things[0].colour) == ("circle", UNKNOWN)
    assert not reading.clean


def test_touching_objects_of_two_colours_are_two() -> None:
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).rectangle((24, 44, 63, 83), fill=COLOURS["red"])
    ImageDraw.Draw(image).rectangle((64, 44, 103, 83), fill=COLOURS["blue"])
    assert judge(read(image), parse_caption("a red square left of a blue square")).right
    assert not judge(read(image), parse_caption("a red square right of a blue square")).right


def test_reading_measures_place_and_extent() -> None:
    for shape in SHAPES:
        (thing,) = read(render(Scene((Thing(shape, "pink", "medium", 0.3, 0.6, 0.3),), "one"), 256)).things
        assert (thing.shape, thing.colour) == (shape, "pink")
        assert (thing.x, thing.y, thing.extent) == pytest.approx((0.3, 0.6, 0.3), abs=0.01)
        assert thing.confidence > 0.9


def verdict_of(things: list[Thing], text: str, background: str = "white") -> Verdict:
    return judge(read(render(Scene(tuple(things), "one", background=background), 128)), parse_caption(text))


RED = Thing("circle", "red", "medium", 0.25, 0.5, 0.3)
BLUE = Thing("square", "blue", "small", 0.75, 0.5, 0.18)


def test_each_part_of_a_verdict() -> None:
    assert verdict_of([RED, BLUE], "a red circle left of a small blue square").right
    swapped = verdict_of([RED, BLUE], "a blue circle left of a red square")
    assert (swapped.colour and swapped.shape, swapped.count, swapped.right) == (False, True, False)
    flipped = verdict_of([RED, BLUE], "a red circle right of a blue square")
    assert (flipped.colour, flipped.shape, flipped.count, flipped.relation, flipped.right) == (
        True,
        True,
        True,
        False,
        False,
    )
    large = verdict_of([RED, BLUE], "a large red circle left of a blue square")
    assert (large.size, large.relation, large.right) == (False, True, False)
    extra = verdict_of([RED, BLUE], "a red circle")
    assert (extra.colour, extra.shape, extra.count, extra.right) == (True, True, False, False)
    missing = verdict_of([RED], "a red circle left of a blue square")
    assert not (missing.colour or missing.shape or missing.count or missing.relation)
    placed = verdict_of([RED], "a red circle at the top")
    assert (placed.position, placed.colour, placed.right) == (False, True, False)
    assert verdict_of([RED], "a red circle on the left").right


def test_an_unmentioned_ground_is_noted_and_not_judged() -> None:
    unsaid = verdict_of([RED], "a red circle", background="grey")
    assert (unsaid.background, unsaid.right) == (False, True)
    said = verdict_of([RED], "a red circle on a beige background", background="grey")
    assert (said.background, said.right) == (False, False)


def test_judging_raw_captions() -> None:
    rng = random.Random(7)
    for scene in scenes(12, seed=8):
        assert judge(read(render(scene, 128)), parse_caption(caption(scene, rng))).right


def test_pictures_must_be_square() -> None:
    with pytest.raises(ValueError, match="expected a square one"):
        read(np.zeros((10, 20, 3), dtype=np.uint8))
