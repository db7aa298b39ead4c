"""Batches of captioned pictures from shards: what is the same whether the shards are indexed or streamed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.data.buckets import Size
from ldm.data.captions import all_captions, choose_captions
from ldm.data.decoding import decode, refuse_name
from ldm.data.grounds import choose_ground, colour_of, find_ground, on_ground, said
from ldm.data.order import Chance
from ldm.data.settings import PicturesConfig
from ldm.data.tally import Fault
from ldm.data.transforms import concept, cropped, is_mirrored
from ldm.images import to_tensor


class Picture(NamedTuple):
    """One sample as a batch takes it; the caption is empty where it is the null prompt."""

    key: str
    image: Float[Tensor, "c h w"]
    caption: str
    facts: dict[str, Any]
    others: tuple[str, ...]


@dataclass(frozen=True)
class PictureBatch:
    """A process's part of a global batch: images in [−1, 1], all of one size.

    `first` is the place of its first sample in the global batch; `faults` are bad samples that others stand in for.
    `others` are further captions of each picture, where the reader draws more than one; else empty.
    """

    step: int
    first: int
    keys: tuple[str, ...]
    images: Float[Tensor, "b c h w"]
    captions: tuple[str, ...]
    facts: tuple[dict[str, Any], ...]
    faults: tuple[Fault, ...] = ()
    others: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> "PictureBatch":
        """The same in memory that a GPU can fetch from by itself; the loader asks for it."""
        return replace(self, images=self.images.pin_memory())


def read_picture_sample(
    files: Mapping[str, bytes], key: str, where: str, config: PicturesConfig, size: Size, chance: Chance
) -> Picture:
    """The sample at `size`, with the caption of this step; random choices follow from `chance`. Raises BadSample."""
    refuse_name(key, where)
    sample = decode(files, where)
    captions = choose_captions(sample.caption, sample.facts, config.captions, chance, where, config.draws)
    picture = cropped(sample.image, config.pictures, size, chance)
    image = to_tensor(picture)
    ground = find_ground(picture) if config.pictures.grounds else None
    name = None if ground is None else choose_ground(ground.fits, config.pictures.grounds, chance)
    if ground is not None and name is not None:
        image = on_ground(image, ground.tensor(), colour_of(name))
        captions = tuple(said(caption, name) for caption in captions)
    names = concept(all_captions(sample.caption, sample.facts), sample.facts)
    if is_mirrored(names, config.pictures, chance):
        image = image.flip(-1)
    return Picture(key, image, captions[0], sample.facts, captions[1:])


def batch_of(step: int, first: int, pictures: Sequence[Picture], faults: Sequence[Fault]) -> PictureBatch:
    """Pictures of one size as a batch."""
    keys, images, captions, facts, others = zip(*pictures, strict=True)
    return PictureBatch(step, first, keys, torch.stack(images), captions, facts, tuple(faults), others)
