"""Adams' idea, on which multistep methods rest: integrate the polynomial through a function's last known values."""

import math
from collections.abc import Callable, Sequence
from functools import cache


@cache
def rule() -> list[tuple[float, float]]:
    """Points and shares of Gauss and Legendre on [−1, 1], exact to degree 15, and to rounding for these times exp."""
    from numpy.polynomial.legendre import leggauss  # `--help` does without NumPy

    points, shares = leggauss(8)
    return list(zip(points.tolist(), shares.tolist(), strict=True))


def adams_weights(
    nodes: Sequence[float], start: float, end: float, factor: Callable[[float], float] = lambda t: 1.0
) -> list[float]:
    """The wⱼ with ∫ factor(t)·P(t) dt = Σ wⱼ·P(nodes[j]) from start to end, if P's degree is less than len(nodes)."""
    weights = [0.0] * len(nodes)
    for point, share in rule():
        t = start + (end - start) * (1.0 + point) / 2
        measure = share * (end - start) / 2 * factor(t)
        for j, node in enumerate(nodes):
            others = [other for k, other in enumerate(nodes) if k != j]
            weights[j] += measure * math.prod((t - other) / (node - other) for other in others)
    return weights
