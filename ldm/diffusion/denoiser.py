"""A network and what it predicts become the clean estimate of a noisy latent, and a training loss."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldm.diffusion.forward import alphas_cumprod_at, diffuse
from ldm.diffusion.schedule import NoiseSchedule

Prediction = Literal["eps", "v", "x0"]


@runtime_checkable
class Network(Protocol):
    """What the mathematics knows of the UNet."""

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """A prediction (b c h w) for noisy latents (b c h w) of unit variance at timesteps (b,)."""
        ...


@runtime_checkable
class Denoise(Protocol):
    """The waist of the hourglass: all that a sampler knows of a model."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The clean estimate x0 of x = x0 + σ·noise."""
        ...


@dataclass(frozen=True)
class Denoiser:
    """A network, its noise schedule and its parameterisation. Prepare the network for many GPUs first, then wrap it."""

    network: Network
    schedule: NoiseSchedule
    prediction: Prediction = "eps"
    dtype: torch.dtype = torch.float32

    def __call__(
        self, x: Float[Tensor, "b c h w"], sigma: float, text: Float[Tensor, "b l d"]
    ) -> Float[Tensor, "b c h w"]:
        """The clean estimate of x = x0 + σ·noise, in the dtype of x.

        ε: x0 = x − σ ε.   v = √ᾱ ε − √(1−ᾱ) x0: x0 = x/(1+σ²) − σ/√(1+σ²) v (Salimans & Ho 2022, Appendix D).
        """
        scale = (1.0 + sigma * sigma) ** 0.5
        t = torch.full((x.shape[0],), self.schedule.timestep(sigma), dtype=torch.float32, device=x.device)
        output = self.network((x / scale).to(self.dtype), t, text.to(self.dtype)).to(x.dtype)
        if self.prediction == "eps":
            return x - sigma * output
        if self.prediction == "v":
            return x / scale**2 - (sigma / scale) * output
        return output

    def loss(
        self,
        x0: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b l d"],
        min_snr_gamma: float | None = None,
    ) -> Float[Tensor, " b"]:
        """Squared error of the prediction per image (for ε: Ho et al. 2020, Equation 14).

        `min_snr_gamma` weights it by min(SNR, γ)/SNR for ε, /(SNR+1) for v, min(SNR, γ) for x0 (2303.09556).
        """
        output = self.network(diffuse(self.schedule, x0, t, noise), t.float(), text).float()
        error = (output - self.target(x0, noise, t)).square().mean(dim=(1, 2, 3))
        if min_snr_gamma is None:
            return error
        alpha = alphas_cumprod_at(self.schedule, t, x0)[:, 0, 0, 0]
        snr = alpha / (1.0 - alpha)
        divisor = {"eps": snr, "v": snr + 1.0, "x0": torch.ones_like(snr)}[self.prediction]
        return error * snr.clamp(max=min_snr_gamma) / divisor

    def target(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """What the network should say at timesteps t."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return x0
        alpha = alphas_cumprod_at(self.schedule, t, x0)
        return alpha.sqrt() * noise - (1.0 - alpha).sqrt() * x0
