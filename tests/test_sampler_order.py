"""Every sampler that claims an order of convergence has it, against the probability-flow ODE of a Gaussian mixture.

The levels lie between two above 0, before the closing step, and any noise is switched off (η = 0).
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ldm.diffusion.samplers import SAMPLERS, Estimate, Step
from ldm.diffusion.samplers.dpm_solver import dpm_fast
from ldm.diffusion.samplers.dpmpp import dpmpp_2m_sde, dpmpp_3m_sde
from ldm.diffusion.samplers.euler import euler
from ldm.diffusion.samplers.linear_multistep import deis, ipndm, lms
from ldm.diffusion.samplers.unipc import unipc

Array = NDArray[np.float64]  # samplers are arithmetic: they walk arrays as they walk tensors
Walk = Callable[..., Iterator[Step]]

HIGH, LOW = 5.0, 0.2
START = np.linspace(-7.5, 7.5, 13)
SHARES, MEANS, VARIANCES = np.array([0.3, 0.5, 0.2]), np.array([-1.2, 0.4, 1.5]), np.array([0.25, 0.12, 0.2])


def mixture(x: Array, sigma: float) -> Array:
    """The exact clean estimate where the data are a mixture of three Gaussians."""
    spread = VARIANCES + sigma**2
    logits = np.log(SHARES) - np.log(spread) / 2 - (x[:, None] - MEANS) ** 2 / (2 * spread)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    means = (VARIANCES * x[:, None] + sigma**2 * MEANS) / spread
    return np.asarray((shares * means).sum(axis=1) / shares.sum(axis=1))


def reference(x: Array, sigma: float, sigma_next: float, steps: int) -> Array:
    """The ODE solved by the classic Runge–Kutta method in log σ, where it reads dx/d(log σ) = x − x0."""
    h = math.log(sigma_next / sigma) / steps
    for i in range(steps):
        at = [sigma * math.exp(h * (i + part)) for part in (0.0, 0.5, 1.0)]
        k1 = x - mixture(x, at[0])
        k2 = (x + h / 2 * k1) - mixture(x + h / 2 * k1, at[1])
        k3 = (x + h / 2 * k2) - mixture(x + h / 2 * k2, at[1])
        k4 = (x + h * k3) - mixture(x + h * k3, at[2])
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@functools.cache
def answer() -> Array:
    return reference(START, HIGH, LOW, 4000)


def levels(steps: int) -> list[float]:
    """Karras et al. 2022, Equation 5."""
    return [float(root**7) for root in np.linspace(HIGH ** (1 / 7), LOW ** (1 / 7), steps + 1)]


def error(walk: Walk, sigmas: Sequence[float], x: Array, **options: Any) -> float:
    if "eta" in inspect.signature(walk).parameters:
        options["eta"] = 0.0
    found = list(walk(mixture, x, sigmas, None, **options))[-1].x
    return float(np.abs(found - answer()).max())


def alone(walk: Walk, steps: int, **options: Any) -> float:
    """The error of a walk that starts by itself."""
    return error(walk, levels(steps), START, **options)


def continued(walk: Walk, steps: int, **options: Any) -> float:
    """The error of a walk that goes on from three steps of the reference."""
    sigmas, x, before = levels(steps), START, []
    for sigma, sigma_next in itertools.pairwise(sigmas[:4]):
        before.append(Estimate(sigma, x, mixture(x, sigma)))
        x = reference(x, sigma, sigma_next, 40)
    return error(walk, sigmas[3:], x, before=before, **options)


def observed(measure: Callable[..., float], walk: Walk, **options: Any) -> float:
    """The order of convergence from 128 steps to 256."""
    return math.log2(measure(walk, 128, **options) / measure(walk, 256, **options))


@pytest.mark.parametrize("name", [name for name, method in SAMPLERS.items() if method.order])
def test_order_is_as_claimed(name: str) -> None:
    method = SAMPLERS[name]
    if "before" in inspect.signature(method.walk).parameters:
        assert observed(continued, method.walk) == pytest.approx(method.order, abs=0.15)
    assert observed(alone, method.walk) == pytest.approx(method.started_alone or method.order, abs=0.15)


@pytest.mark.parametrize(
    ("walk", "options", "order"),
    [
        (lms, {"order": 1}, 1),
        (lms, {"order": 2}, 2),
        (lms, {"order": 3}, 3),
        (deis, {"order": 1}, 1),
        (deis, {"order": 2}, 2),
        (unipc, {"order": 1, "variant": "bh1"}, 2),
        (unipc, {"order": 1, "variant": "bh2"}, 2),
        (unipc, {"order": 2, "variant": "bh1"}, 3),
        (unipc, {"order": 3}, 4),
        (dpmpp_2m_sde, {"solver": "heun"}, 2),
        (dpmpp_3m_sde, {"bend": 1.0}, 3),
    ],
)
def test_order_with_options(walk: Walk, options: dict[str, Any], order: int) -> None:
    assert observed(continued, walk, **options) == pytest.approx(order, abs=0.15)


def test_fixed_weights_have_order_four_on_a_grid_even_in_sigma() -> None:
    """Only there are Adams–Bashforth's weights for even steps the right ones."""
    errors = []
    for steps in (64, 128):
        sigmas = [2.0 - i / steps for i in range(steps + 1)]
        x, before = START, []
        for sigma, sigma_next in itertools.pairwise(sigmas[:4]):
            before.append(Estimate(sigma, x, mixture(x, sigma)))
            x = reference(x, sigma, sigma_next, 10)
        found = list(ipndm(mixture, x, sigmas[3:], before=before))[-1].x
        errors.append(float(np.abs(found - reference(x, sigmas[3], 1.0, 400)).max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4.0, abs=0.15)


def test_fast_beats_euler_at_the_same_number_of_calls() -> None:
    for calls in (12, 13, 14):
        assert alone(dpm_fast, calls) < alone(euler, calls) / 3


def test_a_lower_order_at_the_end_shows() -> None:
    assert alone(unipc, 128, lower_order_final=True) > 3 * alone(unipc, 128)
    assert alone(deis, 14, lower_order_final=True) != alone(deis, 14)
    assert alone(deis, 15, lower_order_final=True) == alone(deis, 15), "diffusers lowers it below 15 steps only"
