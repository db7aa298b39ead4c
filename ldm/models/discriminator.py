"""A discriminator of patches: which parts of an image are real, as one number for each of them."""

from jaxtyping import Float
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from ldm.config import Config


class DiscriminatorConfig(Config):
    """Shape of the discriminator; with 3 layers a patch is 70×70 pixels, as in pix2pix and latent diffusion."""

    channels: PositiveInt = 64
    layers: PositiveInt = 3
    groups: PositiveInt = 32

    @model_validator(mode="after")
    def _consistent(self) -> "DiscriminatorConfig":
        if self.channels % self.groups:
            raise ValueError(f"channels {self.channels} is not a multiple of the {self.groups} norm groups")
        return self


class PatchDiscriminator(nn.Module):
    """Strided convolutions to a map of logits: above 0 for patches that look real.

    Source: Isola et al. 2017, Section 6.1.2. Normalised by groups instead of by batch, so that a verdict depends on
    its own image only, whatever the number of processes.
    """

    def __init__(self, config: DiscriminatorConfig, image_channels: int = 3) -> None:
        super().__init__()
        widths = [config.channels * min(2**level, 8) for level in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, config.layers + 1):
            stride = 2 if level < config.layers else 1
            layers += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(config.groups, widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        return self.layers(image)
