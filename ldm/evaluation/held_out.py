"""What a model does with pictures it has not seen: their reconstruction, and the noise it tells from them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ldm.bundle import Bundle
from ldm.data.transforms import fit
from ldm.errors import DataError
from ldm.evaluation.denoising import CONTEXTS, Bin, Denoise, held_out_loss
from ldm.evaluation.drawing import computed_with
from ldm.evaluation.figures import of_mean
from ldm.evaluation.pictures import Pictures, thumbnail
from ldm.evaluation.reconstruction import psnr, reconstructed, ssim
from ldm.evaluation.results import Result
from ldm.images import to_image, to_tensor

BATCH = 8
WORDS = {"right": "right caption", "none": "no caption", "other": "another picture's caption"}


@dataclass(frozen=True)
class HeldOut:
    """n pictures as the autoencoder knows them; without decoding no PSNR and SSIM, and no pairs.

    `pairs` are small pictures, each before its reconstruction; `sha256` is that of pixels and captions as encoded.
    """

    captions: tuple[str, ...]
    latents: Float[Tensor, "n c h w"]
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    pairs: tuple[Image.Image, ...]
    sha256: str


@torch.inference_mode()
def encoded(bundle: Bundle, pictures: Pictures, decode: bool, pairs: int = 0) -> Iterator[int | HeldOut]:
    """Pictures through the autoencoder, at the model's size; yields how many are done, and last what was found.

    Raises DataError where there is no picture.
    """
    captions, latents = list[str](), list[Tensor]()
    quality: tuple[list[float], list[float]] = ([], [])
    small, digest = list[Image.Image](), hashlib.sha256()
    remaining = pictures()
    while batch := list(islice(remaining, BATCH)):
        images = at_model_size(bundle, [picture.image for picture in batch])
        captions += [picture.caption for picture in batch]
        digest.update(images.cpu().numpy().tobytes() + repr([picture.caption for picture in batch]).encode())
        latents.append(bundle.autoencoder.encode(images).mean.float())
        if decode:
            again = reconstructed(bundle.autoencoder, images)
            quality[0].extend(psnr(images, again).tolist())
            quality[1].extend(ssim(images, again).tolist())
            for pair in zip(images, again, strict=True):
                small += [thumbnail(to_image(one)) for one in pair] if len(small) < 2 * pairs else []
        yield len(captions)
    if not captions:
        raise DataError("--data: no picture in it; name others")
    yield HeldOut(
        tuple(captions), torch.cat(latents), tuple(quality[0]), tuple(quality[1]), tuple(small), digest.hexdigest()
    )


def at_model_size(bundle: Bundle, images: Sequence[Image.Image]) -> Float[Tensor, "b c h w"]:
    """Pictures in the size and colours that the model draws, in [−1, 1], on its device."""
    sampling, mode = bundle.config.sampling, "RGB" if bundle.autoencoder.image_channels == 3 else "L"
    tensors = [to_tensor(fit(image.convert(mode), (sampling.width, sampling.height))) for image in images]
    return torch.stack(tensors).to(bundle.device)


def protocol(bundle: Bundle, seen: HeldOut, version: str) -> dict[str, object]:
    """What decides these figures: the model, its number format, and the pictures at the model's size."""
    return {
        "version": version,
        **computed_with(bundle),
        "data_sha256": seen.sha256,
        "pictures": len(seen.captions),
    }


def autoencoder_results(bundle: Bundle, seen: HeldOut) -> list[Result]:
    """PSNR and SSIM of reconstructions."""
    decided = protocol(bundle, seen, "vae/1")
    return [
        Result("autoencoder PSNR", "held out", of_mean(seen.psnr), decided, "dB"),
        Result("autoencoder SSIM", "held out", of_mean(seen.ssim), decided),
    ]


def reading(bundle: Bundle) -> Denoise:
    """The bundle's denoiser, called with captions."""
    denoiser = bundle.denoiser
    return lambda x, sigma, captions: denoiser(x, sigma, bundle.text.encode(list(captions)).tokens)


def loss_results(bundle: Bundle, seen: HeldOut) -> tuple[list[Result], list[Bin]]:
    """The ε-loss, averaged over the bins, with each context; what the text is worth; and the bins themselves.

    Raises DataError for pictures that all have one caption.
    """
    try:
        bins = held_out_loss(reading(bundle), bundle.schedule, seen.latents, seen.captions)
    except ValueError as error:
        raise DataError(f"--metrics loss: {error}; name pictures with captions") from None
    decided = protocol(bundle, seen, "loss/1")
    errors = np.mean([one.errors for one in bins], axis=0)
    results = [
        Result(f"ε-loss, {WORDS[context]}", "held out", of_mean(values), decided)
        for context, values in zip(CONTEXTS, errors, strict=True)
    ]
    table = [{"timestep": b.timestep, "snr": b.snr, **means(b, CONTEXTS)} for b in bins]
    gap = of_mean(errors[1] - errors[0])
    return [*results, Result("ε-loss that the caption spares", "held out", gap, decided, details={"bins": table})], bins


def means(of: Bin, contexts: Sequence[str]) -> dict[str, float]:
    """The mean error with each context."""
    return dict(zip(contexts, of.errors.mean(axis=1).tolist(), strict=True))


def loss_table(bins: Sequence[Bin]) -> str:
    """The bins in Markdown."""
    return table(CONTEXTS, bins, [[f"{v:.4f}" for v in means(b, CONTEXTS).values()] for b in bins])


def table(columns: Sequence[str], bins: Sequence[Bin], values: Sequence[Sequence[str]]) -> str:
    """A row of values for each bin, in Markdown."""
    rows = [f"| {b.timestep} | {b.snr:.3g} | {' | '.join(row)} |" for b, row in zip(bins, values, strict=True)]
    return "\n".join([f"| t | SNR | {' | '.join(columns)} |", f"|{'---|' * (2 + len(columns))}", *rows])
