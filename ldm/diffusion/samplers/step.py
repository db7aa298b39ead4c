"""What samplers share: their types, what one remembers of a step, and how a step adds noise."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Denoise = Callable[["Tensor", float], "Tensor"]


class Noise(Protocol):
    """Where a sampler's noise comes from: keyed by the step and its purpose, or by an interval of noise levels."""

    def __call__(self, step: int, purpose: str) -> "Tensor":
        """Standard normal noise for one purpose of one step."""
        ...

    def between(self, sigma: float, sigma_next: float) -> "Tensor":
        """The increment of one Brownian path from `sigma` to `sigma_next`, divided by its standard deviation.

        Both levels are above 0. A walk with twice the steps gets parts of the same increments.
        """
        ...


@dataclass(frozen=True)
class Step:
    """One step done: `index` of `total` (from 0), the new state `x` at noise level `sigma`, and the clean estimate
    `denoised` that led there."""

    index: int
    total: int
    sigma: float
    x: "Tensor"
    denoised: "Tensor"


class Sampler(Protocol):
    """From x at noise level sigmas[0] to a latent at sigmas[-1], which is clean where that is 0."""

    def __call__(
        self, denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None
    ) -> Iterator[Step]:
        """Yield a Step for every step; the last has the result as `.x`."""
        ...


@dataclass(frozen=True)
class Method:
    """A sampler of the table: the generator, and what it claims of itself. The tests hold it to every claim."""

    walk: Sampler
    paper: str
    # Of convergence to the probability-flow ODE on fine grids, with the noise switched off (η = 0); None: not a solver
    # of that ODE with steps of its grid. A multistep method that starts by itself may have another one.
    order: int | None = None
    started_alone: int | None = None
    # Of the model, at every step but the closing one to σ = 0, which makes one; `warm_up` are those that come once
    # besides. None: as many as the picture needs.
    calls: int | None = 1
    warm_up: int = 0
    draws: Literal["nothing", "steps", "intervals"] = "nothing"
    # Whether it goes elsewhere than to the grid's levels, one after the other.
    own_levels: bool = False
    # Made for networks that were distilled for it: their estimate is where the trajectory ends, not a mean.
    distilled: bool = False
    aliases: tuple[str, ...] = ()

    def __call__(
        self, denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None
    ) -> Iterator[Step]:
        """The generator's steps, with its options at their defaults."""
        return self.walk(denoise, x, sigmas, noise)


@dataclass(frozen=True)
class Estimate:
    """What was asked at one noise level and answered: all that a multistep method remembers."""

    sigma: float
    x: "Tensor"
    x0: "Tensor"

    @property
    def slope(self) -> "Tensor":
        """dx/dσ of the probability-flow ODE, which is the noise ε in x = x0 + σ·ε."""
        return (self.x - self.x0) / self.sigma


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(σ_down, σ_up): go down to σ_down, add noise of σ_up, and arrive at σ_next = √(σ_down² + σ_up²).

    η = 1 is the variance of the true posterior q(x_next | x, x0), η = 0 adds none.
    """
    up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def fresh(noise: Noise | None, step: int, purpose: str, like: "Tensor") -> "Tensor":
    """Noise for this step on the device and in the dtype of `like`."""
    return moved(_given(noise)(step, purpose), like)


def increment(noise: Noise | None, sigma: float, sigma_next: float, like: "Tensor") -> "Tensor":
    """Brownian noise for this interval on the device and in the dtype of `like`."""
    return moved(_given(noise).between(sigma, sigma_next), like)


def moved(noise: "Tensor", like: "Tensor") -> "Tensor":
    """Noise on the device and in the dtype of `like`; a GPU is not waited for."""
    return (noise.pin_memory() if like.is_cuda else noise).to(like, non_blocking=True)


def _given(noise: Noise | None) -> Noise:
    if noise is None:
        raise ValueError("noise: this sampler draws noise at every step; pass a noise source")
    return noise
