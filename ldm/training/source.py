"""Captioned pictures by position: batch `step` holds the same pictures in the same order whoever reads it, and when."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from ldm.config import Config, validate
from ldm.data.buckets import BucketConfig, bucket_sizes
from ldm.data.captions import CaptionConfig
from ldm.data.digits import load
from ldm.data.latents import LatentShards, MadeFrom
from ldm.data.order import Plan
from ldm.data.pictures import PictureBatch
from ldm.data.resident import ResidentShards, require_resident
from ldm.data.settings import LatentsConfig, MixConfig, PicturesConfig
from ldm.data.shards import find_shards
from ldm.data.source import open_pictures
from ldm.data.streaming import StreamedShards
from ldm.data.tally import Tally
from ldm.data.transforms import PictureConfig
from ldm.errors import SettingError
from ldm.images import to_tensor
from ldm.training.workers import Workers, workers

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
    # Probability that a picture on plain white gets a coloured ground, which its caption then names.
    grounds: float = Field(0.0, ge=0, le=1)
    # A second set of shards with a share of the samples; a stage may have a share of its own (`mix_share`).
    mix: MixConfig | None = None
    # Sizes by aspect, for what trains the UNet; the autoencoder and CLIP learn from squares.
    buckets: BucketConfig | None = None
    # All pictures are decoded at the start and kept as bytes on the device that trains: for sets that fit there.
    resident: bool = False
    captions: CaptionConfig = CaptionConfig()
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    timeout_s: PositiveFloat = 120.0
    index: Path | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if (self.shards is None) == (self.digits is None):
            raise ValueError("give either shards or digits")
        if self.shards is None and (self.mix is not None or self.resident or self.buckets is not None):
            raise ValueError("mix, resident and buckets are for shards")
        return self


def require(data: DataConfig) -> None:
    """Raise DataError or SettingError where the pictures are not there, before one is read."""
    if data.digits is not None:
        load(data.digits)
    elif data.mode == "streaming":
        StreamedShards(settings(data.model_copy(update={"buckets": None}), 1, 64, 0))
    else:
        for pattern in (data.shards, data.mix.shards if data.mix is not None else None):
            if pattern is not None:
                find_shards(pattern)


def pictures(
    data: DataConfig,
    batch_size: int,
    side: int,
    seed: int,
    alone: bool = False,
    tallies: list[Tally] | None = None,
    draws: int = 1,
) -> Pictures:
    """Batches of the recipe's pictures, `side` pixels square (digits: as they are); whole ones where one is `alone`.

    What counts their bad samples is added to `tallies`. A picture has `draws` captions; a digit has one.
    """
    me = workers()
    me = replace(me, rank=0, world=1) if alone else me
    if data.digits is not None:
        return digits(data.digits, batch_size, seed, me)
    config = settings(data, batch_size, side, seed).model_copy(update={"draws": draws})
    return shards(data, config, me, [] if tallies is None else tallies)


def shards(data: DataConfig, config: PicturesConfig, me: Workers, tallies: list[Tally]) -> Pictures:
    """Batches from WebDataset shards: resident, indexed or streamed as the recipe says."""
    if data.resident:
        resident = ResidentShards(config, me.device, data.workers)
        tallies.extend(resident.tallies)
        return lambda start: resident.batches(start, me.rank, me.world)
    source = open_pictures(config)
    tallies.extend(source.tallies)
    return lambda start: source.batches(start, me.rank, me.world, data.workers)


def check(data: DataConfig, batch_size: int, side: int, factor: int = 1) -> None:
    """Say now what would stop a stage that reads pictures: too few shards for its readers, sizes that do not fit.

    Sides are to be multiples of `factor`. Raises SettingError and DataError.
    """
    if data.shards is not None:
        config = settings(data, batch_size, side, 0)
        if data.resident:
            require_resident(config)
    if data.mode == "streaming":
        pictures(data, batch_size, side, 0)(0)
    if data.buckets is None:
        return
    bucket_sizes(side, data.buckets)
    if data.buckets.step % factor:
        raise SettingError(
            f"data.buckets.step: got {data.buckets.step}, expected a multiple of {factor}, which this model's sides "
            f"are; use {-(-data.buckets.step // factor) * factor}"
        )


def settings(data: DataConfig, batch_size: int, side: int, seed: int) -> PicturesConfig:
    """The recipe's data as the readers of `ldm.data` are told it. Raises SettingError where they cannot do that."""
    assert data.shards is not None
    values = {
        "shards": data.shards,
        "mode": data.mode,
        "batch_size": batch_size,
        "seed": seed,
        "max_bad_fraction": data.max_bad_fraction,
        "timeout_s": data.timeout_s,
        "index": data.index,
        "pictures": PictureConfig(side=side, crop=data.crop, mirror=data.mirror, grounds=data.grounds),
        "captions": data.captions,
        "buckets": data.buckets,
        "mix": data.mix,
    }
    return validate(values, PicturesConfig, "data")


def latent_shards(pattern: str, data: DataConfig, batch_size: int, seed: int, made_from: MadeFrom) -> LatentShards:
    """Latents that were cached with just these networks and the recipe's buckets. Raises DataError for others."""
    config = LatentsConfig(
        shards=pattern,
        batch_size=batch_size,
        seed=seed,
        max_bad_fraction=data.max_bad_fraction,
        timeout_s=data.timeout_s,
        index=data.index,
        choice=data.captions.choice,
        first=data.captions.first,
    )
    return LatentShards(config, replace(made_from, buckets=data.buckets.name if data.buckets is not None else ""))


def digits(folder: str, batch_size: int, seed: int, me: Workers) -> Pictures:
    """Batches of digits, whose captions are their labels."""
    images, labels = load(folder)
    plan = Plan(len(images), batch_size, seed)

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
