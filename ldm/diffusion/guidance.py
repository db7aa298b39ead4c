"""Guidance: two clean estimates, with and without the prompt, become one that follows the prompt more."""

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Denoiser


def guided(
    denoiser: Denoiser, positive: Float[Tensor, "b l d"], negative: Float[Tensor, "b l d"], scale: float
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022, Equation 6): u + scale·(c − u), both in one call of the network.

    Scale 1 is no guidance, and then the estimate without the prompt is not computed.
    """
    if scale == 1.0:
        return lambda x, sigma: denoiser(x, sigma, positive)
    both = torch.cat([negative, positive])

    def denoise(x: Tensor, sigma: float) -> Tensor:
        without, with_prompt = denoiser(torch.cat([x, x]), sigma, both).chunk(2)
        return without + scale * (with_prompt - without)

    return denoise
