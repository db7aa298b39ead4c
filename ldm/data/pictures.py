"""Batches of captioned pictures from shards: what is the same whether the shards are indexed or streamed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.data.buckets import Size
from ldm.data.captions import all_captions, choose_caption
from ldm.data.decoding import decode
from ldm.data.order import Chance
from ldm.data.settings import PicturesConfig
from ldm.data.tally import Fault
from ldm.data.transforms import transform
from ldm.images import to_tensor


class Picture(NamedTuple):
    """One sample as a batch takes it; the caption is empty where it is the null prompt."""

    key: str
    image: Float[Tensor, "c h w"]
    caption: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class PictureBatch:
    """A process's part of a global batch: images in [−1, 1], all of one size.

    `first` is the place of its first sample in the global batch; `faults` are bad samples that others stand in for.
    """

    step: int
    first: int
    keys: tuple[str, ...]
    images: Float[Tensor, "b c h w"]
    captions: tuple[str, ...]
    facts: tuple[dict[str, Any], ...]
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)


def read_picture_sample(
    files: Mapping[str, bytes], key: str, where: str, config: PicturesConfig, size: Size, chance: Chance
) -> Picture:
    """The sample at `size`, with the caption of this step; random choices follow from `chance`. Raises BadSample."""
    sample = decode(files, where)
    caption = choose_caption(sample.caption, sample.facts, config.captions, chance, where)
    image = transform(sample.image, all_captions(sample.caption, sample.facts), config.pictures, size, chance)
    return Picture(key, to_tensor(image), caption, sample.facts)


def batch_of(step: int, first: int, pictures: Sequence[Picture], faults: Sequence[Fault]) -> PictureBatch:
    """Pictures of one size as a batch."""
    keys, images, captions, facts = zip(*pictures, strict=True)
    return PictureBatch(step, first, keys, torch.stack(images), captions, facts, tuple(faults))
