"""Pictures with captions from anywhere (shards, a folder, a list), and what the judges' networks see in them."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ldm.data.decoding import IMAGE_FORMATS, read_caption, read_picture
from ldm.data.shards import find_shards, read_shard
from ldm.data.tally import BadSample, Tally
from ldm.data.transforms import fit
from ldm.errors import DataError
from ldm.evaluation.figures import Array
from ldm.evaluation.towers import Extractor
from ldm.images import to_tensor
from ldm.prompts import read_lines

PIXELS_SIDE = 32  # that of CIFAR, for whose pictures Carlini et al. 2023 measured copies
THUMBNAIL = 128
BATCH = 32


class Captioned(NamedTuple):
    """One picture; the caption is empty where nobody wrote one."""

    name: str
    image: Image.Image
    caption: str


Pictures = Callable[[], Iterator[Captioned]]
"""Pictures that can be gone through more than once, always in the same order."""


class Asked(NamedTuple):
    """What is asked for: the prompt to draw, and the caption that a judge holds the picture against."""

    prompt: str
    caption: str


# Sources --------------------------------------------------------------------------------------------------------


def find_pictures(source: str, limit: int | None = None) -> Pictures:
    """The first `limit` pictures of shards (a folder or pattern of .tar), of a folder of pictures, or of a list.

    In a folder the caption of NAME.png is in NAME.txt, if there is one. A list is a .json or .jsonl file of records
    {"image": path from the file on, "caption": text}. Raises DataError, at once where nothing is there.
    """
    path = Path(source)
    if path.suffix in (".json", ".jsonl"):
        records = _records(path)
        pictures = [(path.parent / str(r.get("image", "")), str(r.get("caption", ""))) for r in records]
        return lambda: islice((_read(image, caption) for image, caption in pictures), limit)
    if path.is_dir() and not any(path.glob("*.tar")):
        files = sorted(file for file in path.iterdir() if _format(file) is not None and not file.name.startswith("."))
        if not files:
            raise DataError(f"{path}: no .tar and no picture ({', '.join(IMAGE_FORMATS)}) in it; name another folder")
        return lambda: islice((_read(file, _caption_beside(file)) for file in files), limit)
    shards = find_shards(source)
    return lambda: islice(_of_shards(shards), limit)


def _of_shards(shards: Sequence[Path]) -> Iterator[Captioned]:
    tally = Tally()
    for shard in shards:
        for name, sample in read_shard(shard, tally):
            yield Captioned(name, sample.image, sample.caption)


def _format(path: Path) -> str | None:
    return IMAGE_FORMATS.get(path.suffix.lower().removeprefix("."))


def _read(path: Path, caption: str) -> Captioned:
    """One picture file. Raises DataError for one that is missing or damaged."""
    known = _format(path)
    if known is None or not path.is_file():
        raise DataError(f"{path}: no such picture; expected one of {', '.join(IMAGE_FORMATS)}, correct the list")
    with _nothing_is_left_out():
        return Captioned(path.stem, read_picture(path, str(path), [known]), caption)


def _caption_beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    with _nothing_is_left_out():
        return read_caption(text.read_bytes(), str(text)) if text.is_file() else ""


@contextmanager
def _nothing_is_left_out() -> Iterator[None]:
    """Turns a sample that is bad into the error that ends the evaluation."""
    try:
        yield
    except BadSample as error:
        raise DataError(f"{error.fault.where}: {error.fault.words}; replace or remove it") from error


def _records(path: Path) -> list[dict[str, Any]]:
    """The objects of a .json list or of a .jsonl file. Raises DataError for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
        else:
            found = [json.loads(line) for line in text.split("\n") if line.strip()]  # captions may have U+2028 in them
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a list that is there") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); one object a line in .jsonl, a list of them in .json") from None
    if not isinstance(found, list) or not found or not all(isinstance(record, dict) for record in found):
        raise DataError(f"{path}: got no list of objects, expected one; write one object a line, or a JSON list")
    return found


def read_prompts(path: Path) -> list[Asked]:
    """A text file with one prompt a line, or a list of records with "prompt", "caption" or both.

    Raises DataError for a file without prompts and for a record without words.
    """
    if path.suffix not in (".json", ".jsonl"):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; give a text file with one prompt a line") from None
        return [Asked(line.strip(), line.strip()) for _, line in read_lines(data, str(path))]
    asked = []
    for number, record in enumerate(_records(path), start=1):
        prompt = record.get("prompt") or record.get("caption")
        caption = record.get("caption") or prompt
        if not isinstance(prompt, str) or not isinstance(caption, str):
            raise DataError(f"{path}: record {number} has no text as prompt or caption; give one of the two")
        asked.append(Asked(prompt, caption))
    return asked


def recaptioned(pictures: Pictures, asked: Sequence[Asked]) -> Pictures:
    """Pictures with other captions, in order. Raises DataError where there are not as many."""

    def renamed() -> Iterator[Captioned]:
        remaining = pictures()
        for one in asked:
            picture = next(remaining, None)
            if picture is None:
                break
            yield picture._replace(caption=one.caption)
        else:
            if next(remaining, None) is None:
                return
        raise DataError(f"--prompts: {len(asked)} of them, another number of --pictures; give one line for each")

    return renamed


# Looking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What was seen of n pictures: features (n d) by the extractor's sha256, and a digest of pixels and captions."""

    names: tuple[str, ...]
    captions: tuple[str, ...]
    features: dict[str, Array]
    sha256: str
    thumbnails: tuple[Image.Image, ...]

    def __len__(self) -> int:
        return len(self.names)


def thumbnail(image: Image.Image) -> Image.Image:
    """A small picture for a report."""
    return fit(image, (THUMBNAIL, THUMBNAIL))


def pixels() -> Extractor:
    """Pictures of 32 × 32 pixels as they are, in [0, 1]: what copies are looked for in."""
    name = f"pixels {PIXELS_SIDE}"
    return Extractor(name, name, PIXELS_SIDE, lambda images: (images.flatten(1) + 1) / 2)


def look(pictures: Pictures, extractors: Sequence[Extractor], thumbnails: int = 0) -> Iterator[int | Look]:
    """Go through pictures once, with all extractors; yields how many are done, and last the look.

    An extractor sees the largest square in the middle, resampled to its side. Raises DataError for no pictures at all.
    """
    digest, small = hashlib.sha256(), list[Image.Image]()
    names, captions = list[str](), list[str]()
    eyes = {extractor.sha256: extractor for extractor in extractors}  # one file may be given for two purposes
    rows: dict[str, list[Array]] = {name: [] for name in eyes}
    remaining = pictures()
    while batch := list(islice(remaining, BATCH)):
        for name, image, caption in batch:
            image = image.convert("RGB")
            digest.update(f"{image.size} {caption}\n".encode())
            digest.update(image.tobytes())
            names.append(name)
            captions.append(caption)
            if len(small) < thumbnails:
                small.append(thumbnail(image))
        for extractor in eyes.values():
            rows[extractor.sha256].append(_features(extractor, [picture.image for picture in batch]))
        yield len(names)
    if not names:
        raise DataError("pictures: there is none; name others")
    features = {name: np.concatenate(found) for name, found in rows.items()}
    yield Look(tuple(names), tuple(captions), features, digest.hexdigest(), tuple(small))


def _features(extractor: Extractor, images: Sequence[Image.Image]) -> Array:
    size = (extractor.side, extractor.side)
    batch = torch.stack([to_tensor(fit(image.convert("RGB"), size)) for image in images])
    return np.asarray(extractor.embed(batch).double().cpu().numpy())
