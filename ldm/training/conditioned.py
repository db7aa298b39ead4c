"""Text tower and UNet in one module, so that both can learn from the error of a picture."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.models.text import ClipTextEncoder, TextEncoder
from ldm.models.unet import UNet

REMEMBERED = 2**17  # captions

Condition = Callable[[Sequence[str]], Float[Tensor, "b l d"]]
"""What a network is given for prompts: their text states, or their token ids where it reads them itself."""


class Conditioned(nn.Module):
    """Called as a UNet, with token ids (b l 1) in place of text states.

    Training both together is how latent diffusion's first text-to-image model was made (Rombach et al. 2022, Section
    3.3); Stable Diffusion's tower came from CLIP and stayed as it was.
    """

    def __init__(self, text: ClipTextEncoder, unet: UNet) -> None:
        super().__init__()
        self.text = without_idle_block(text)
        self.unet = unet

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], ids: Float[Tensor, "b l 1"]
    ) -> Float[Tensor, "b c h w"]:
        states, _ = self.text(ids[..., 0].long())
        return self.unet(x, t, states)


def without_idle_block(text: ClipTextEncoder) -> ClipTextEncoder:
    """The tower, whose last block does not learn where the states in front of it are read: no gradient comes there.

    DDP waits for the gradients of all that learns.
    """
    if text.config.hidden == "penultimate":
        text.tower.transformer.resblocks[-1].requires_grad_(False)
    return text


def text_states(text: TextEncoder, dtype: torch.dtype) -> Condition:
    """What a UNet by itself is given."""
    return lambda prompts: text.encode(prompts).tokens.to(dtype)


def token_ids(text: ClipTextEncoder) -> Condition:
    """What `Conditioned` is given: ids as fp32, in which those of every vocabulary are exact."""
    return lambda prompts: text.tokenize(prompts)[..., None].float()


def remembered_ids(text: ClipTextEncoder) -> Callable[[str], Int[Tensor, " l"]]:
    """Token ids of a caption. Captions come again; taking one apart takes longer than a GPU's share of a step."""
    return lru_cache(REMEMBERED)(lambda caption: text.tokenize([caption])[0])
