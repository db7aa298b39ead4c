"""A UNet is asked what it predicts, where nothing else tells: ε or v.

At the last timestep a latent is almost nothing but noise. A network that predicts ε gives that noise back; one that
predicts v = √ᾱ ε − √(1−ᾱ) x0 (Salimans & Ho 2022, Appendix D) gives almost −x0, in which hardly any of it is.
"""

import torch
from torch import Tensor

from ldm.formats.evidence import Prediction
from ldm.models.unet import UNet

LAST_TIMESTEP = 999.0
# Pixels along a side of the latent; the cosine of noise with anything else is about 1/64 · 2.
SIDE = 32
ENOUGH = 0.5


@torch.inference_mode()
def ask(unet: UNet, text: Tensor) -> tuple[Prediction, str]:
    """What the UNet predicts, with the reason in words. `text` are the states (1 l d) of the empty prompt."""
    weight = unet.conv_in.weight
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, unet.config.out_channels, SIDE, SIDE), generator=generator).to(weight.device)
    # An inpainting UNet also reads a mask, here all of the picture, and the latent of what is not masked, here nothing.
    rest = torch.zeros((1, unet.config.in_channels - noise.shape[1], SIDE, SIDE), device=weight.device)
    rest[:, :1] = 1.0
    x = torch.cat([noise, rest], dim=1)
    t = torch.tensor([LAST_TIMESTEP], device=weight.device)
    answer = unet(x.to(weight.dtype), t, text.to(weight.device, weight.dtype)).float()
    likeness = float(torch.cosine_similarity(answer.flatten(), noise.flatten(), dim=0))
    prediction: Prediction = "eps" if likeness > ENOUGH else "v"
    verb = "gives back" if prediction == "eps" else "does not give back"
    return prediction, f"at t = 999 the UNet {verb} the noise it is shown (cosine {likeness:.2f})"
