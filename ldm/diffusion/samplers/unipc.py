"""UniPC: a multistep predictor, whose next clean estimate also corrects the step that it came from, at no call more."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from ldm.diffusion.samplers.adams import adams_weights
from ldm.diffusion.samplers.step import Denoise, Estimate, Noise, Step

if TYPE_CHECKING:
    from torch import Tensor

Variant = Literal["bh1", "bh2"]


def unipc(
    denoise: Denoise,
    x: "Tensor",
    sigmas: Sequence[float],
    noise: Noise | None = None,
    order: int = 2,
    variant: Variant = "bh2",
    lower_order_final: bool = False,
    before: Sequence[Estimate] = (),
) -> Iterator[Step]:
    """Zhao et al. 2023, Algorithms 1 and 2 for data prediction: UniP-p, then UniC-p wherever a next estimate is made.

    The authors use p = 2 with guidance and 3 without. `variant` is their B(h): h or eʰ − 1. `lower_order_final` lowers
    the order of the last steps down to 1, as their code and diffusers do. `before` are estimates from above sigmas[0],
    newest last; without them the order grows from 1.
    """
    total = len(sigmas) - 1
    past = [*before, Estimate(sigmas[0], x, denoise(x, sigmas[0]))]
    for i, sigma_next in enumerate(sigmas[1:]):
        past = past[-min(order, total - i) if lower_order_final else -order :]
        x0 = past[-1].x0
        if sigma_next == 0:
            x = x0
        else:
            predicted = _predicted(x, past, sigma_next, variant)
            if i + 1 < total:
                ahead = Estimate(sigma_next, predicted, denoise(predicted, sigma_next))
                x, past = _corrected(x, past, ahead, variant), [*past, ahead]
            else:
                x = predicted
        yield Step(i, total, sigma_next, x, x0)


def _predicted(x: "Tensor", past: Sequence[Estimate], sigma_next: float, variant: Variant) -> "Tensor":
    """UniP-p. For p = 2 the authors take the weight ½ instead of solving for it, and B(h) matters."""
    if len(past) != 2:
        return _integrated(x, past[-1].sigma, sigma_next, past)
    last, here = past
    r = math.log(last.sigma / here.sigma) / math.log(here.sigma / sigma_next)
    difference = (here.x0 - last.x0) / r
    return _integrated(x, here.sigma, sigma_next, [here]) + _b(here.sigma, sigma_next, variant) / 2 * difference


def _corrected(x: "Tensor", past: Sequence[Estimate], ahead: Estimate, variant: Variant) -> "Tensor":
    """UniC-p. For p = 1 the weight is ½ again."""
    here = past[-1]
    if len(past) > 1:
        return _integrated(x, here.sigma, ahead.sigma, [*past, ahead])
    return _integrated(x, here.sigma, ahead.sigma, past) + _b(here.sigma, ahead.sigma, variant) / 2 * (
        ahead.x0 - here.x0
    )


def _integrated(x: "Tensor", sigma: float, sigma_next: float, through: Sequence[Estimate]) -> "Tensor":
    """The exact step for a clean estimate that is the polynomial in λ = −log σ through these.

    This is what the authors' linear system for their weights says; B(h) cancels in it.
    """
    start, end = -math.log(sigma), -math.log(sigma_next)
    nodes = [-math.log(known.sigma) for known in through]
    weights = adams_weights(nodes, start, end, lambda t: math.exp(t - end))
    terms = [weight * known.x0 for weight, known in zip(weights, through, strict=True)]
    return sum(terms, start=(sigma_next / sigma) * x)


def _b(sigma: float, sigma_next: float, variant: Variant) -> float:
    """B(h) with the sign that makes it positive: h, or 1 − e⁻ʰ."""
    return math.log(sigma / sigma_next) if variant == "bh1" else 1.0 - sigma_next / sigma
