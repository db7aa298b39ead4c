"""Captioned pictures that are decoded once and stay, as bytes, on the device that trains: no batch waits for a codec.

The batches are those of `IndexedShards` with the same config, sample for sample: order, captions, mirror images and
grounds follow from the same (seed, step, place). Only decoding and resizing are done ahead.
"""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.captions import all_captions, choose_caption, choose_captions
from ldm.data.decoding import decode
from ldm.data.grounds import choose_ground, colour_of, find_ground, on_ground, said
from ldm.data.indexed import IndexedShards, first_good
from ldm.data.loading import loaded, plain
from ldm.data.order import Chance, Part
from ldm.data.pictures import PictureBatch
from ldm.data.settings import PicturesConfig
from ldm.data.tally import Fault, Tally
from ldm.data.transforms import concept, fit, is_mirrored
from ldm.errors import LdmError, SettingError

# Samples that one worker decodes before it hands them over: so many, in memory that processes share, of which there may
# be little.
AT_ONCE = 64
BYTES_AT_ONCE = 2**23


class Words(NamedTuple):
    """What is known of a picture, and the names of the grounds that it stands out on."""

    key: str
    caption: str
    facts: dict[str, Any]
    fits: tuple[str, ...]


class Memory(NamedTuple):
    """Samples: pictures, the share of white ground in their pixels in 255ths (1×1 where nobody asks), and words."""

    images: UInt8[Tensor, "n 3 h w"]
    grounds: UInt8[Tensor, "n 1 h2 w2"]
    words: list[Words]


def require_resident(config: PicturesConfig) -> None:
    """Raise SettingError for data that cannot be held as pictures of one size, each the same in every epoch."""
    if config.buckets is not None or config.pictures.crop != "centre" or config.mode != "indexed":
        raise SettingError("resident: needs mode indexed, crop centre and no buckets; leave resident out")


class ResidentShards:
    """Captioned pictures of local shards in the memory of `device`: 3 bytes a pixel, 4 with grounds.

    In place of a bad sample stands, in every epoch, the next good one.
    """

    def __init__(self, config: PicturesConfig, device: torch.device, workers: int = 0) -> None:
        require_resident(config)
        self.config, self.device = config, device
        self._shards = IndexedShards(config)
        self.tally = self._shards.tally
        self._memory = self._read(workers)

    @property
    def tallies(self) -> tuple[Tally, ...]:
        """What counts bad samples: those that the index left out, and those that reading found."""
        return self._shards.tallies

    def __len__(self) -> int:
        return len(self._shards)

    def _read(self, workers: int) -> Memory:
        """Decode everything, over so many processes."""
        side, n = self.config.pictures.side, len(self)
        ground = side if self.config.pictures.grounds else 1
        memory = Memory(
            torch.empty((n, 3, side, side), dtype=torch.uint8, device=self.device),
            torch.empty((n, 1, ground, ground), dtype=torch.uint8, device=self.device),
            [],
        )
        chunks = _Chunks(self._shards)
        where = str(self._shards.table.shards[0].parent)
        items = loaded(chunks, 0, workers, self.config.timeout_s, where)
        for number, (chunk, faults) in enumerate(itertools.islice(items, len(chunks))):
            rows = slice(number * chunks.size, number * chunks.size + len(chunk.words))
            memory.images[rows] = chunk.images.to(self.device)
            memory.grounds[rows] = chunk.grounds.to(self.device)
            memory.words.extend(chunk.words)
            self.tally.add(len(chunk.words), faults)
        return memory

    def batches(self, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[PictureBatch]:
        """This rank's part of every global batch from step `start` on, without end, on the device."""
        for step in itertools.count(start):
            yield self.batch(self._shards.plan.part(step, rank, world_size))

    def batch(self, part: Part) -> PictureBatch:
        """The batch of these samples."""
        captions, others, mirrored, grounds = [], [], [], []
        known = [self._memory.words[sample] for sample in part.samples.tolist()]
        for (place, sample), words in zip(part.places(), known, strict=True):
            chance, config = Chance(f"{self.config.seed} {part.step} {place}"), self._shards.config_of(sample)
            drawn = choose_captions(words.caption, words.facts, config.captions, chance, words.key, config.draws)
            name = choose_ground(words.fits, config.pictures.grounds, chance)
            caption, *more = drawn if name is None else (said(one, name) for one in drawn)
            captions.append(caption)
            others.append(tuple(more))
            grounds.append(name)
            names = concept(all_captions(words.caption, words.facts), words.facts)
            mirrored.append(is_mirrored(names, config.pictures, chance))
        images = self._images(torch.from_numpy(part.samples), torch.tensor(mirrored), grounds)
        keys, facts = tuple(words.key for words in known), tuple(words.facts for words in known)
        return PictureBatch(part.step, part.first, keys, images, tuple(captions), facts, others=tuple(others))

    def _images(self, samples: Tensor, mirrored: Tensor, grounds: list[str | None]) -> Float[Tensor, "b 3 h w"]:
        """The pictures as this step shows them."""
        rows = samples.to(self.device, non_blocking=True)
        images = self._memory.images[rows].float() / 127.5 - 1.0
        if any(grounds):
            white = torch.ones(3)
            colours = torch.stack([white if name is None else colour_of(name) for name in grounds])
            shares = self._memory.grounds[rows].float() / 255.0
            images = on_ground(images, shares, colours.to(self.device, non_blocking=True))
        turned = mirrored.to(self.device, non_blocking=True)
        return torch.where(turned[:, None, None, None], images.flip(-1), images)


class _Chunks(Dataset[tuple[Memory, list[Fault]] | LdmError]):
    """Item k holds the samples from k·size on, decoded, and what was wrong with some."""

    def __init__(self, shards: IndexedShards) -> None:
        self._shards = shards
        self.size = max(1, min(AT_ONCE, BYTES_AT_ONCE // (4 * shards.config.pictures.side**2)))

    def __len__(self) -> int:
        return -(-len(self._shards) // self.size)

    def __getitem__(self, number: int) -> tuple[Memory, list[Fault]] | LdmError:
        faults: list[Fault] = []
        read = partial(decoded, self._shards)
        mine = range(number * self.size, min((number + 1) * self.size, len(self._shards)))
        try:
            found = [first_good(self._shards.plan.from_on(0, sample), read, faults) for sample in mine]
        except LdmError as error:
            return plain(error)
        if not found:  # a worker reads ahead, beyond the end
            return Memory(torch.empty(0, 3, 1, 1).byte(), torch.empty(0, 1, 1, 1).byte(), []), []
        images, grounds, words = zip(*found, strict=True)
        return Memory(torch.stack(images), torch.stack(grounds), list(words)), faults


def decoded(shards: IndexedShards, sample: int) -> tuple[UInt8[Tensor, "3 h w"], UInt8[Tensor, "1 h2 w2"], Words]:
    """A sample at the side of its config, with its ground where one may be exchanged. Raises BadSample."""
    config, where = shards.config_of(sample).pictures, shards.table.where(sample)
    found = decode(shards.reader.files(sample), where)
    choose_caption(found.caption, found.facts, shards.config.captions, Chance(""), where)  # is there one?
    image = fit(found.image, (config.side, config.side))
    ground = find_ground(image) if config.grounds else None
    side = config.side if shards.config.pictures.grounds else 1
    share = np.zeros((side, side), np.uint8) if ground is None else ground.share
    fits = () if ground is None else ground.fits
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    return pixels, torch.from_numpy(share[None]), Words(shards.table.key(sample), found.caption, found.facts, fits)
