"""Restart: back up to a higher noise level with fresh noise, and down again, to take out the errors made before."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ldm.diffusion.samplers.heun import heun_step
from ldm.diffusion.samplers.step import Denoise, Noise, Step, fresh

if TYPE_CHECKING:
    from torch import Tensor


def restart(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    interval: tuple[float, float] = (0.1, 2.0),
    repeats: int = 1,
) -> Iterator[Step]:
    """Xu et al. 2023, Section 3, with Heun's method; their [t_min, t_max] is `interval`, their K is `repeats`.

    The levels of the grid that are nearest to the interval's ends bound it, and the levels between them are walked
    again: these steps are on top of the grid's.
    """
    places = _with_restarts(sigmas, interval, repeats)
    total = sum(1 for place, after in itertools.pairwise(places) if after > place)
    done = 0
    for place, after in itertools.pairwise(places):
        if after < place:
            x = x + fresh(noise, done, "restart", x) * (sigmas[after] ** 2 - sigmas[place] ** 2) ** 0.5
        else:
            x, x0 = heun_step(denoise, x, sigmas[place], sigmas[after])
            yield Step(done, total, sigmas[after], x, x0)
            done += 1


def _with_restarts(sigmas: Sequence[float], interval: tuple[float, float], repeats: int) -> list[int]:
    """The places in the grid that are visited, in order: down, and `repeats` times up and down between two of them."""
    positive = [place for place, sigma in enumerate(sigmas) if sigma > 0]
    low, high = (min(positive, key=lambda place: abs(sigmas[place] - end)) for end in interval)
    again = list(range(high, low + 1)) if high < low else []
    return [*range(low + 1), *again * repeats, *range(low + 1, len(sigmas))]
