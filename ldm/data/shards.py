"""WebDataset shards in and out: tar files of pictures with captions, in a form that runs no foreign code.

A sample is the files that share a name up to the first dot: `<key>.png` (or webp, jpg, jpeg), `<key>.txt` with the
caption, and optionally `<key>.json` with facts. Shards are opened here as plain files, never by a URL, so that
neither `pipe:` nor a download can hide in a name; WebDataset groups, shuffles and decodes what is in them.
"""

import io
import itertools
import json
import logging
import os
import random
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

os.environ["WDS_SECURE"] = "1"  # read by webdataset when it is imported, here and in child processes
import webdataset
import webdataset.utils
from braceexpand import braceexpand
from PIL import Image, ImageOps
from webdataset.autodecode import Decoder, DecodingError
from webdataset.tariterators import group_by_keys, tar_file_expander

from ldm.errors import DataError

webdataset.utils.enforce_security = True  # also where somebody else imported it first

IMAGE_FORMATS = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG", "jpeg": "JPEG"}
DECODED = (*IMAGE_FORMATS, "txt", "json")
EXECUTABLE = frozenset({"pickle", "pkl", "pyd", "pth", "pt", "ckpt", "joblib", "dill"})
"""Endings of files that can run code when they are read; a shard with one of them is refused."""

SHUFFLE_BUFFER = 1000  # samples, still encoded
TOLERATED = 0.01  # share of bad samples above which a data set is called bad

_TAR_END = bytes(2 * tarfile.BLOCKSIZE)

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """A decoded sample; `facts` is the content of its json file, empty where there is none."""

    image: Image.Image
    caption: str
    facts: dict[str, Any]


# Writing -------------------------------------------------------------------------------------------------------


def write_shards(
    samples: Iterable[Mapping[str, object]], folder: Path, shard_size: int, prefix: str, start: int = 0
) -> list[Path]:
    """Write samples {"__key__", "png": bytes, "txt": str, "json": dict} as <prefix>-00000.tar, …; the paths written.

    A shard appears whole or not at all, and the same samples make the same bytes. `start` is the number of the first
    shard, so that an interrupted run can go on. DataError where a shard exists already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remaining = iter(samples)
    written: list[Path] = []
    for number in itertools.count(start):
        batch = list(itertools.islice(remaining, shard_size))
        if not batch:
            return written
        path = shard_path(folder, prefix, number)
        if path.exists():
            raise DataError(f"{path}: exists already, expected a new name; delete it, resume, or choose another folder")
        _write_shard(batch, path)
        written.append(path)
    raise AssertionError("unreachable")


def shard_path(folder: Path, prefix: str, number: int) -> Path:
    """Where the shard of this number lies."""
    return folder / f"{prefix}-{number:05d}.tar"


def _write_shard(samples: Sequence[Mapping[str, object]], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
                for sample in samples:
                    tar.write({name: _member(name, value) for name, value in sample.items()})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _member(name: str, value: object) -> object:
    """What TarWriter takes: the key as text, everything else as bytes, text and facts in UTF-8."""
    if name == "__key__" or isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()


# Reading -------------------------------------------------------------------------------------------------------


def find_shards(source: str | Path | Iterable[str | Path]) -> list[Path]:
    """The shards that a folder, a pattern (`*`, `?`, `{00000..00009}`) or a list of paths names, in order of name."""
    if not isinstance(source, str | Path):
        paths = [Path(path) for path in source]
    elif Path(source).is_dir():
        paths = list(Path(source).glob("*.tar"))
    else:
        paths = [path for pattern in braceexpand(str(source)) for path in _glob(Path(pattern))]
    if not paths:
        raise DataError(f"{source}: no shards there, expected .tar files; check the path, or prepare the data first")
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such shard, expected a .tar file; check the path")
    return sorted(paths)


def _glob(pattern: Path) -> list[Path]:
    """Wildcards are for the file's name only; a name without any is taken as it is."""
    return list(pattern.parent.glob(pattern.name)) if any(c in pattern.name for c in "*?[") else [pattern]


def read_samples(
    source: str | Path | Iterable[str | Path],
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Sample]:
    """Samples of the shards, for `epochs` rounds or without end, in an order that (seed, epoch) alone decides.

    `part` (index, of how many) takes every so-manyth shard, so that processes share the work. Bad samples are
    logged by name and left out. DataError, at once where no shard is there, and while reading for a torn shard, a
    pickle, or more than 1 % bad samples.
    """
    paths = find_shards(source)
    _, parts = part
    if len(paths) < parts:
        raise DataError(
            f"{paths[0].parent}: got {len(paths)} shards, expected at least one for each of the {parts} readers; "
            "write smaller shards, or use fewer processes and workers"
        )
    rounds = itertools.count() if epochs is None else range(epochs)
    return itertools.chain.from_iterable(_epoch(paths, f"{seed} {epoch}", shuffle, part) for epoch in rounds)


