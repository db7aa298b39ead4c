"""A Brownian path that may be asked for any interval in any order, since nothing of it is stored but a key.

Its clock is u = 1/σ². In it the noise that ancestral steps and DPM-Solver++ of an SDE add is a plain sum: x/σ² grows by
W(u') − W(u), so that two half steps add the noise of the whole one.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

# An interval between two powers of two of the clock is halved so often; σ is then exact to 4 parts in a million.
HALVINGS = 17


class BrownianPath:
    """A path W(1/σ²) of tensors. `normal(node)` has to be standard normal noise, and a function of the node alone."""

    def __init__(self, normal: Callable[[str], Float[Tensor, "..."]]) -> None:
        self.normal = normal

    def between(self, sigma: float, sigma_next: float) -> Float[Tensor, "..."]:
        """The increment from σ to σ_next divided by its standard deviation; with the opposite sign backwards."""
        start, end = place(sigma), place(sigma_next)
        if start == end:
            raise ValueError(f"noise: the levels {sigma} and {sigma_next} are too close; use a grid of fewer steps")
        if start > end:
            return -self.between(sigma_next, sigma)
        return (self._increment(start, end) / (clock(end) - clock(start)) ** 0.5).float()

    def _increment(self, start: tuple[int, int], end: tuple[int, int]) -> Tensor:
        """W(end) − W(start): what is left of the first octave, whole octaves, and the beginning of the last."""
        increment = self._inside(*end) - self._inside(*start)
        for octave in range(start[0], end[0]):
            increment = increment + self._whole(octave)
        return increment

    def _whole(self, octave: int) -> Tensor:
        """The increment from 2^octave to 2^(octave + 1)."""
        return self.normal(f"{octave}").double() * 2.0 ** (octave / 2)

    def _inside(self, octave: int, position: int) -> Tensor:
        """The increment from 2^octave to a position inside the octave, by halving it: Lévy's construction."""
        at_low = torch.zeros((), dtype=torch.float64)
        if position == 0:
            return at_low
        low, high, length = 0, 2**HALVINGS, 2.0**octave
        at_high = self._whole(octave)
        while True:
            middle = (low + high) // 2
            value = (at_low + at_high) / 2 + self.normal(f"{octave}/{low}-{high}").double() * (length / 4) ** 0.5
            if position == middle:
                return value
            if position < middle:
                high, at_high = middle, value
            else:
                low, at_low = middle, value
            length /= 2


def place(sigma: float) -> tuple[int, int]:
    """Octave and position in it of 1/σ², rounded to the positions there are."""
    if sigma <= 0.0:
        raise ValueError(f"noise: {sigma} is no level that a Brownian path has; no noise is added on the way to 0")
    mantissa, exponent = math.frexp(sigma**-2)
    position = round((2.0 * mantissa - 1.0) * 2**HALVINGS)
    return (exponent - 1, position) if position < 2**HALVINGS else (exponent, 0)


def clock(where: tuple[int, int]) -> float:
    """1/σ² of a place."""
    octave, position = where
    return 2.0**octave * (1.0 + position / 2**HALVINGS)
