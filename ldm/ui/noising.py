"""What diffusion does to a picture, to be looked at: noise added at a timestep, and the steps that took it away."""

from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from PIL import Image, ImageOps

from ldm.diffusion.forward import diffuse
from ldm.errors import DataError, SettingError
from ldm.images import to_image, to_tensor
from ldm.pipeline import TextToImage
from ldm.ui.drawing import Recording

FORMATS = ["PNG", "JPEG", "WEBP"]


@dataclass(frozen=True)
class Noised:
    """A picture with noise: in pixels, in the latent as the model sees it, and in numbers."""

    pixels: Image.Image
    latent: Image.Image
    alpha: float  # ᾱ_t
    sigma: float  # σ_t = √((1−ᾱ_t)/ᾱ_t)


def open_picture(path: Path, width: int, height: int, channels: int) -> Image.Image:
    """A picture of that size, its middle; transparent parts white, turned as its EXIF says. Raises DataError."""
    try:
        with Image.open(path, formats=FORMATS) as opened:
            whole = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise DataError("picture: it cannot be read; give a PNG, JPEG or WebP file of at most 32 megapixels") from None
    flat = Image.new("RGBA", whole.size, "white")
    flat.alpha_composite(whole)
    return ImageOps.fit(flat.convert("L" if channels == 1 else "RGB"), (width, height))


# The last picture of each engine that is still there: which one, as the model reads it, and its latent.
_kept: WeakKeyDictionary[TextToImage, tuple[Path, int, torch.Tensor, torch.Tensor]] = WeakKeyDictionary()


def _latent(engine: TextToImage, path: Path, written: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture as the model reads it, and its latent; kept while somebody moves the slider."""
    if (known := _kept.get(engine)) is not None and known[:2] == (path, written):
        return known[2:]
    sampling, autoencoder = engine.bundle.config.sampling, engine.bundle.autoencoder
    picture = open_picture(path, sampling.width, sampling.height, autoencoder.image_channels)
    weight = next(iter(engine.bundle.unet.parameters()))
    image = to_tensor(picture)[None].to(weight.device, weight.dtype)
    _kept[engine] = path, written, image, autoencoder.encode(image).mean
    return _kept[engine][2:]


@torch.inference_mode()
def noised(engine: TextToImage, path: Path, timestep: int) -> Noised:
    """x_t = √ᾱ_t x0 + √(1−ᾱ_t) ε of a picture and of its latent, always with the same ε for each."""
    schedule = engine.bundle.schedule
    if not 0 <= timestep < len(schedule):
        raise SettingError(f"timestep: {timestep} is not between 0 and {len(schedule) - 1}; use 500")
    image, latent = _latent(engine, path, path.stat().st_mtime_ns)
    t = torch.tensor([timestep])

    def with_noise(x0: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
        return diffuse(schedule, x0, t, noise)

    seen = engine.bundle.autoencoder.preview(with_noise(latent))[0]
    alpha, sigma = float(schedule.alphas_cumprod[timestep]), float(schedule.sigmas[timestep])
    return Noised(to_image(with_noise(image)[0]), to_image(seen), alpha, sigma)


@torch.inference_mode()
def frame(recording: Recording, number: int) -> tuple[Image.Image, Image.Image]:
    """The noisy latent and the clean estimate of a recorded step, through the map from latents to colours.

    The latent x = x0 + σ·noise is divided by √(1+σ²), as the network gets it. Raises SettingError where the model
    that drew it is no longer in memory.
    """
    engine = recording.engine()
    if engine is None:
        raise SettingError("recording: another model was loaded since; draw a picture again")
    step = recording.steps[number]
    seen = engine.bundle.autoencoder.preview(step.x / (1 + step.sigma**2) ** 0.5)[0]
    return to_image(seen), engine.preview(step)
