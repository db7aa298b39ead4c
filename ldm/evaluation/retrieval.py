"""Whether pictures show what their captions say, as a CLIP that the model was not conditioned with sees them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ldm.evaluation.figures import Array, Share

Texts = Callable[[Sequence[str]], Array]
"""Unit vectors (n e) of texts."""


def clip_scores(images: Array, texts: Array) -> Array:
    """100 · max(cos, 0) of each picture's and its caption's unit vectors (n e) (Hessel et al. 2021, with w = 100)."""
    return np.asarray(100 * np.einsum("ne,ne->n", images, texts).clip(0))


def found_first(images: Array, candidates: Array, own: Sequence[int]) -> tuple[bool, ...]:
    """R@1 picture by picture: whether its own candidate, by number, is nearer than every other one; a tie is a miss."""
    scores = images @ candidates.T
    rows = np.arange(len(scores))
    mine = scores[rows, list(own)]
    others = scores.copy()
    others[rows, list(own)] = -np.inf
    return tuple((mine > others.max(axis=1, initial=-np.inf)).tolist())


def share_of(hits: Sequence[bool]) -> Share:
    """The share of hits."""
    return Share(sum(hits), len(hits))


def recall_at_1(images: Array, captions: Sequence[str], texts: Texts, others: Sequence[str] = ()) -> tuple[bool, ...]:
    """Whether each picture's own caption is the nearest of all different captions, theirs and `others`."""
    candidates = list(dict.fromkeys([*captions, *others]))
    return found_first(images, texts(candidates), [candidates.index(caption) for caption in captions])


# Styles ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Styles:
    """Style words in groups that are judged as one: "3D,gradient;flat,simple;black and white"."""

    groups: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: str) -> "Styles":
        """Groups between semicolons, words between commas. ValueError for fewer than two groups, or a word twice."""
        groups = tuple(tuple(word.strip() for word in group.split(",") if word.strip()) for group in text.split(";"))
        words = [word for group in groups for word in group]
        if len(groups) < 2 or not all(groups) or len(set(words)) < len(words):
            raise ValueError(f"got {text!r}, expected two groups of words or more, no word twice")
        return cls(groups)

    @property
    def words(self) -> tuple[str, ...]:
        """All style words."""
        return tuple(word for group in self.groups for word in group)

    @property
    def pattern(self) -> re.Pattern[str]:
        """What finds the first style word of a caption; of two that begin alike the longer one."""
        words = sorted(self.words, key=len, reverse=True)
        return re.compile("|".join(rf"\b{re.escape(word)}\b" for word in words))

    def of(self, caption: str) -> str | None:
        """The style word of a caption."""
        found = self.pattern.search(caption)
        return found[0] if found else None

    def put(self, caption: str, style: str) -> str:
        """The caption in another style."""
        return self.pattern.sub(lambda _: style, caption, count=1)

    def group(self, word: str) -> int:
        """The number of the group of a style word."""
        return next(number for number, group in enumerate(self.groups) if word in group)


@dataclass(frozen=True)
class StyleHits:
    """Picture by picture: whether its concept is found, and its style's group."""

    concept: tuple[bool, ...]
    style: tuple[bool, ...]


def concept_and_style(
    images: Array, captions: Sequence[str], texts: Texts, styles: Styles, others: Sequence[str] = ()
) -> StyleHits:
    """R@1 of concepts and of styles apart from one another.

    Concept: the picture's caption among all captions, every one put into the picture's own style, so that style does
    not help. Style: the caption among itself in every style; right where the nearest is of the same group.
    Raises ValueError for a caption without a style word.
    """
    if strange := [caption for caption in (*captions, *others) if styles.of(caption) is None]:
        raise ValueError(f"no style word in the caption {strange[0]!r}, expected one of {', '.join(styles.words)}")
    own = [styles.of(caption) or "" for caption in captions]
    concept, style = [False] * len(captions), [False] * len(captions)
    for word in dict.fromkeys(own):
        rows = [i for i, other in enumerate(own) if other == word]
        candidates = list(dict.fromkeys(styles.put(caption, word) for caption in (*captions, *others)))
        places = [candidates.index(captions[i]) for i in rows]
        for i, hit in zip(rows, found_first(images[rows], texts(candidates), places), strict=True):
            concept[i] = hit
    for i, caption in enumerate(captions):
        scores = texts([styles.put(caption, word) for word in styles.words]) @ images[i]
        style[i] = styles.group(styles.words[int(scores.argmax())]) == styles.group(own[i])
    return StyleHits(tuple(concept), tuple(style))
