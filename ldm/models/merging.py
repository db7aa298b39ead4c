"""A UNet that merges tokens in its finest self-attention, where there are the most of them.

Source: Bolya & Hoffman 2023, Section 4. The picture changes: `benchmark.py --only options` says how much.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from ldm.models.unet import UNet


class MergingUNet:
    """`network`, which is `unet` or asks it, with a `share` of the tokens merged; who asks `unet` itself has all."""

    def __init__(self, network: Callable[[Tensor, Tensor, Tensor], Tensor], unet: UNet, share: float) -> None:
        self.network = network
        self.share = share
        self.transformers = unet.finest_transformers()

    def __call__(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], context: Float[Tensor, "k l width"]
    ) -> Float[Tensor, "k out h w"]:
        """As the UNet's own."""
        for transformer in self.transformers:
            transformer.merged = self.share
        try:
            return self.network(x, t, context)
        finally:
            for transformer in self.transformers:
                transformer.merged = 0.0
