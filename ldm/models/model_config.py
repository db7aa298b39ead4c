"""The parts of a latent-diffusion model together, and the checks that they fit one another."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ldm.config import Config
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig, KLAutoencoder, PixelAutoencoder, PixelConfig
from ldm.models.text import ClipTextConfig, ClipTextEncoder, LabelConfig, LabelEncoder, TextEncoder
from ldm.models.unet import UNet, UNetConfig


class NoiseScheduleConfig(Config):
    """β over `timesteps` steps: linear (DDPM), or linear in √β (latent diffusion's, "scaled_linear").

    "scaled_linear_zero_snr" is the latter rescaled to end in pure noise, for networks that predict v or x0.
    """

    kind: Literal["scaled_linear", "linear", "scaled_linear_zero_snr"] = "scaled_linear"
    beta_start: PositiveFloat = 0.00085
    beta_end: float = Field(default=0.012, gt=0, lt=1)
    timesteps: PositiveInt = 1000


class SamplingDefaults(Config):
    """What a picture is drawn with where the user asks for nothing else."""

    width: PositiveInt
    height: PositiveInt
    sampler: str = "ddim"
    schedule: str = "trailing"
    convention: str = "exact"
    steps: PositiveInt = 30
    guidance_scale: float = 7.5


class ModelConfig(Config):
    """Autoencoder, text encoder, UNet, noise schedule, what the UNet predicts, and how it is drawn with."""

    autoencoder: Annotated[AutoencoderConfig | PixelConfig, Field(discriminator="kind")]
    text: Annotated[ClipTextConfig | LabelConfig, Field(discriminator="kind")]
    unet: UNetConfig
    noise_schedule: NoiseScheduleConfig = NoiseScheduleConfig()
    prediction: Literal["eps", "v", "x0"] = "eps"
    sampling: SamplingDefaults
    # Prompts that show what the model can draw; the page offers the first of them to begin with.
    examples: tuple[str, ...] = ()

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet also reads a mask and the latent of the picture that is kept."""
        return self.unet.in_channels == 2 * self.autoencoder.latent_channels + 1

    @property
    def factor(self) -> int:
        """Width and height of a picture must be multiples of this."""
        return self.autoencoder.factor * self.unet.factor

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        latent = self.autoencoder.latent_channels
        if self.unet.out_channels != latent or self.unet.in_channels < latent:
            raise ValueError(
                f"the autoencoder has {latent} latent channels, the UNet reads {self.unet.in_channels} and writes "
                f"{self.unet.out_channels}"
            )
        if self.unet.context_width != self.text.width:
            raise ValueError(
                f"the text encoder is {self.text.width} wide, "
                f"the UNet's cross-attention expects {self.unet.context_width}"
            )
        if self.noise_schedule.kind.endswith("zero_snr") and self.prediction == "eps":
            raise ValueError("a network that predicts eps says nothing about an image at pure noise; use v or x0")
        for side in (self.sampling.width, self.sampling.height):
            if side % self.factor:
                raise ValueError(f"side {side} of sampling is not a multiple of {self.factor}")
        return self


def build(config: ModelConfig) -> tuple[Autoencoder, TextEncoder, UNet]:
    """The three networks of a config, with fresh weights."""
    autoencoder: Autoencoder
    if isinstance(config.autoencoder, AutoencoderConfig):
        autoencoder = KLAutoencoder(config.autoencoder)
    else:
        autoencoder = PixelAutoencoder(config.autoencoder)
    text: TextEncoder
    text = ClipTextEncoder(config.text) if isinstance(config.text, ClipTextConfig) else LabelEncoder(config.text)
    return autoencoder, text, UNet(config.unet)