def _epoch(paths: list[Path], seed: str, shuffle: bool, part: tuple[int, int]) -> Iterator[Sample]:
    """One round over a part of the shards. All parts share the order of shards; within it each has its own."""
    index, parts = part
    if not shuffle:
        return _decoded_samples(_encoded_samples(paths[index::parts]))
    order = random.Random(f"shards {seed}").sample(paths, len(paths))
    rng = random.Random(f"samples {seed} {index}")
    mixed = webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng)
    return _decoded_samples(mixed(_encoded_samples(order[index::parts])))


def check_shard(path: Path) -> tuple[int, list[str]]:
    """How many good samples a shard has, and a line for every fault found in it."""
    good, faults = 0, []
    try:
        for encoded in _encoded_samples([path]):
            try:
                _decode(encoded)
                good += 1
            except DataError as error:
                faults.append(str(error))
    except DataError as error:
        faults.append(str(error))
    return good, faults


@dataclass
class _Tally:
    """Counts samples while they pass; bad ones are too many once they would spoil 1 % of a buffer's worth."""

    seen: int = 0
    bad: int = 0

    def check(self, least: int) -> None:
        if self.bad > TOLERATED * max(self.seen, least):
            raise DataError(
                f"shards: got {self.bad} bad samples among {self.seen}, expected at most {TOLERATED:.0%}; "
                "they are named in the log; prepare the data again"
            )


def _decoded_samples(encoded: Iterable[dict[str, Any]]) -> Iterator[Sample]:
    tally = _Tally()
    for sample in encoded:
        tally.seen += 1
        try:
            decoded = _decode(sample)
        except DataError as error:
            tally.bad += 1
            log.warning("%s", error)
            tally.check(least=SHUFFLE_BUFFER)
        else:
            yield decoded
    tally.check(least=0)


def _encoded_samples(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Samples as bytes by file ending, with "__key__" and "__url__" (the shard's path)."""
    for path in paths:
        with path.open("rb") as file:
            # A tar file ends in two blocks of zeros; nothing else tells that one was cut short.
            file.seek(max(0, path.stat().st_size - len(_TAR_END)))
            if path.suffix == ".tar" and file.read() != _TAR_END:
                raise DataError(f"{path}: torn or no tar file (its end is missing); copy or prepare this shard again")
            file.seek(0)
            yield from _shard_samples(path, file)


def _shard_samples(path: Path, file: BinaryIO) -> Iterator[dict[str, Any]]:
    members = tar_file_expander([{"url": str(path), "stream": file}])
    samples = group_by_keys(members)
    while True:
        try:
            sample = next(samples)
        except StopIteration:
            return
        except (tarfile.TarError, EOFError, ValueError) as error:
            reason = str(error.args[0] if error.args else error).split(" @ ")[0]
            raise DataError(f"{path}: torn or no tar file ({reason}); copy or prepare this shard again") from error
        for ending in sample:
            if EXECUTABLE.intersection(ending.split(".")):
                raise DataError(
                    f"{path}: {sample['__key__']}.{ending} can run code when it is read, expected only "
                    f"{', '.join(DECODED)}; do not use this shard"
                )
        yield sample


def _decode(sample: dict[str, Any]) -> Sample:
    """The picture as RGB, the caption and the facts; files of other kinds are not looked at."""
    where = f"{sample['__url__']}: sample {sample['__key__']!r}"
    try:
        decoded = _DECODER(sample)
    except DecodingError as error:
        cause = error.__cause__
        raise DataError(f"{where}: {type(cause).__name__} ({cause}), expected whole files; left out") from error
    images = [decoded[ending] for ending in IMAGE_FORMATS if ending in decoded]
    if len(images) != 1 or "txt" not in decoded:
        files = ", ".join(ending for ending in sample if not ending.startswith("__")) or "nothing"
        raise DataError(
            f"{where}: got {files}, expected one picture ({', '.join(IMAGE_FORMATS)}) and one txt; left out"
        )
    facts = decoded.get("json", {})
    if not isinstance(facts, dict):
        raise DataError(f"{where}: got json of type {type(facts).__name__}, expected an object; left out")
    return Sample(images[0], decoded["txt"].strip(), facts)


def _decode_image(name: str, data: bytes) -> Image.Image | None:
    """A picture file as RGB, upright, transparent parts on white; None for a file of another kind."""
    format_ = IMAGE_FORMATS.get(name.rpartition(".")[2].lower())
    if format_ is None:
        return None
    with Image.open(io.BytesIO(data), formats=[format_]) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _decode_json(name: str, data: bytes) -> object:
    return json.loads(data) if name.rpartition(".")[2].lower() == "json" else None


def _decode_text(name: str, data: bytes) -> str | None:
    return data.decode() if name.rpartition(".")[2].lower() == "txt" else None


# No handlers before or after ours: webdataset's own would unzip, and decode many more kinds.
_DECODER = Decoder([_decode_image, _decode_json, _decode_text], pre=[], post=[], only=list(DECODED))
