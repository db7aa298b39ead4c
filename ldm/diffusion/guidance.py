"""Guidance: what the network says with and without the prompt becomes one clean estimate that follows it more."""

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Denoiser


def guided(
    denoiser: Denoiser,
    positive: Float[Tensor, "b l d"],
    negative: Float[Tensor, "b l d"],
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    perp_neg: float = 0.0,
    empty: Float[Tensor, "b l d"] | None = None,
) -> Denoise:
    """Guidance as it is asked for: classifier-free, or with a weight `perp_neg` perpendicular to the negative prompt.

    Scale 1 is no guidance. There, and outside `interval`, estimates without the prompt are not computed.
    """
    with_prompt = prompted(denoiser, positive)
    if scale == 1.0:
        return with_prompt
    denoise = classifier_free(denoiser, positive, negative, scale, rescale)
    if perp_neg > 0.0:
        assert empty is not None, "Perp-Neg compares with the empty prompt"
        denoise = perpendicular_negative(denoiser, positive, negative, empty, scale, perp_neg, rescale)
    return denoise if interval is None else within(interval, denoise, with_prompt)


def prompted(denoiser: Denoiser, positive: Float[Tensor, "b l d"]) -> Denoise:
    """The clean estimate with the prompt, unguided."""
    return lambda x, sigma: denoiser(x, sigma, positive)


def classifier_free(
    denoiser: Denoiser,
    positive: Float[Tensor, "b l d"],
    negative: Float[Tensor, "b l d"],
    scale: float,
    rescale: float = 0.0,
) -> Denoise:
    """u + scale·(c − u), both in one call of the network (Ho & Salimans 2022, Equation 6); then `rescaled`."""
    both = torch.cat([negative, positive])

    def denoise(x: Tensor, sigma: float) -> Tensor:
        without, with_prompt = denoiser.output(x, sigma, both).chunk(2)
        output = without + scale * (with_prompt - without)
        return denoiser.clean(x, sigma, rescaled(output, with_prompt, rescale))

    return denoise


def perpendicular_negative(
    denoiser: Denoiser,
    positive: Float[Tensor, "b l d"],
    negative: Float[Tensor, "b l d"],
    empty: Float[Tensor, "b l d"],
    scale: float,
    weight: float,
    rescale: float = 0.0,
) -> Denoise:
    """Perp-Neg: only what the negative prompt adds at right angles to the prompt is avoided, `weight` times.

    ∅ + scale·(c − weight·n⊥) with c and n as differences from the empty prompt ∅ (Armandpour et al. 2023, Equation 8).
    """
    all_three = torch.cat([empty, negative, positive])

    def denoise(x: Tensor, sigma: float) -> Tensor:
        without, avoided, with_prompt = denoiser.output(x, sigma, all_three).chunk(3)
        wanted = with_prompt - without
        output = without + scale * (wanted - weight * perpendicular(avoided - without, wanted))
        return denoiser.clean(x, sigma, rescaled(output, with_prompt, rescale))

    return denoise


def within(interval: tuple[float, float], inside: Denoise, outside: Denoise) -> Denoise:
    """`inside` for low < σ ≤ high, where guidance helps, else `outside` (Kynkäänniemi et al. 2024, Equation 6)."""
    low, high = interval
    return lambda x, sigma: inside(x, sigma) if low < sigma <= high else outside(x, sigma)


def rescaled(
    output: Float[Tensor, "b c h w"], with_prompt: Float[Tensor, "b c h w"], share: float
) -> Float[Tensor, "b c h w"]:
    """`output` moved by `share` of the way to the standard deviation per image that it has with the prompt alone.

    Of what the network says, be it ε, v or x0 (Lin et al. 2024, Equations 15 and 16).
    """
    if share == 0.0:
        return output
    factor = with_prompt.std(dim=(1, 2, 3), keepdim=True) / output.std(dim=(1, 2, 3), keepdim=True)
    return output * (1.0 - share + share * factor)


def perpendicular(vector: Float[Tensor, "b c h w"], direction: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """The part of `vector` at right angles to `direction`, per image."""
    along = (vector * direction).sum(dim=(1, 2, 3), keepdim=True)
    length = direction.square().sum(dim=(1, 2, 3), keepdim=True)
    return vector - along / length.clamp(min=torch.finfo(length.dtype).tiny) * direction
