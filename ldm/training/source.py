"""Captioned pictures by position: batch `step` holds the same pictures in the same order whoever reads it, and when."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from ldm.config import Config
from ldm.data.captions import CaptionConfig
from ldm.data.digits import endless, load
from ldm.data.indexed import IndexedShards
from ldm.data.latents import LatentShards, MadeFrom
from ldm.data.order import Plan
from ldm.data.pictures import PictureBatch
from ldm.data.settings import LatentsConfig, PicturesConfig
from ldm.data.shards import find_shards, read_samples
from ldm.data.streaming import StreamedShards
from ldm.data.transforms import PictureConfig
from ldm.images import to_image, to_tensor
from ldm.training.latents import Samples
from ldm.training.workers import workers

STREAMED_SIDE = 512
Pictures = Callable[[int], Iterator[PictureBatch]]
"""This process's parts of the global batches from a step on, without end."""


class DataConfig(Config):
    """Where captioned pictures come from: WebDataset shards (a glob), or the digits of `ldm.data.digits`."""

    shards: str | tuple[str, ...] | None = None
    # A folder with MNIST's IDX files; without them, scikit-learn's own small digits.
    digits: str | None = None
    # indexed: local shards, each sample once per epoch. streaming: endless, also from elsewhere, without an index.
    mode: Literal["indexed", "streaming"] = "indexed"
    # Processes that decode pictures, for each process that trains.
    workers: NonNegativeInt = 0
    crop: Literal["centre", "random"] = "centre"
    mirror: float = Field(0.0, ge=0, le=1)
    captions: CaptionConfig = CaptionConfig()
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    timeout_s: PositiveFloat = 120.0
    index: Path | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if (self.shards is None) == (self.digits is None):
            raise ValueError("give either shards or digits")
        return self


def samples(data: DataConfig, seed: int) -> Samples:
    """Captioned pictures one by one, without end and in this process alone: for what is computed once."""
    if data.digits is not None:
        return endless(data.digits, seed)
    assert data.shards is not None
    if data.mode == "indexed":
        return read_samples(find_shards(data.shards), seed=seed, shuffle=True, epochs=None)
    streamed = StreamedShards(settings(data, 1, STREAMED_SIDE, abs(seed)))
    return ((to_image(one.images[0]), one.captions[0], one.facts[0]) for one in streamed.batches())


def pictures(data: DataConfig, batch_size: int, side: int, seed: int) -> Pictures:
    """Batches of the recipe's pictures, `side` pixels square (digits: as they are)."""
    if data.digits is not None:
        return digits(data.digits, batch_size, seed)
    return shards(data, batch_size, side, seed)


def shards(data: DataConfig, batch_size: int, side: int, seed: int) -> Pictures:
    """Batches from WebDataset shards, indexed or streamed as the recipe says."""
    me = workers()
    config = settings(data, batch_size, side, seed)
    source = IndexedShards(config) if data.mode == "indexed" else StreamedShards(config)
    return lambda start: source.batches(start, me.rank, me.world, data.workers)


def settings(data: DataConfig, batch_size: int, side: int, seed: int) -> PicturesConfig:
    """The recipe's data as the readers of `ldm.data` are told it."""
    assert data.shards is not None
    return PicturesConfig(
        shards=data.shards,
        mode=data.mode,
        batch_size=batch_size,
        seed=seed,
        max_bad_fraction=data.max_bad_fraction,
        timeout_s=data.timeout_s,
        index=data.index,
        pictures=PictureConfig(side=side, crop=data.crop, mirror=data.mirror),
        captions=data.captions,
    )


def latent_shards(pattern: str, data: DataConfig, batch_size: int, seed: int, made_from: MadeFrom) -> LatentShards:
    """Latents that were cached from just this autoencoder and text encoder. Raises DataError for others."""
    config = LatentsConfig(
        shards=pattern,
        batch_size=batch_size,
        seed=seed,
        max_bad_fraction=data.max_bad_fraction,
        timeout_s=data.timeout_s,
        index=data.index,
        choice=data.captions.choice,
    )
    return LatentShards(config, made_from)


def digits(folder: str, batch_size: int, seed: int) -> Pictures:
    """Batches of digits, whose captions are their labels."""
    images, labels = load(folder)
    plan, me = Plan(len(images), batch_size, seed), workers()

    def batches(start: int) -> Iterator[PictureBatch]:
        step = start
        while True:
            part = plan.part(step, me.rank, me.world)
            chosen = part.samples.tolist()
            tensors = torch.stack([to_tensor(Image.fromarray(images[i])) for i in chosen])
            names, captions = tuple(f"digit {i}" for i in chosen), tuple(str(labels[i]) for i in chosen)
            yield PictureBatch(step, part.first, names, tensors, captions, ({},) * len(chosen))
            step += 1

    return batches
