"""Latents and text states are computed once, kept on disk, and read by position."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.data.pictures import PictureBatch
from ldm.files import save_text
from ldm.models.autoencoder import Autoencoder
from ldm.training.checkpoint import load_tensors, save_tensors
from ldm.training.conditioned import Condition

TENSORS = ("mean", "std", "conditions", "caption")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class LatentCache:
    """Posterior mean and standard deviation per picture, and the condition of each distinct caption (the last is "").

    A condition is the caption's text states, or its token ids where the text tower learns too. `caption` has the k
    captions that were drawn for each picture, each as likely; one that was drawn twice is there twice. `keys` are the
    names of the pictures, where they are known.
    """

    mean: Float[Tensor, "n c h w"]
    std: Float[Tensor, "n c h w"]
    conditions: Float[Tensor, "m l d"]
    caption: Int[Tensor, "n k"]
    keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.mean)

    def to(self, device: torch.device) -> "LatentCache":
        """The same on a device: no batch is copied there then."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})


def joined(parts: Sequence[LatentCache]) -> LatentCache:
    """The pictures of several caches in one."""
    known = [len(part.conditions) - 1 for part in parts]
    first = [sum(known[:index]) for index in range(len(parts))]
    return LatentCache(
        torch.cat([part.mean for part in parts]),
        torch.cat([part.std for part in parts]),
        torch.cat([*(part.conditions[:-1] for part in parts), parts[-1].conditions[-1:]]),
        torch.cat([part.caption + before for part, before in zip(parts, first, strict=True)]),
        tuple(key for part in parts for key in part.keys) if all(part.keys for part in parts) else (),
    )


@torch.inference_mode()
def encode(
    batches: Iterator[PictureBatch], count: int, autoencoder: Autoencoder, condition: Condition, bf16: bool
) -> Iterator[int | LatentCache]:
    """Encode `count` pictures where the autoencoder is; yields how many are done, and last the cache, on the CPU."""
    assert isinstance(autoencoder, nn.Module)
    device = next((parameter.device for parameter in autoencoder.parameters()), CPU)
    means, stds, indices, keys = [], [], list[list[int]](), list[str]()
    known: dict[str, int] = {}
    while len(indices) < count:
        chosen, left = next(batches), count - len(indices)
        images = chosen.images[:left].to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            posterior = autoencoder.encode(images)
        means.append(posterior.mean.half().contiguous().cpu())
        stds.append(posterior.std.half().contiguous().cpu())
        others = chosen.others or ((),) * len(chosen)
        drawn = [(caption, *more) for caption, more in zip(chosen.captions, others, strict=True)]
        indices += [[known.setdefault(caption, len(known)) for caption in each] for each in drawn[:left]]
        keys += chosen.keys[:left]
        yield len(indices)
    captions = [*known, ""]
    conditions = [condition(captions[i : i + 256]).cpu() for i in range(0, len(captions), 256)]
    yield LatentCache(torch.cat(means), torch.cat(stds), torch.cat(conditions), torch.tensor(indices), tuple(keys))


def save(path: Path, cache: LatentCache, about: dict[str, object]) -> None:
    """Write a cache, whole or not at all, with what it was made from beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = torch.frombuffer(bytearray(json.dumps(cache.keys), "utf-8"), dtype=torch.uint8)
    save_tensors(path, {name: getattr(cache, name) for name in TENSORS} | {"keys": keys})
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
    tensors = load_tensors(path)
    keys = tensors.pop("keys", None)  # caches of older versions have none
    return LatentCache(**tensors, keys=() if keys is None else tuple(json.loads(bytes(keys.numpy()))))
