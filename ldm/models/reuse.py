"""A UNet that is asked in full only now and then: in between, the coarse levels say what they said last time.

Source: DeepCache (Ma et al. 2024, Section 3.2). The picture changes: `benchmark.py --only options` says how much.
"""

from jaxtyping import Float
from torch import Tensor

from ldm.models.unet import DownLevel, UNet, UpLevel


class ReusingUNet:
    """`unet`, in full at every `every`-th call; in between only its finest blocks, from conv_in on and back."""

    def __init__(self, unet: UNet, every: int) -> None:
        self.unet = unet
        self.every = every
        self._calls = 0
        self._coarse: Tensor | None = None

    def __call__(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], context: Float[Tensor, "k l width"]
    ) -> Float[Tensor, "k out h w"]:
        """As the UNet's own; a call for another number of texts or images is one in full."""
        kept, self._calls = self._coarse, self._calls + 1
        if kept is None or len(kept) != len(context) or self._calls > self.every:
            self._calls = 1
            said = self.unet(x, t, context, self._keep)
            # Not in `_keep`, which is compiled with the network: its next answer may lie where this one does.
            self._coarse = None if self._coarse is None else self._coarse.clone()
            return said
        first, last = self.unet.down_blocks[0], self.unet.up_blocks[-1]
        assert isinstance(first, DownLevel) and isinstance(last, UpLevel)
        time = self.unet.embedded(t, x)
        start = self.unet.conv_in(x)
        fine = first.block(0, start, time, context)
        return self.unet.said(last.finest(kept, time, context, [start, fine]))

    def _keep(self, coarse: Tensor) -> None:
        self._coarse = coarse
