"""A record becomes a sample of one size and format, or a reject that says why."""

import io
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageColor
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from ldm.config import Config
from ldm.data.buckets import BucketConfig, Size, assign, bucket_sizes
from ldm.data.decoding import LONGEST_CAPTION, MAX_PIXELS, read_picture
from ldm.data.duplicates import Fingerprint, fingerprint
from ldm.data.records import Record, Reject
from ldm.data.tally import BadSample
from ldm.data.transforms import fit

READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # nothing that starts another program, as EPS would


class Rules(Config):
    """What becomes of a picture; part of what decides every byte of a data set."""

    resolution: PositiveInt = 512
    # short: the shorter side becomes `resolution`; exact: a square, cropped in the middle; bucket: the nearest of the
    # sizes with the area of that square; keep: as it is.
    resize: Literal["short", "exact", "bucket", "keep"] = "short"
    bucket_step: PositiveInt = 64
    format: Literal["png", "webp", "jpg"] = "jpg"
    # Of 100; 100 is lossless for WebP.
    quality: int = Field(default=95, ge=1, le=100)
    min_side: PositiveInt = 64
    max_aspect: float = Field(default=3.0, ge=1)
    max_pixels: PositiveInt = MAX_PIXELS
    animated: Literal["first", "reject"] = "reject"
    # The colour that lies under transparent parts.
    ground: str = "white"
    empty_captions: bool = False
    duplicates: Literal["keep", "exact", "near"] = "exact"
    near_bits: NonNegativeInt = Field(default=3, le=7)

    @field_validator("ground")
    @classmethod
    def _is_a_colour(cls, ground: str) -> str:
        ImageColor.getrgb(ground)
        return ground

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of `resize: bucket`."""
        return bucket_sizes(self.resolution, BucketConfig(step=self.bucket_step, max_aspect=min(self.max_aspect, 2.0)))


@dataclass(frozen=True)
class Cleaned:
    """A sample as `write_shard` takes it, but for its key, and the fingerprint of its picture before it was resized."""

    origin: str
    members: dict[str, Any]
    fingerprint: Fingerprint


def clean(record: Record | Reject, rules: Rules) -> Cleaned | Reject:
    """The sample of a record, a pure function of both."""
    if isinstance(record, Reject):
        return record
    captions = tuple(dict.fromkeys(caption for caption in record.captions if caption))
    fault = caption_fault(captions, rules)
    if fault is not None:
        return Reject(record.origin, *fault)
    try:
        wants_first = rules.animated == "first"
        image = read_picture(record.picture, record.origin, READ, rules.ground, rules.max_pixels, wants_first)
    except BadSample as error:
        return Reject(*error.fault)
    width, height = image.size
    if min(width, height) < rules.min_side:
        return Reject(record.origin, "too small", f"{width}×{height} pixels, expected sides of {rules.min_side}")
    if max(width, height) > rules.max_aspect * min(width, height):
        return Reject(record.origin, "too narrow", f"{width}×{height} pixels, expected at most {rules.max_aspect:g}:1")
    found = fingerprint(image, rules.duplicates == "near")
    facts = {key: text(value) if isinstance(value, str) else value for key, value in record.facts.items()}
    facts |= {"origin": text(record.origin), "width": width, "height": height, "pixels": found.pixels}
    if rules.duplicates == "near":
        facts |= {"gradients": found.gradients, "colours": found.colours}
    if len(captions) > 1:
        facts["captions"] = list(captions)
    members = {
        rules.format: encoded(resized(image, rules), rules),
        "txt": captions[0] if captions else "",
        "json": facts,
    }
    return Cleaned(record.origin, members, found)


def caption_fault(captions: tuple[str, ...], rules: Rules) -> tuple[str, str] | None:
    """Reason and words for captions that are none."""
    if not captions and not rules.empty_captions:
        return "empty caption", "expected words"
    for caption in captions:
        if len(caption) > LONGEST_CAPTION:
            return "caption too long", f"{len(caption)} characters, expected at most {LONGEST_CAPTION}"
        if caption != text(caption):
            return "caption not UTF-8", "bytes that are no UTF-8 text"
    return None


def text(value: str) -> str:
    """The text without what is no Unicode, such as bytes of a file's name that are no UTF-8."""
    return value.encode(errors="replace").decode()


def resized(image: Image.Image, rules: Rules) -> Image.Image:
    """The picture at the size that the rules ask for."""
    if rules.resize == "keep":
        return image
    if rules.resize == "exact":
        return fit(image, (rules.resolution, rules.resolution))
    if rules.resize == "bucket":
        import numpy as np

        sizes = rules.sizes
        return fit(image, sizes[int(assign(np.array([image.width]), np.array([image.height]), sizes)[0])])
    scale = rules.resolution / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def encoded(image: Image.Image, rules: Rules) -> bytes:
    """The picture as a file; the same picture gives the same bytes."""
    file = io.BytesIO()
    if rules.format == "png":
        image.save(file, "PNG")
    elif rules.format == "webp":
        image.save(file, "WEBP", quality=rules.quality, lossless=rules.quality == 100)
    else:
        image.save(file, "JPEG", quality=rules.quality, subsampling=0 if rules.quality >= 90 else 2)
    return file.getvalue()
