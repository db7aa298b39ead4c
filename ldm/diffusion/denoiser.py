"""A network and what it predicts become the clean estimate of a noisy latent, and a training loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        """A prediction for noisy latents (b c h w) of unit variance at timesteps (b,), one for each text.

        With several texts for every latent, the first text of all latents comes first, in `context` and the result.
        """
        ...


@runtime_checkable
class Denoise(Protocol):
    """The waist of the hourglass: all that a sampler knows of a model."""

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The clean estimate x0 of x = x0 + σ·noise."""
        ...


@dataclass(frozen=True)
class Denoiser:
    """A network, its noise schedule and its parameterisation. Prepare the network for many GPUs first, then wrap it.

    `told` are noise levels at which the network is told another timestep than the schedule's, because a program rounds.
    """

    network: Network
    schedule: NoiseSchedule
    prediction: Prediction = "eps"
    dtype: torch.dtype = torch.float32
    told: Mapping[float, float] = field(default_factory=dict)

    def __call__(
        self, x: Float[Tensor, "b c h w"], sigma: float, text: Float[Tensor, "b l d"]
    ) -> Float[Tensor, "b c h w"]:
        """The clean estimate of x = x0 + σ·noise, in the dtype of x."""
        return self.clean(x, sigma, self.output(x, sigma, text))

    def output(
        self, x: Float[Tensor, "b c h w"], sigma: float, text: Float[Tensor, "k l d"]
    ) -> Float[Tensor, "k c h w"]:
        """What the network says of x = x0 + σ·noise, in the dtype of x, for each text of every latent."""
        timestep = self.told.get(sigma, self.schedule.timestep(sigma))
        t = torch.full((x.shape[0],), timestep, dtype=torch.float32, device=x.device)
        scaled = (x / (1.0 + sigma * sigma) ** 0.5).to(self.dtype)
        # A copy: the next answer of a compiled network may lie where this one does.
        return self.network(scaled, t, text.to(self.dtype)).to(x.dtype, copy=True)

    def clean(
        self, x: Float[Tensor, "b c h w"], sigma: float, output: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """The clean estimate that an output of the network means.

        ε: x0 = x − σ ε.   v = √ᾱ ε − √(1−ᾱ) x0: x0 = x/(1+σ²) − σ/√(1+σ²) v (Salimans & Ho 2022, Appendix D).
        """
        scale = (1.0 + sigma * sigma) ** 0.5
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
        debiased: bool = False,
    ) -> Float[Tensor, " b"]:
        """Squared error of the prediction per image (for ε: Ho et al. 2020, Equation 14).

        `min_snr_gamma` weights the error of x0 by min(SNR, γ) (2303.09556), `debiased` by √SNR (2310.08442); one of x0
        is one of ε divided by SNR, and one of v divided by SNR + 1.
        """
        output = self.network(diffuse(self.schedule, x0, t, noise), t.float(), text).float()
        error = (output - self.target(x0, noise, t)).square().mean(dim=(1, 2, 3))
        if min_snr_gamma is None and not debiased:
            return error
        alpha = alphas_cumprod_at(self.schedule, t, x0)[:, 0, 0, 0]
        snr = alpha / (1.0 - alpha)
        divisor = {"eps": snr, "v": snr + 1.0, "x0": torch.ones_like(snr)}[self.prediction]
        weight = snr.sqrt() if debiased else snr.clamp(max=min_snr_gamma)
        return error * weight / divisor

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


def one_by_one(denoises: Sequence[Denoise]) -> Denoise:
    """A clean estimate for each image of a batch in a call of its own: bit for bit the one it has alone."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return torch.cat([alone(image, sigma) for alone, image in zip(denoises, x.split(1), strict=True)])

    return denoise
