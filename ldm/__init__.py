"""Latent diffusion, end to end: an autoencoder, a text encoder, a denoiser, guidance and a sampler, and their training.

from ldm import Bundle, GenerationRequest, TextToImage

pipeline = TextToImage(Bundle.load("emoji-256"))
for picture in pipeline(GenerationRequest(prompt="a 3D emoji of a red apple", seed=1)):
    picture.image.save("apple.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.bundle import Bundle
    from ldm.diffusion.denoiser import Denoise, Denoiser
    from ldm.diffusion.grids import GRIDS
    from ldm.diffusion.guidance import guided
    from ldm.diffusion.samplers import SAMPLERS, Step
    from ldm.diffusion.schedule import NoiseSchedule
    from ldm.errors import LdmError
    from ldm.models.model_config import ModelConfig
    from ldm.pipeline import TextToImage
    from ldm.request import GenerationRequest

__version__ = "0.1.0"

# Public name → the module that has it; imported when first used, so that `import ldm` and `--help` are instant.
_PUBLIC = {
    "Bundle": "ldm.bundle",
    "Denoise": "ldm.diffusion.denoiser",
    "Denoiser": "ldm.diffusion.denoiser",
    "GRIDS": "ldm.diffusion.grids",
    "GenerationRequest": "ldm.request",
    "LdmError": "ldm.errors",
    "ModelConfig": "ldm.models.model_config",
    "NoiseSchedule": "ldm.diffusion.schedule",
    "SAMPLERS": "ldm.diffusion.samplers",
    "Step": "ldm.diffusion.samplers",
    "TextToImage": "ldm.pipeline",
    "guided": "ldm.diffusion.guidance",
}

__all__ = [
    "GRIDS",
    "SAMPLERS",
    "Bundle",
    "Denoise",
    "Denoiser",
    "GenerationRequest",
    "LdmError",
    "ModelConfig",
    "NoiseSchedule",
    "Step",
    "TextToImage",
    "guided",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
