"""What training reads and how, as a recipe states it."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ldm.config import Config
from ldm.data.buckets import BucketConfig
from ldm.data.captions import CaptionConfig
from ldm.data.transforms import PictureConfig


class ReadingConfig(Config):
    """Batches from shards. `batch_size` is that of the global batch, whatever the number of processes."""

    # A folder, a pattern, or several; for streaming also addresses that WebDataset opens, such as https://….
    shards: str | tuple[str, ...]
    # indexed: local tars; each sample once per epoch; the batches are a function of (seed, step) alone.
    # streaming: an endless stream over shards, also remote ones, when a set is too large to index.
    mode: Literal["indexed", "streaming"] = "indexed"
    batch_size: PositiveInt
    seed: NonNegativeInt = 0
    # Share of bad samples above which training stops, of the last 1,000 or of the whole set if that is smaller.
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    # How long a batch may take to come from worker processes.
    timeout_s: PositiveFloat = 120.0
    # Folder for the indices of the shards; without one they lie beside them.
    index: Path | None = None


class MixConfig(Config):
    """A second set of shards that has a share of all places; its pictures are neither mirrored nor put on grounds."""

    shards: str | tuple[str, ...]
    share: float = Field(ge=0, le=1)


class PicturesConfig(ReadingConfig):
    """Captioned pictures."""

    pictures: PictureConfig
    captions: CaptionConfig = CaptionConfig()
    # How many captions are drawn for each picture of a batch: what is kept for many steps has as many to show.
    draws: int = Field(default=1, ge=1)
    buckets: BucketConfig | None = None
    mix: MixConfig | None = None
    # Streaming only: samples, still encoded, among which each reader draws the next one.
    shuffle_buffer: PositiveInt = 1000

    @model_validator(mode="after")
    def _mixes_what_it_can_count(self) -> "PicturesConfig":
        if self.mix is not None and (self.mode == "streaming" or self.buckets is not None):
            raise ValueError("mix needs mode: indexed, and no buckets")
        return self


class LatentsConfig(ReadingConfig):
    """Latents and text states that `scripts/cache_latents.py` has written."""

    mode: Literal["indexed"] = "indexed"
    # As in CaptionConfig.
    choice: Literal["first", "any"] = "first"
    first: float = Field(default=0.0, ge=0, le=1)
    # Probability that the text states become those of the null prompt, for classifier-free guidance.
    dropout: float = Field(default=0.0, ge=0, le=1)
