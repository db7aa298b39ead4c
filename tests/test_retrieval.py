"""Captions are found by constructed vectors, of which one knows who is nearest to whom."""

from collections.abc import Sequence

import numpy as np
import pytest

from ldm.evaluation.figures import Array
from ldm.evaluation.retrieval import (
    Styles,
    clip_scores,
    concept_and_style,
    found_first,
    recall_at_1,
    share_of,
)

STYLES = Styles.parse("3D, gradient; flat,simple; black and white")
CONCEPTS = ("apple", "dog", "tree", "key")


def vectors(captions: Sequence[str]) -> Array:
    """A concept decides one half of the vector and the style the other; the flat styles are hard to tell apart."""
    made = []
    for caption in captions:
        concept = np.array([name in caption for name in CONCEPTS], float)
        style = np.array([float(word in caption) for word in STYLES.words])
        style[[2, 3]] = 0.9 * style[[2, 3]] + 0.1 * style[[3, 2]]
        made.append(np.concatenate([2 * concept, style]))
    found = np.stack(made)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def test_clip_score_is_a_hundred_cosines_that_are_never_below_zero() -> None:
    images = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    assert clip_scores(images, np.array([[1.0, 0.0]] * 3)) == pytest.approx([100, 60, 0])


def test_own_caption_must_be_nearer_than_every_other() -> None:
    images = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    assert found_first(images, images, [0, 1, 0]) == (True, True, False)
    assert found_first(images, np.ones((3, 2)), [0, 1, 2]) == (False,) * 3  # a judge that sees nothing finds nothing


def test_recall_counts_among_the_others_too() -> None:
    captions = ["a 3D apple", "a 3D dog", "a 3D dog"]
    shown = ["a 3D apple", "a 3D dog", "a 3D dog key"]
    assert recall_at_1(vectors(shown), captions, vectors) == (True, True, True)
    assert recall_at_1(vectors(shown), captions, vectors, ["a 3D dog key"]) == (True, True, False)
    assert str(share_of((True, True, False))).startswith("66.7 % (2 of 3")


def test_concept_and_style_are_judged_apart() -> None:
    captions = ["a 3D apple", "a flat dog", "a simple tree", "a black and white key"]
    shown = ["a gradient apple", "a simple dog", "a 3D tree", "a black and white dog"]
    found = concept_and_style(vectors(shown), captions, vectors, STYLES)
    assert found.concept == (True, True, True, False)
    assert found.style == (True, True, False, True)  # gradient counts as 3D, simple as flat


def test_styles_do_not_help_to_find_concepts() -> None:
    captions = ["a 3D apple", "a flat dog"]
    shown = ["a 3D nothing", "a flat nothing"]  # the style alone is there
    assert recall_at_1(vectors(shown), captions, vectors) == (True, True)
    assert concept_and_style(vectors(shown), captions, vectors, STYLES).concept == (False, False)


def test_the_first_style_word_is_the_style() -> None:
    assert STYLES.of("a black and white emoji of a flat key") == "black and white"
    assert STYLES.put("a flat emoji of a flat key", "3D") == "a 3D emoji of a flat key"
    assert STYLES.of("a flatfish") is None
    assert Styles.parse("black; black and white").of("a black and white emoji") == "black and white"


@pytest.mark.parametrize("text", ["3D", "3D;;flat", "3D;3D", ""])
def test_groups_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected two groups"):
        Styles.parse(text)


def test_a_caption_without_style_is_refused() -> None:
    with pytest.raises(ValueError, match="no style word in the caption 'an apple'"):
        concept_and_style(vectors(["an apple"]), ["an apple"], vectors, STYLES)
