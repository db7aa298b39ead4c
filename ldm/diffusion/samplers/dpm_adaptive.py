"""DPM-Solver with steps as long as an estimate of their error allows."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ldm.diffusion.samplers.dpm_solver import third
from ldm.diffusion.samplers.step import Denoise, Noise, Step

if TYPE_CHECKING:
    from torch import Tensor

# A walk this close to its end in λ is there.
ARRIVED = 1e-5


def dpm_adaptive(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    relative: float = 0.05,
    absolute: float = 0.0078,
    first_step: float = 0.05,
    safety: float = 0.81,
) -> Iterator[Step]:
    """Lu et al. 2022a, DPM-Solver-23, with the step control of k-diffusion's `sample_dpm_adaptive`.

    Of the grid it takes only the ends. Images of one batch share their steps, so here the batch matters. The `total` of
    a step is a guess until the last.
    """
    levels = [sigma for sigma in sigmas if sigma > 0]
    here, end = -math.log(levels[0]), -math.log(levels[-1])
    closing, done, h, previous = sigmas[-1] == 0, 0, first_step, x
    while end - here > ARRIVED:
        there = min(end, here + h)
        sigma, sigma_next = math.exp(-here), math.exp(-there)
        x0 = denoise(x, sigma)
        high, low = third(denoise, x, (x - x0) / sigma, sigma, sigma_next)
        tolerance = (relative * low.abs().maximum(previous.abs())).clamp(min=absolute)
        error = ((low - high) / tolerance).float().square().mean().sqrt().item()
        factor = 1.0 + math.atan((1.0 / (error + 1e-8)) ** (1 / 3) - 1.0)
        if not math.isfinite(error):  # shorter steps do not mend what the model says: go to the end, where it is seen
            factor, there = math.inf, end
        if factor >= safety:
            x, previous, here, done = high, low, there, done + 1
            left = (end - here) / (h * factor) if end - here > ARRIVED else 0.0
            yield Step(done - 1, done + math.ceil(left) + closing, sigma_next, x, x0)
        h = h * factor
    if closing:
        x = denoise(x, levels[-1])
        yield Step(done, done + 1, 0.0, x, x)
