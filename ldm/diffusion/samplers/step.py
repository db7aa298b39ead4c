"""What samplers share: their types, and the split of a step into a deterministic part and fresh noise."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Denoise = Callable[["Tensor", float], "Tensor"]
Noise = Callable[[int, str], "Tensor"]


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
    """From x at noise level sigmas[0] to a clean latent."""

    def __call__(
        self, denoise: Denoise, x: "Tensor", sigmas: Sequence[float], noise: Noise | None = None
    ) -> Iterator[Step]:
        """Yield a Step for every pair of neighbouring noise levels."""
        ...


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(σ_down, σ_up): go down to σ_down, add noise of σ_up, and arrive at σ_next = √(σ_down² + σ_up²).

    η = 1 is the variance of the true posterior q(x_next | x, x0), η = 0 adds none.
    """
    up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def fresh(noise: Noise | None, step: int, purpose: str, like: "Tensor") -> "Tensor":
    """Noise for this step on the device and in the dtype of `like`."""
    if noise is None:
        raise ValueError("noise: this sampler draws noise at every step; pass a noise source")
    return noise(step, purpose).to(like)
