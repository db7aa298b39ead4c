"""How far two sets of features lie apart: Fréchet's distance of their Gaussians, and the kernel distance."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ldm.evaluation.figures import Array, Figure, half_error, of_error

SUBSETS = 100
LARGEST_SUBSET = 1000
FEWEST = 8  # pictures of which half still says something


@dataclass(frozen=True)
class Gaussian:
    """A mean (d) and a factor (r d) of the covariance, which is factorᵀ · factor."""

    mean: Array
    factor: Array

    @classmethod
    def of(cls, features: Array) -> "Gaussian":
        """Mean and unbiased covariance of features (n d), in fp64; the factor has a row for each picture."""
        features = np.asarray(features, dtype=np.float64)
        mean = features.mean(axis=0)
        return cls(mean, (features - mean) / sqrt(len(features) - 1))

    @property
    def shortened(self) -> "Gaussian":
        """The same with no more rows than features."""
        rows, width = self.factor.shape
        return self if rows <= width else Gaussian(self.mean, root(self.factor.T @ self.factor))


def root(symmetric: Array) -> Array:
    """The square root of a positive semi-definite matrix, by its eigenvalues; those below zero are rounding."""
    values, vectors = np.linalg.eigh(symmetric)
    return np.asarray((vectors * np.sqrt(values.clip(0))) @ vectors.T)


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|μ₁ − μ₂|² + Tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) (Dowson & Landau 1982; Heusel et al. 2017, Equation 6).

    With Σ₁ = AᵀA and Σ₂ = BᵀB the last trace is that of (P Pᵀ)^½, P = B Aᵀ: the eigenvalues of a symmetric matrix,
    which is no larger than the number of pictures.
    """
    product = b.factor @ a.factor.T
    gram = product @ product.T if len(product) <= len(product.T) else product.T @ product
    between = np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum()
    apart = np.square(a.mean - b.mean).sum()
    return float(apart + np.square(a.factor).sum() + np.square(b.factor).sum() - 2 * between)


def frechet_distance(drawn: Array, real: Array) -> Figure:
    """Fréchet's distance of features (n d) and (m d); its interval holds the real ones fixed.

    Raises ValueError for fewer than FEWEST pictures on a side.
    """
    refuse_few(drawn, real)
    there = Gaussian.of(real).shortened
    error = half_error(lambda kept: frechet(Gaussian.of(drawn[kept]), there), len(drawn))
    return of_error(frechet(Gaussian.of(drawn), there), error, len(drawn))


def kernel(a: Array, b: Array) -> Array:
    """(x·y/d + 1)³ for every x of a and y of b (Bińkowski et al. 2018, Section 4)."""
    return np.asarray((a @ b.T / a.shape[1] + 1.0) ** 3)


def mmd(a: Array, b: Array) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of two sets (Gretton et al. 2012, Equation 3)."""
    of_a, of_b, between = kernel(a, a), kernel(b, b), kernel(a, b)
    n, m = len(a), len(b)
    within = (of_a.sum() - np.trace(of_a)) / (n * (n - 1)) + (of_b.sum() - np.trace(of_b)) / (m * (m - 1))
    return float(within - 2 * between.mean())


@dataclass(frozen=True)
class KernelDistance:
    """The kernel distance, and the deviation of its values over subsets of `size` pictures, which papers give."""

    figure: Figure
    deviation: float
    size: int


def kernel_distance(drawn: Array, real: Array, subsets: int = SUBSETS, seed: int = 0) -> KernelDistance:
    """KID: the mean of `mmd` over random subsets of both sets, of at most 1,000 pictures and half the smaller set.

    The estimate has no bias, so it is 0 on average for equal distributions, below it half of the time, and its value
    does not depend on the size of the subsets. Raises ValueError for fewer than FEWEST pictures on a side.
    """
    refuse_few(drawn, real)
    drawn, real = np.asarray(drawn, dtype=np.float64), np.asarray(real, dtype=np.float64)
    smaller = min(len(drawn), len(real))
    size = min(LARGEST_SUBSET, smaller // 2)
    rng = np.random.default_rng(seed)
    values = [
        mmd(drawn[rng.permutation(len(drawn))[:size]], real[rng.permutation(len(real))[:size]]) for _ in range(subsets)
    ]
    deviation = float(np.std(values, ddof=1))
    error = deviation * sqrt(size / (smaller - size))  # the jackknife of `half_error`
    return KernelDistance(of_error(float(np.mean(values)), error, len(drawn)), deviation, size)


def refuse_few(drawn: Array, real: Array) -> None:
    """Raise ValueError where half of a set says nothing."""
    if min(len(drawn), len(real)) < FEWEST:
        raise ValueError(f"got {len(drawn)} and {len(real)} pictures, expected at least {FEWEST} of each")
