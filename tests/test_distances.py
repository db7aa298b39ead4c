"""Distances between sets of features agree with closed forms, brute force and SciPy, and intervals with formulas."""

import numpy as np
import pytest
from scipy import linalg

from ldm.evaluation.distances import (
    Gaussian,
    frechet,
    frechet_distance,
    kernel_distance,
    mmd,
    root,
)
from ldm.evaluation.figures import Array, Share, half_error, of_mean, of_median


def covariance(width: int, seed: int) -> Array:
    """A covariance matrix whose eigenvectors are turned."""
    factor = np.random.default_rng(seed).normal(size=(width, width + 3))
    return np.asarray(factor @ factor.T / width)


def gaussian(mean: Array, of: Array) -> Gaussian:
    return Gaussian(mean, root(of))


def normal(count: int, of: Gaussian, seed: int) -> Array:
    """Features whose mean and covariance are exactly those of `of`."""
    drawn = np.random.default_rng(seed).normal(size=(count, len(of.mean)))
    drawn -= drawn.mean(axis=0)
    white = drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn, rowvar=False))).T
    return np.asarray(white @ of.factor + of.mean)


def test_frechet_of_axis_parallel_gaussians_is_the_closed_form() -> None:
    a = gaussian(np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 9.0]))
    b = gaussian(np.array([0.0, 2.0, 5.0]), np.diag([4.0, 4.0, 1.0]))
    assert frechet(a, b) == pytest.approx((1 + 0 + 4) + (1 + 0 + 4))  # |μ₁ − μ₂|² + Σ (σ₁ − σ₂)²


def test_frechet_of_turned_gaussians_is_scipys_matrix_root() -> None:
    first, second = covariance(6, 0), covariance(6, 1)
    a, b = gaussian(np.arange(6.0), first), gaussian(np.ones(6), second)
    between = np.trace(linalg.sqrtm(first @ second)).real
    wanted = np.square(a.mean - b.mean).sum() + np.trace(first + second) - 2 * between
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-9) == pytest.approx(frechet(b, a), rel=1e-9)


def test_frechet_of_fewer_pictures_than_features_is_the_nuclear_norm() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 12)), rng.normal(size=(7, 12)) + 1
    centred = [(x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    between = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()  # tr (Σ₁Σ₂)^½ = ‖A Bᵀ‖ of its values
    wanted = np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + sum(np.square(c).sum() for c in centred) - 2 * between
    assert frechet(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(wanted, rel=1e-6)


def test_the_number_of_pictures_decides_the_way_and_not_the_distance() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(9, 4)), rng.normal(size=(11, 4))
    spread = [np.cov(x, rowvar=False) for x in (a, b)]
    between = np.trace(linalg.sqrtm(spread[0] @ spread[1])).real
    wanted = np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + np.trace(spread[0] + spread[1]) - 2 * between
    there = Gaussian.of(b)
    assert there.shortened.factor.shape == (4, 4)
    assert (
        frechet(Gaussian.of(a), there)
        == pytest.approx(wanted)
        == pytest.approx(frechet(Gaussian.of(a), there.shortened))
    )


def test_frechet_of_features_with_known_moments() -> None:
    a = gaussian(np.zeros(4), covariance(4, 2))
    b = gaussian(np.full(4, 0.5), covariance(4, 2))
    found = frechet_distance(normal(60, a, 0), normal(40, b, 1))
    assert found.value == pytest.approx(1.0) and found.count == 60  # equal covariances: only the means count
    assert found.interval is not None and found.interval[0] < 1.0 < found.interval[1]
    same = normal(60, a, 0)
    assert frechet_distance(same, same).value == pytest.approx(0.0, abs=1e-9)


def test_mmd_is_the_sum_over_pairs() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))

    def k(x: Array, y: Array) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within = [np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
    assert mmd(a, b) == pytest.approx(sum(within) - 2 * np.mean([k(x, y) for x in a for y in b]))


def test_kernel_distance_of_two_points_is_known() -> None:
    found = kernel_distance(np.zeros((20, 2)), np.full((30, 2), 1.0))
    assert found.figure.value == pytest.approx(1 + 8 - 2) and found.deviation == pytest.approx(0) and found.size == 10


def test_kernel_distance_has_no_bias() -> None:
    rng = np.random.default_rng(0)
    values = [mmd(rng.normal(size=(12, 4)), rng.normal(size=(12, 4))) for _ in range(600)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(600)
    biased = [value + 2 * (1 - 1 / 12) for value in values]  # what counting a picture's pair with itself would add
    assert not abs(np.mean(biased)) < 3 * np.std(biased) / np.sqrt(600)


def test_too_few_pictures_are_refused() -> None:
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="at least 8 of each"):
            distance(np.zeros((7, 2)), np.zeros((20, 2)))


def test_error_from_halves_is_that_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(size=101)
    error = half_error(lambda kept: float(values[kept].mean()), 101, times=2000)
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(101), rel=0.05)


def test_interval_of_a_mean_is_students() -> None:
    found = of_mean([1.0, 2.0, 3.0])
    assert found.interval == pytest.approx((2 - 4.303 / np.sqrt(3), 2 + 4.303 / np.sqrt(3)), abs=1e-3)
    assert of_mean([1.0]).interval is None


def test_interval_of_a_median_holds_it() -> None:
    found = of_median(np.arange(101.0))
    assert found.value == 50 and found.interval is not None and 35 < found.interval[0] < 50 < found.interval[1] < 65
    assert of_median(np.full(9, 3.0)).interval == (3.0, 3.0)


def test_interval_of_a_share_is_wilsons() -> None:
    low, high = Share(50, 100).interval
    assert (low, high) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))
    assert Share(500, 500).interval[1] == pytest.approx(1.0)
