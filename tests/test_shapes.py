"""The procedural data set: exact captions, held-out combinations, and pictures that stay inside their frame."""

import hashlib
import random
from collections import Counter

import numpy as np
import pytest

from ldm.data.outlines import SQUARE_SIDE, silhouette
from ldm.data.scenes import (
    ALONE,
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    INVERSE,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    sample_scene,
    triples,
    twin,
)
from ldm.data.shapes import (
    Expectation,
    Wanted,
    caption,
    expectation,
    held_out_prompts,
    parse_caption,
    render,
    shard_sample,
)


def scenes(count: int, seed: int = 0, **asked: object) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, **asked) for _ in range(count)]


@pytest.fixture(scope="module")
def training() -> list[Scene]:
    return scenes(20_000)


RED_CIRCLE = Thing("circle", "red", "medium", 0.25, 0.5, 0.3)
BLUE_SQUARE = Thing("square", "blue", "medium", 0.75, 0.5, 0.3)


def test_held_out_never_changes() -> None:
    text = "\n".join(sorted(" ".join(triple) for triple in HELD_OUT))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "531421bcd79a5290797c10b2024b59f4c271412fc1469b0bb4b7c2d834b1dea8"
    )


def test_held_out_is_balanced() -> None:
    assert Counter(relation for *_, relation in HELD_OUT) == dict.fromkeys((ALONE, *RELATIONS), 5)
    assert set(Counter(colour for colour, *_ in HELD_OUT).values()) == {3, 4}
    assert set(Counter(shape for _, shape, _ in HELD_OUT).values()) == {4, 5}
    assert len({(colour, shape) for colour, shape, _ in HELD_OUT}) == len(HELD_OUT)
    shown = {("green", "triangle", "above"), ("red", "circle", "left of")}
    assert not HELD_OUT & (shown | {("yellow", "circle", "below"), ("blue", "square", "right of")})


def test_training_never_shows_a_held_out_triple(training: list[Scene]) -> None:
    seen = set().union(*map(triples, training))
    assert not seen & HELD_OUT
    every = {(c, s, r) for c in COLOURS for s in SHAPES for r in (ALONE, *RELATIONS)}
    assert seen == every - HELD_OUT


def test_training_mixture(training: list[Scene]) -> None:
    share = Counter(scene.kind for scene in training)
    for kind, expected in {"one": 0.35, "two": 0.5, "count": 0.15}.items():
        assert abs(share[kind] / len(training) - expected) < 0.02
    white = sum(scene.background == "white" for scene in training)
    assert abs(white / len(training) - 0.6) < 0.02


@pytest.mark.parametrize("kind", ["one", "two", "count"])
def test_held_out_scenes_have_a_held_out_subject(kind: str) -> None:
    for scene in scenes(300, held_out=True, kind=kind):
        subject = scene.things[0]
        assert triples(scene) & HELD_OUT == {(subject.colour, subject.shape, scene.relation or ALONE)}


def test_triples_are_told_from_both_sides() -> None:
    scene = Scene((RED_CIRCLE, BLUE_SQUARE), "two", relation="left of")
    assert triples(scene) == {("red", "circle", "left of"), ("blue", "square", "right of")}
    assert all(INVERSE[INVERSE[relation]] == relation for relation in RELATIONS)


def test_objects_stay_inside_and_apart(training: list[Scene]) -> None:
    rng = random.Random(1)
    for scene in training[:3000]:
        for shown in (scene, twin(scene, rng)):
            for index, a in enumerate(shown.things):
                assert a.extent / 2 + 0.029 < a.x < 0.971 - a.extent / 2
                assert a.extent / 2 + 0.029 < a.y < 0.971 - a.extent / 2
                for b in shown.things[:index]:
                    assert max(abs(a.x - b.x), abs(a.y - b.y)) - (a.extent + b.extent) / 2 > 0.0599


def test_relations_are_true_of_the_places(training: list[Scene]) -> None:
    for scene in training:
        if scene.relation is not None:
            first, second = scene.things
            right, down = first.x - second.x, first.y - second.y
            across, along = (down, right) if scene.relation in ("left of", "right of") else (right, down)
            assert (along < 0) == (scene.relation in ("left of", "above"))
            assert abs(along) > 1.5 * abs(across)


