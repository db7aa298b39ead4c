"""Captioned pictures as people keep them: a folder, a CSV, JSONL or Parquet table, or shards made elsewhere.

Every source gives its records in an order that depends on nothing but its content, and a reject in place of one that
cannot be a sample, so that counts add up.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.decoding import IMAGE_FORMATS
from ldm.errors import DataError, MachineError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SIDECAR = "metadata.jsonl"  # the name that Hugging Face's imagefolder gives it
PICTURE_COLUMNS = ("file_name", "image", "path", "file", "filename")
CAPTION_COLUMNS = ("captions", "caption", "text", "prompt")


@dataclass(frozen=True)
class Record:
    """A picture, as a file or as its bytes, with captions (the first is the main one) and facts; not looked at yet."""

    origin: str
    picture: Path | bytes
    captions: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """What does not become a sample, with a reason to count by and the words."""

    origin: str
    reason: str
    words: str


Records = Iterator[Record | Reject]
Row = Mapping[str, Any] | Reject


def from_folder(folder: Path) -> Records:
    """Pictures of a folder and those in it, by name; captions from `<name>.txt` beside each, or from metadata.jsonl."""
    if (folder / SIDECAR).is_file():
        yield from from_jsonl(folder / SIDECAR)
        return
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    if not paths:
        raise DataError(f"{folder}: no pictures there, expected {', '.join(PICTURES)}; check the path")
    for path in paths:
        origin = path.relative_to(folder).as_posix()
        sidecar = path.with_suffix(".txt")
        if not sidecar.is_file():
            yield Reject(origin, "no caption", f"no {sidecar.name} beside it")
            continue
        try:
            yield Record(origin, path, (sidecar.read_text(encoding="utf-8-sig").strip(),))
        except UnicodeDecodeError:
            yield Reject(origin, "caption not UTF-8", f"{sidecar.name} is not UTF-8 text")


def from_csv(path: Path, picture: str = "", caption: str = "") -> Records:
    """Rows of a CSV file whose first line names the columns; pictures are files, relative to the table's folder."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _ = reader.fieldnames  # read here: behind a line that is no CSV the next one would be taken for them
        except csv.Error as error:
            raise DataError(f"{path}: no names of columns ({error}); export the table again") from None
        yield from _from_rows(_csv_rows(reader, path), path, picture, caption)


def _csv_rows(reader: "csv.DictReader[str]", path: Path) -> Iterator[Row]:
    """The rows; behind one that is no CSV reading goes on at the next line."""
    while True:
        first = reader.reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            last = reader.reader.line_num
            yield Reject(f"{path.name}:{last}", "bad row", f"no CSV in lines {first} to {last} ({error})")
            continue
        if row is None:
            return
        if None in row or None in row.values():
            yield Reject(f"{path.name}:{reader.line_num}", "bad row", "more or fewer values than columns")
        else:
            yield row


def from_jsonl(path: Path, picture: str = "", caption: str = "") -> Records:
    """Lines that are JSON objects; pictures are files, relative to the table's folder."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        yield from _from_rows(_json_rows(file, path), path, picture, caption)


def _json_rows(lines: Iterable[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield row if isinstance(row, dict) else Reject(f"{path.name}:{number}", "bad row", "no JSON object")


def from_parquet(path: Path, picture: str = "", caption: str = "") -> Records:
    """Rows of a Parquet file; pictures are files, bytes, or Hugging Face's {bytes, path}."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MachineError(f"{path}: reading Parquet needs pyarrow; pip install '.[parquet]', or give CSV") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(256) for row in batch.to_pylist())
            yield from _from_rows(rows, path, picture, caption)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: no whole Parquet file ({error}); copy it again") from None


def from_shards(source: Path) -> Records:
    """Samples of shards made elsewhere, by shard and place; what is bad in them becomes a reject."""
    from ldm.data.shards import TornShard, find_shards, shard_samples
    from ldm.data.tally import Fault

    for path in find_shards(source):
        faults: list[Fault] = []
        with path.open("rb") as file:
            try:
                for encoded in shard_samples(file, str(path), faults.append):
                    yield from _rejects(faults)
                    yield from_members(encoded, f"{path.name}:{encoded['__key__']}")
            except TornShard as error:
                faults.append(error.fault)
        yield from _rejects(faults)


def _rejects(faults: "list[Any]") -> Iterator[Reject]:
    while faults:
        fault = faults.pop(0)
        yield Reject(fault.where, fault.reason, fault.words)


def from_members(members: Mapping[str, Any], origin: str) -> Record | Reject:
    """The record in the files of a sample."""
    from ldm.data.captions import all_captions
    from ldm.data.decoding import read_caption, read_facts
    from ldm.data.tally import BadSample

    pictures = [members[ending] for ending in IMAGE_FORMATS if ending in members]
    if len(pictures) != 1:
        return Reject(origin, "no picture" if not pictures else "several pictures", f"{len(pictures)} pictures")
    try:
        caption = read_caption(members["txt"], origin) if "txt" in members else ""
        facts = read_facts(members["json"], origin) if "json" in members else {}
    except BadSample as error:
        return Reject(*error.fault)
    return Record(origin, pictures[0], all_captions(caption, facts), facts)


def _from_rows(rows: Iterable[Row], path: Path, picture: str, caption: str) -> Records:
    """Rows of a table as records. DataError where it has no column for the pictures or the captions."""
    seen: set[str] = set()
    columns: tuple[str, str] | None = None
    for number, row in enumerate(rows, 1):
        if isinstance(row, Reject):
            yield row
            continue
        columns = columns or (
            _column(row, picture, PICTURE_COLUMNS, "--image-column", path),
            _column(row, caption, CAPTION_COLUMNS, "--caption-column", path),
        )
        record = _record(row, path, *columns, f"{path.name}:row {number}")
        if isinstance(record, Record):
            if record.origin in seen:
                record = Reject(record.origin, "listed twice", f"row {number} of {path.name} names it again")
            seen.add(record.origin)
        yield record


def _column(row: Mapping[str, Any], given: str, usual: tuple[str, ...], flag: str, path: Path) -> str:
    names = [name for name in ((given,) if given else usual) if name in row]
    if not names:
        expected = given or " or ".join(usual)
        raise DataError(f"{path}: got columns {', '.join(map(str, row))}, expected {expected}; name it with {flag}")
    return names[0]


def _record(row: Mapping[str, Any], path: Path, picture: str, caption: str, origin: str) -> Record | Reject:
    value, words = row.get(picture), row.get(caption)
    given = tuple(words) if isinstance(words, list | tuple) else (words,)
    if not all(isinstance(text, str) for text in given):
        return Reject(origin, "no caption", f"{caption} is no text")
    facts = {k: v for k, v in row.items() if k not in (picture, caption) and isinstance(v, str | int | float | bool)}
    captions = tuple(text.strip() for text in given)
    if isinstance(value, Mapping):  # Hugging Face's form of a picture in Parquet
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Record(origin, value, captions, facts)
    if not isinstance(value, str) or not value:
        return Reject(origin, "bad row", f"{picture} names no file")
    if "://" in value:
        return Reject(value, "remote picture", "an address, expected a file: nothing is downloaded")
    file = path.parent / value
    if not file.is_file():
        return Reject(value, "missing file", "no such file")
    return Record(value, file, captions, facts)


TABLES: dict[str, Callable[[Path, str, str], Records]] = {
    "csv": from_csv,
    "jsonl": from_jsonl,
    "parquet": from_parquet,
}
