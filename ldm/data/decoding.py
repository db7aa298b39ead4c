"""The bytes of a sample become a picture, its caption and facts, or a fault; nothing in them is run.

A sample has one picture (png, webp, jpg, jpeg), one txt with the caption, and optionally json with facts, among them a
list "captions" with further ones. Files of other kinds are not looked at.
"""

import io
import json
import re
import struct
import warnings
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ldm.data.tally import BadSample

IMAGE_FORMATS = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG", "jpeg": "JPEG"}
DECODED = (*IMAGE_FORMATS, "txt", "json")
MAX_PIXELS = 32_000_000  # a small file can claim a huge picture: refused before it is decoded
ADDRESS = re.compile(r" ?<\S+ object at 0x[0-9a-fA-F]+>")  # of an object in memory: another one in every run
LONGEST_CAPTION = 10_000  # characters; what is longer is a document, not a caption

# What Pillow and the codecs behind it raise for a damaged file.
PICTURE_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError),
    OverflowError,
)


class Sample(NamedTuple):
    """A decoded sample; `facts` is the content of its json file, empty where there is none."""

    image: Image.Image
    caption: str
    facts: dict[str, Any]


def decode(members: Mapping[str, bytes], where: str) -> Sample:
    """The sample whose files have these endings. Raises BadSample, which says `where`."""
    endings = [ending for ending in IMAGE_FORMATS if ending in members]
    if len(endings) != 1 or "txt" not in members:
        files = ", ".join(ending for ending in members if not ending.startswith("__")) or "nothing"
        reason = "no caption" if len(endings) == 1 else "several pictures" if endings else "no picture"
        expected = f"expected one picture ({', '.join(IMAGE_FORMATS)}) and one txt"
        raise BadSample(where, reason, f"got {files}, {expected}")
    caption = read_caption(members["txt"], where)
    facts = read_facts(members["json"], where) if "json" in members else {}
    return Sample(read_picture(members[endings[0]], where, [IMAGE_FORMATS[endings[0]]]), caption, facts)


def refuse_name(key: str, where: str) -> None:
    """BadSample for a key that is not UTF-8 in its tar: it has surrogates in place of those bytes."""
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise BadSample(where, "name not UTF-8", "got a name that is not UTF-8, expected text") from error


def read_caption(data: bytes, where: str) -> str:
    """The caption of a txt file, without the white space around it."""
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample(where, "caption not UTF-8", f"got a txt that is not UTF-8 (byte {error.start})") from error
    if len(text) > LONGEST_CAPTION:
        words = f"got a caption of {len(text)} characters, expected at most {LONGEST_CAPTION}"
        raise BadSample(where, "caption too long", words)
    if text.startswith("[") and text.endswith("]") and _is_list(text):
        raise BadSample(
            where, "caption is a list", 'got a JSON list as txt, expected text; lists go to json, "captions"'
        )
    return text


def _is_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def read_facts(data: bytes, where: str) -> dict[str, Any]:
    """The object in a json file."""
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(where, "json not valid", f"got no JSON ({type(error).__name__}), expected an object") from error
    if not isinstance(facts, dict):
        raise BadSample(where, "json not valid", f"got json of type {type(facts).__name__}, expected an object")
    return facts


def read_picture(
    source: bytes | Path,
    where: str,
    formats: Collection[str],
    ground: str = "white",
    max_pixels: int = MAX_PIXELS,
    animated: bool = True,
) -> Image.Image:
    """A picture file of one of Pillow's `formats` as RGB, upright, transparent parts on `ground`.

    Of an `animated` one the first picture is taken, if animated ones are wanted at all. Raises BadSample.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),  # refused here
            Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=list(formats)) as opened,
        ):
            width, height = opened.size
            if width * height > max_pixels:
                words = f"got {width}×{height} pixels, expected at most {max_pixels} in all"
                raise BadSample(where, "too many pixels", words)
            frames = getattr(opened, "n_frames", 1)
            if not animated and frames > 1 and opened.format != "MPO":
                raise BadSample(where, "animated", f"got {frames} pictures in one file, expected one")
            return upright_rgb(opened, ground)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        words = f"got a picture far too large, expected at most {max_pixels} pixels in all"
        raise BadSample(where, "too many pixels", words) from error
    except PICTURE_ERRORS as error:
        said = ADDRESS.sub("", str(error))
        words = f"{type(error).__name__} ({said}), expected a whole {' or '.join(formats)} file"
        raise BadSample(where, "torn picture", words) from error


def upright_rgb(image: Image.Image, ground: str = "white") -> Image.Image:
    """A picture of any mode as RGB, turned as its EXIF says, on `ground` where it is transparent.

    16-bit grey is scaled, which Pillow itself would clip. ValueError for modes whose range nobody knows.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise ValueError(f"mode {image.mode}, expected grey, RGB, CMYK or a palette")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    return image.convert("RGB")