def test_captions_read_as_written() -> None:
    rng = random.Random(0)
    alone = Thing("star", "orange", "large", 0.2, 0.2, 0.42)
    assert caption(Scene((RED_CIRCLE,), "one"), rng) == "a red circle"
    assert caption(Scene((alone,), "one", None, "in the top left corner", "grey"), rng) == (
        "a large orange star in the top left corner on a grey background"
    )
    assert caption(Scene((Thing("star", "orange", "medium", 0.5, 0.5, 0.3),), "one"), rng) == "an orange star"
    told = {caption(Scene((RED_CIRCLE, BLUE_SQUARE), "two", relation="left of"), rng) for _ in range(50)}
    assert told == {"a red circle to the left of a blue square", "a red circle left of a blue square"}
    crosses = (Thing("cross", "purple", "small", 0.25, 0.25, 0.18),) * 3
    assert caption(Scene(crosses, "count"), rng) == "three small purple crosses"


def test_captions_round_trip(training: list[Scene]) -> None:
    rng = random.Random(0)
    for scene in [*training[:3000], *scenes(500, held_out=True)]:
        assert parse_caption(caption(scene, rng)) == expectation(scene)


def test_parsing_is_lenient_about_form_only() -> None:
    wanted = Expectation((Wanted("circle", "red"),), background="white")
    assert parse_caption("  A red  circle on a white background. ") == wanted
    for text in ("", "a red dog", "a circle", "red circle", "a red circle near a blue square", "five red circles"):
        with pytest.raises(ValueError, match="expected a phrase such as"):
            parse_caption(text)


def test_twin_changes_what_its_caption_says(training: list[Scene]) -> None:
    rng = random.Random(0)
    for scene in training[:3000]:
        other = twin(scene, rng)
        assert expectation(other) != expectation(scene)
        assert other.kind == scene.kind
        assert not triples(other) & HELD_OUT


def test_held_out_prompts_are_fixed_and_held_out() -> None:
    for kind in ("one", "two"):
        prompts = held_out_prompts(100, kind, seed=3)
        assert prompts == held_out_prompts(200, kind, seed=3)[:100]
        assert prompts != held_out_prompts(100, kind, seed=4)
        for prompt in prompts:
            wanted = parse_caption(prompt)
            subject = wanted.things[0]
            assert (subject.colour, subject.shape, wanted.relation or ALONE) in HELD_OUT
    assert sum(prompt.count(" ") == 2 for prompt in held_out_prompts(100, "one", seed=0)) == 50
    two = held_out_prompts(400, "two", seed=0)
    assert len(set(two)) == 400
    assert abs(sum("background" in prompt for prompt in two) / 400 - 0.2) < 0.07


def test_render_paints_what_the_scene_says() -> None:
    pixels = np.asarray(render(Scene((RED_CIRCLE, BLUE_SQUARE), "two", "left of", None, "grey"), 200))
    assert tuple(pixels[100, 50]) == COLOURS["red"]
    assert tuple(pixels[100, 150]) == COLOURS["blue"]
    assert tuple(pixels[5, 5]) == BACKGROUNDS["grey"]
    area = (pixels != BACKGROUNDS["grey"]).any(axis=-1)[:, :100].sum()
    assert area == pytest.approx(np.pi * 30**2, rel=0.06)


@pytest.mark.parametrize("shape", SHAPES)
def test_silhouette_fills_its_frame(shape: str) -> None:
    rows, columns = np.nonzero(np.asarray(silhouette(shape, 120, 120, 60, 60, 100)) > 127)
    side = 100 * (SQUARE_SIDE if shape == "square" else 1)
    assert np.ptp(columns) + 1 == pytest.approx(side, abs=2)
    assert np.ptp(rows) + 1 == pytest.approx(side, abs=4)
    assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(60, abs=1)


def test_sample_depends_on_seed_and_index_alone() -> None:
    assert shard_sample(7, seed=1, resolution=32) == shard_sample(7, seed=1, resolution=32)
    assert shard_sample(7, seed=1, resolution=32)["png"] != shard_sample(8, seed=1, resolution=32)["png"]
    assert shard_sample(7, seed=1, resolution=32)["txt"] == shard_sample(7, seed=1, resolution=64)["txt"]
