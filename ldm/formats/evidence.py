"""What a checkpoint is and how that was told: the record, and the facts about Stable Diffusion's versions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldm.errors import ModelError

Prediction = Literal["eps", "v", "x0"]
Layout = Literal["bundle", "single file", "diffusers folder"]


@dataclass(frozen=True)
class Description:
    """What a file or folder is, as far as it can be told without reading weights."""

    path: Path
    layout: Layout
    architecture: str
    # What the UNet predicts, and why we think so; None where only the UNet itself can tell.
    prediction: Prediction | None
    prediction_reason: str
    # Whether it says its own shape (a config, or the metadata that we write), or the shape follows from the weights.
    has_config: bool
    input_channels: int
    cross_attention: int
    text: str
    # Whether a second, averaged set of UNet weights is there.
    has_ema: bool
    # Bytes of the weights by number format (F32, F16, BF16), most first.
    formats: dict[str, int]
    tensors: int
    # Tensors that are known to be no weights of the model and are not read.
    left_over: int = 0

    @property
    def summary(self) -> str:
        """What it is, in one line."""
        formats = ", ".join(f"{size / 2**20:,.0f} MB {kind}" for kind, size in self.formats.items())
        averaged = "; has averaged weights too, which are not used" if self.has_ema else ""
        said = f"predicts {self.prediction or 'eps or v'} ({self.prediction_reason})"
        return f"{self.architecture}, {self.layout}, {formats}; {said}{averaged}"

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet also reads a mask and the latent of a masked picture."""
        return self.input_channels == 9


@dataclass(frozen=True)
class Family:
    """What no weight of a Stable Diffusion version tells, as values of our config."""

    name: str
    unet: dict[str, Any]
    text: dict[str, Any]


# By the width of the UNet's cross-attention.
FAMILIES = {
    768: Family(
        "Stable Diffusion 1.x",
        unet={"heads": 8},
        text={"heads": 12, "activation": "quick_gelu", "padding": "end"},
    ),
    1024: Family(
        "Stable Diffusion 2.x",
        unet={"heads": None, "head_width": 64},
        text={"heads": 16, "activation": "gelu", "padding": "zero"},
    ),
}
OTHER_FAMILIES = {2048: "an SDXL file", 1280: "an SDXL refiner file"}
# Stable Diffusion 2's UNet reads the states before the last of 24 blocks; programs that know leave that block out.
OPEN_CLIP_BLOCKS = 24

# What pictures are drawn with where the user asks for nothing else: diffusers' pipeline, with DDIM for PNDM.
SAMPLING: dict[str, Any] = {
    "sampler": "ddim",
    "schedule": "leading",
    "convention": "diffusers",
    "steps": 50,
    "guidance_scale": 7.5,
}
# Stable Diffusion's noise schedule, rescaled so that its last level is pure noise.
ZERO_SNR = "scaled_linear_zero_snr"


def family(cross_attention: int, where: Path) -> Family:
    """The Stable Diffusion version with that width of cross-attention. Raises ModelError where there is none."""
    if cross_attention in FAMILIES:
        return FAMILIES[cross_attention]
    what = OTHER_FAMILIES.get(cross_attention, "no Stable Diffusion 1.x or 2.x file")
    raise ModelError(
        f"{where}: this is {what}: cross-attention {cross_attention}, expected 768 or 1024; "
        "use a Stable Diffusion 1.x or 2.x model, or one that scripts/convert.py has written"
    )


def architecture(name: str, input_channels: int) -> str:
    """The version in words, with what its UNet reads beside the noisy latent."""
    return f"{name} inpainting" if input_channels == 9 else name


def square(side: int) -> dict[str, int]:
    """The size of the pictures a model was trained on, as settings."""
    return {"width": side, "height": side}


def usual_side(cross_attention: int, prediction: Prediction | None) -> int:
    """Pixels along a side: 768 for Stable Diffusion 2 with v-prediction, else 512."""
    return 768 if cross_attention == 1024 and prediction == "v" else 512
