"""A figure says how sure it is: a value with its 95 % interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

NORMAL = 1.96  # deviations of a normal distribution that hold 95 %
HALVES = 50  # random halves from which a standard error is taken


@dataclass(frozen=True)
class Share:
    """`right` of `total`, with the 95 % interval of the share (Wilson 1927)."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """The share as a fraction."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval."""
        z, n, p = NORMAL, self.total, self.share
        centre, spread = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.1f} % ({self.right} of {self.total}; 95 %: {100 * low:.1f} to {100 * high:.1f})"


@dataclass(frozen=True)
class Figure:
    """A value over `count` pictures, and its 95 % interval where so few pictures have one."""

    value: float
    interval: tuple[float, float] | None
    count: int


def of_share(share: Share) -> Figure:
    """A share as a fraction."""
    return Figure(share.share, share.interval, share.total)


def of_mean(values: Sequence[float] | Array) -> Figure:
    """The mean of one value for each picture, with Student's interval."""
    from scipy.special import stdtrit

    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Figure(mean, None, count)
    spread = float(stdtrit(count - 1, 0.975) * np.std(values, ddof=1)) / sqrt(count)
    return Figure(mean, (mean - spread, mean + spread), count)


def of_median(values: Sequence[float] | Array, seed: int = 0, times: int = 1000) -> Figure:
    """The median of one value for each picture, with the bootstrap's interval (Efron 1979, percentiles)."""
    found = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(found), size=(times, len(found)))
    low, high = np.quantile(np.median(found[drawn], axis=1), [0.025, 0.975])
    return Figure(float(np.median(found)), (float(low), float(high)), len(found))


def half_error(statistic: Callable[[Indices], float], count: int, seed: int = 0, times: int = HALVES) -> float:
    """The standard error of a statistic of `count` pictures, from its values on random halves of them.

    The jackknife that leaves out d = n/2 (Shao & Wu 1989): variance over the subsets times (n − d)/d. The bootstrap
    would not do for a distance between sets: with pictures drawn twice, a set varies less than it does.
    """
    rng, kept = np.random.default_rng(seed), count // 2
    values = [statistic(rng.permutation(count)[:kept]) for _ in range(times)]
    return float(np.std(values, ddof=1)) * sqrt(kept / (count - kept))


def of_error(value: float, error: float, count: int) -> Figure:
    """A value with the interval of a normal distribution."""
    return Figure(value, (value - NORMAL * error, value + NORMAL * error), count)
