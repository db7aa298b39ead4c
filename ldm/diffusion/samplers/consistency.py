"""Few-step samplers for networks that were distilled to look all the way down the trajectory."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ldm.diffusion.samplers.step import Denoise, Noise, Step, fresh

if TYPE_CHECKING:
    from torch import Tensor


def lcm(denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None) -> Iterator[Step]:
    """Luo et al. 2023, by multistep consistency sampling (Song et al. 2023, Algorithm 1): x ← x0 + σ'·z.

    c_skip and c_out, which the papers mix x and x0 with, are 0 and 1 to five digits at every level that is visited.
    """
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x = x0 = denoise(x, sigma)
        if sigma_next > 0:
            x = x0 + fresh(noise, i, "lcm", x) * sigma_next
        yield Step(i, total, sigma_next, x, x0)


def tcd(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    gamma: float = 0.3,
    earlier: Callable[[float], float] | None = None,
) -> Iterator[Step]:
    """Strategic stochastic sampling (Zheng et al. 2024, Algorithm 4): down to an earlier level than σ', noise up to σ'.

    `earlier` finds the level at (1 − γ) times the time of σ'. Without it, time is σ itself. γ = 0 is DDIM, 1 is `lcm`.
    """
    total = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        down = (1.0 - gamma) * sigma_next if earlier is None else earlier(sigma_next)
        x0 = denoise(x, sigma)
        x = x0 + (down / sigma) * (x - x0)
        if down < sigma_next:
            x = x + fresh(noise, i, "tcd", x) * (sigma_next**2 - down**2) ** 0.5
        yield Step(i, total, sigma_next, x, x0)
