"""What nearest neighbours tell of two sets of features: how true, how varied, and how copied the drawn pictures are."""

from dataclasses import dataclass

import numpy as np

from ldm.evaluation.figures import Array, Figure, Indices, Share, of_mean, of_share

NEIGHBOURS = 5  # of precision, recall, density and coverage, as their authors use them
NEXT = 50  # neighbours that the nearest one is held against
COPIED = 1 / 3  # the ratio below which a picture counts as a copy
BLOCK = 512  # rows of distances in memory at once


def distances(a: Array, b: Array) -> Array:
    """Euclidean distances (n m) of features (n d) and (m d)."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.sqrt(squares.clip(0)))


def radii(features: Array, k: int) -> Array:
    """The distance of each to its k-th nearest neighbour among the others."""
    found = np.empty(len(features))
    for first in range(0, len(features), BLOCK):
        rows = distances(features[first : first + BLOCK], features)
        rows[np.arange(len(rows)), np.arange(first, first + len(rows))] = np.inf  # itself
        found[first : first + BLOCK] = np.partition(rows, k - 1, axis=1)[:, k - 1]
    return found


@dataclass(frozen=True)
class Prdc:
    """Precision and density: how true drawn pictures are; recall and coverage: how much of the real ones they show."""

    precision: Figure
    recall: Figure
    density: Figure
    coverage: Figure


def prdc(drawn: Array, real: Array, k: int = NEIGHBOURS) -> Prdc:
    """The four of Naeem et al. 2020 (2002.09797, Sections 2 and 3) from features (n d) and (m d).

    A ball around each picture reaches to its k-th nearest neighbour of its own set. Precision: drawn pictures in a ball
    of a real one; recall: real ones in a ball of a drawn one (Kynkäänniemi et al. 2019); density: balls of real ones
    that a drawn one is in, divided by k; coverage: real ones with a drawn one in their ball. The intervals of recall
    and coverage are over the real pictures, the others' over the drawn ones; the other set is held fixed.
    Raises ValueError for sets of k pictures or fewer.
    """
    if min(len(drawn), len(real)) <= k:
        raise ValueError(f"got {len(drawn)} and {len(real)} pictures, expected more than {k} of each")
    around_drawn, around_real = radii(drawn, k), radii(real, k)
    balls = np.zeros(len(drawn))
    recalled = covered = 0
    for first in range(0, len(real), BLOCK):
        rows = distances(real[first : first + BLOCK], drawn)
        inside = rows < around_real[first : first + BLOCK, None]
        balls += inside.sum(axis=0)
        covered += int(inside.any(axis=1).sum())
        recalled += int((rows < around_drawn).any(axis=1).sum())
    return Prdc(
        of_share(Share(int((balls > 0).sum()), len(drawn))),
        of_share(Share(recalled, len(real))),
        of_mean(balls / k),
        of_share(Share(covered, len(real))),
    )


@dataclass(frozen=True)
class Copies:
    """For every picture the ratio below, and its nearest training picture's place."""

    ratios: Array
    nearest: Indices

    @property
    def copied(self) -> Share:
        """Those with a ratio below COPIED."""
        return Share(int((self.ratios < COPIED).sum()), len(self.ratios))


def copies(drawn: Array, trained: Array, following: int = NEXT) -> Copies:
    """d₁ / mean(d₂ … d₁₊ₖ): distance to the nearest training picture, relative to that of the k next ones.

    1 is a picture that lies no nearer to one training picture than to others, 0 a copy. With k = 1 below 1/3 it is the
    test of Yoon et al. 2023 ("Diffusion probabilistic models generalize when they fail to memorize"); Carlini et al.
    2023 (2301.13188, Section 5) hold it against the mean of 50, so that two training pictures that are alike do not
    hide a copy of both. Raises ValueError for too few training pictures.
    """
    if len(trained) <= following:
        raise ValueError(f"got {len(trained)} training pictures, expected more than {following}")
    ratios, nearest = np.empty(len(drawn)), np.empty(len(drawn), dtype=np.intp)
    for first in range(0, len(drawn), BLOCK):
        rows = distances(drawn[first : first + BLOCK], trained)
        near = np.argpartition(rows, following, axis=1)[:, : following + 1]
        near = np.take_along_axis(near, np.take_along_axis(rows, near, axis=1).argsort(axis=1, kind="stable"), axis=1)
        found = np.take_along_axis(rows, near, axis=1)
        rest = found[:, 1:].mean(axis=1)
        ratios[first : first + BLOCK] = np.divide(found[:, 0], rest, out=np.zeros(len(rest)), where=rest > 0)
        nearest[first : first + BLOCK] = near[:, 0]
    return Copies(ratios, nearest)
