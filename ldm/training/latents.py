"""Latents and text states are computed once, kept on disk, and read by position."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from ldm.images import to_tensor
from ldm.models.autoencoder import Autoencoder
from ldm.training.checkpoint import load_tensors, save_tensors, save_text
from ldm.training.conditioned import Condition

Samples = Iterator[tuple[Image.Image, str, dict[str, object]]]


@dataclass(frozen=True)
class LatentCache:
    """Posterior mean and standard deviation per picture, and the condition of each distinct caption (the last is "").

    A condition is the caption's text states, or its token ids where the text tower learns too.
    """

    mean: Float[Tensor, "n c h w"]
    std: Float[Tensor, "n c h w"]
    conditions: Float[Tensor, "m l d"]
    caption: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.mean)


@torch.inference_mode()
def encode(
    samples: Samples, count: int, side: int, autoencoder: Autoencoder, condition: Condition, bf16: bool, batch: int = 32
) -> Iterator[int | LatentCache]:
    """Encode `count` pictures at `side`×`side`; yields how many are done, and last the cache."""
    means, stds, indices = [], [], []
    captions: dict[str, int] = {}
    done = 0
    while done < count:
        chunk = list(islice(samples, min(batch, count - done)))
        if not chunk:
            break
        images = torch.stack([to_tensor(resized(image, side)) for image, _, _ in chunk])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            posterior = autoencoder.encode(images.contiguous(memory_format=torch.channels_last))
        means.append(posterior.mean.half().contiguous())
        stds.append(posterior.std.half().contiguous())
        indices += [captions.setdefault(caption, len(captions)) for _, caption, _ in chunk]
        done += len(chunk)
        yield done
    known = [*captions, ""]
    conditions = [condition(known[i : i + 256]) for i in range(0, len(known), 256)]
    yield LatentCache(torch.cat(means), torch.cat(stds), torch.cat(conditions), torch.tensor(indices))


def resized(image: Image.Image, side: int) -> Image.Image:
    """A square picture at another side, by area averaging."""
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BOX)


def save(path: Path, cache: LatentCache, about: dict[str, object]) -> None:
    """Write a cache, whole or not at all, with what it was made from beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {name: getattr(cache, name) for name in ("mean", "std", "conditions", "caption")})
    save_text(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")


def load(path: Path, about: dict[str, object]) -> LatentCache | None:
    """The cache at `path`, if it is there and was made from just this."""
    described = path.with_suffix(".json")
    if not path.is_file() or not described.is_file():
        return None
    try:
        if json.loads(described.read_text(encoding="utf-8")) != about:
            return None
    except ValueError:
        return None
    return LatentCache(**load_tensors(path))
