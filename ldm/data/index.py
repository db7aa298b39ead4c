"""Where every sample lies in its tar: read from the headers once, kept as one small file per shard, used for ever.

With it a sample is one `pread` away, whatever came before it, so that order, position and number of readers are free.
"""

import glob
import hashlib
import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset.tariterators import base_plus_ext

from ldm.cli import warn
from ldm.data.decoding import IMAGE_FORMATS, PICTURE_ERRORS, refuse_name
from ldm.data.shards import LARGEST_MEMBER, TORN, refuse_executable, refuse_open_end, regular_files, torn
from ldm.data.tally import BadSample, Fault, Tally
from ldm.errors import DataError
from ldm.files import appearing

FORMAT = 1
OPEN_AT_ONCE = 64  # shards that a process keeps open
ABSENT = (0, -1)
UNKNOWN = (1, 1)  # width and height of what does not say them; a square

Span = tuple[int, int]
"""Where a file begins in its tar, and its length in bytes, −1 for a file the sample does not have."""


class Measure(NamedTuple):
    """Width and height from the ending and the first `head` bytes of a file; None where they do not say."""

    head: int
    dimensions: Callable[[str, bytes], Span | None]


@dataclass(frozen=True)
class Table:
    """All samples of a set of shards, in the order of the shards and of the files in them.

    Memory: per sample its key and 16 bytes for each kind; processes that are forked share it.
    """

    shards: tuple[Path, ...]
    sizes: tuple[int, ...]  # of the shards, in bytes
    kinds: tuple[str, ...]
    shard: NDArray[np.int32]  # (n,)
    keys: NDArray[np.bytes_]  # (n,)
    spans: NDArray[np.int64]  # (n, kinds, 2)
    dimensions: NDArray[np.int32]  # (n, 2) width and height; empty where nobody asked
    tally: Tally  # what was seen and left out when the shards were indexed

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, sample: int) -> str:
        """The name of a sample within its shard."""
        return self.keys[sample].decode()

    def where(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.shards[self.shard[sample]]}: sample {self.key(sample)!r}"


def open_table(
    paths: Sequence[Path],
    kinds: Sequence[str],
    folder: Path | None = None,
    measure: Measure | None = None,
    tolerated: float = 0.01,
    keep: bool = True,
) -> Table:
    """The samples of the shards, with the files of these `kinds` (endings), from kept indices where they fit.

    An index is kept beside its shard, or in `folder`, under a name that changes with the shard's size and time. One
    with faults is not kept: it is read, and complained about, each time. DataError for shards without a sample, with
    files that can run code, or with more than a share `tolerated` of bad samples.
    """
    tally = Tally(tolerated, window=None)
    parts = [_indexed(path, tuple(kinds), folder, measure, tally, keep) for path in paths]
    if not any(len(part) for part in parts):
        why = tally.reasons() or "they are empty"
        raise DataError(f"{paths[0].parent}: 0 samples in {len(paths)} shards ({why}); prepare the data again")
    tally.end()
    return Table(
        shards=tuple(paths),
        sizes=tuple(path.stat().st_size for path in paths),
        kinds=tuple(kinds),
        shard=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts]),
        keys=np.concatenate([part["key"] for part in parts]),
        spans=np.concatenate([part["spans"] for part in parts]),
        dimensions=np.concatenate([part["dimensions"] for part in parts]) if measure else np.empty((0, 2), np.int32),
        tally=tally,
    )


def _indexed(
    path: Path, kinds: tuple[str, ...], folder: Path | None, measure: Measure | None, tally: Tally, keep: bool
) -> NDArray[Any]:
    """The rows of one shard, kept or new."""
    kept = index_path(path, kinds, folder, measured=measure is not None)
    rows, faults = _load(kept), list[Fault]()
    if rows is None:
        rows, faults = scan(path, kinds, measure)
        if keep and not faults:
            _keep(rows, kept)
    tally.add(len(rows) + len(faults), faults)
    tally.shard(str(path), torn=any(fault.reason == TORN for fault in faults))
    return rows


def _load(kept: Path) -> NDArray[Any] | None:
    """A kept index; None where there is none, or one that is torn."""
    try:
        rows: NDArray[Any] = np.load(kept, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return rows


def index_path(path: Path, kinds: tuple[str, ...], folder: Path | None, measured: bool) -> Path:
    """Where the index of a shard lies as long as the shard stays what it is."""
    state = path.stat()
    what = _short(FORMAT, path.absolute().as_posix(), kinds, measured)
    return (folder or path.parent) / f".{path.name}.{what}.{_short(state.st_size, state.st_mtime_ns)}.index.npy"


def _short(*values: object) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=6).hexdigest()


def _keep(rows: NDArray[Any], kept: Path) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with appearing(kept, shared=True) as temporary, temporary.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
            what = kept.name.removesuffix(".index.npy").rpartition(".")[0]
            for stale in kept.parent.glob(f"{glob.escape(what)}.*.index.npy"):
                stale.unlink(missing_ok=True)  # of what the shard was before
    except OSError as error:
        warn(f"{kept.parent}: cannot keep an index there: {error.strerror}; name a folder as `index`")


def scan(path: Path, kinds: tuple[str, ...], measure: Measure | None = None) -> tuple[NDArray[Any], list[Fault]]:
    """A row for every whole sample of a shard, and what is wrong with the others. Only headers are read.

    A sample is left out if its files lie apart, come twice or are too large; of a torn shard the samples before the
    tear are kept.
    """
    faults: list[Fault] = []
    found: dict[str, dict[str, Span]] = {}
    bad: set[str] = set()
    last = ""
    try:
        for key, ending, span in _members(path, faults):
            refuse_executable([ending], str(path))
            if key not in found and (fault := _fault_of_name(path, key)):
                bad.add(key)
                faults.append(fault)
            if key in found and key != last and key not in bad:
                bad.add(key)
                faults.append(_fault(path, key, "files apart", "its files have others between them"))
            if ending in found.setdefault(key, {}) and key not in bad:
                bad.add(key)
                faults.append(_fault(path, key, "file given twice", f"two files .{ending}"))
            if span[1] > LARGEST_MEMBER and key not in bad:
                bad.add(key)
                faults.append(_fault(path, key, "file too large", f".{ending} has {span[1]} bytes"))
            found[key][ending] = span
            last = key
    except (tarfile.TarError, EOFError, OSError) as error:
        faults.append(Fault(str(path), TORN, torn(error)))
        bad.add(last)  # nobody knows whether it was whole
    good = {key: files for key, files in found.items() if key not in bad}
    widest = max((len(key.encode()) for key in good), default=1)
    layout = [("key", f"S{widest}"), ("spans", "<i8", (len(kinds), 2)), ("dimensions", "<i4", (2,))]
    rows = np.zeros(len(good), dtype=layout)
    with path.open("rb") as file:
        for row, (key, files) in zip(rows, good.items(), strict=True):
            row["key"] = key.encode()
            row["spans"] = [files.get(kind, ABSENT) for kind in kinds]
            row["dimensions"] = _dimensions(file.fileno(), files, measure) if measure else (0, 0)
    return rows, faults


def _fault_of_name(path: Path, key: str) -> Fault | None:
    try:
        refuse_name(key, f"{path}: sample {key!r}")
    except BadSample as error:
        return error.fault
    return None


def _fault(path: Path, key: str, reason: str, words: str) -> Fault:
    return Fault(f"{path}: sample {key!r}", reason, f"{words}, expected each file once, in a row, below 64 MB")


def _members(path: Path, faults: list[Fault]) -> Iterator[tuple[str, str, Span]]:
    """Key, ending and place of every file in a tar; the error of a tear comes behind the file that is torn."""
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in regular_files(tar):
            key, ending = base_plus_ext(member.name)
            if key is None:
                faults.append(Fault(str(path), "file without ending", f"got {member.name}, expected <key>.<ending>"))
                continue
            yield key, ending.lower(), (member.offset_data, member.size)
        refuse_open_end(file, tar)


def _dimensions(descriptor: int, files: dict[str, Span], measure: Measure) -> Span:
    """Width and height of a sample; UNKNOWN where its files do not say, which then fail when they are read."""
    for ending, (offset, size) in files.items():
        found = measure.dimensions(ending, os.pread(descriptor, min(size, measure.head), offset))
        if found is None and size > measure.head:
            found = measure.dimensions(ending, os.pread(descriptor, size, offset))
        if found is not None:
            return found
    return UNKNOWN


def picture_dimensions(ending: str, head: bytes) -> Span | None:
    """Width and height of a picture from the first bytes of its file, for JPEG as its EXIF turns it."""
    if ending not in IMAGE_FORMATS:
        return None
    try:
        with Image.open(io.BytesIO(head), formats=[IMAGE_FORMATS[ending]]) as image:
            turned = image.format == "JPEG" and image.getexif().get(0x0112, 1) >= 5
            return (image.height, image.width) if turned else image.size
    except (*PICTURE_ERRORS, Image.DecompressionBombError):
        return None


PICTURES = Measure(2**16, picture_dimensions)


class Reader:
    """Bytes of samples, from at most OPEN_AT_ONCE open shards; `pread` leaves no position that readers could share."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._open: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[type["Reader"], tuple[Table]]:
        return Reader, (self.table,)  # descriptors do not travel to other processes

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def files(self, sample: int) -> dict[str, bytes]:
        """The files of a sample by their ending. Raises BadSample where the shard gives less than it promised."""
        descriptor = self.descriptor(int(self.table.shard[sample]))
        found = {}
        for kind, (offset, size) in zip(self.table.kinds, self.table.spans[sample].tolist(), strict=True):
            if size < 0:
                continue
            found[kind] = os.pread(descriptor, size, offset)
            if len(found[kind]) != size:
                raise BadSample(self.table.where(sample), TORN, f"got {len(found[kind])} of {size} bytes")
        return found

    def descriptor(self, shard: int) -> int:
        """An open shard. DataError where it is not what was indexed."""
        known = self._open.get(shard)
        if known is not None:
            self._open.move_to_end(shard)
            return known
        path = self.table.shards[shard]
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(
                f"{path}: {error.strerror}; the shard was there when the run began, bring it back"
            ) from error
        if (size := os.fstat(descriptor).st_size) != self.table.sizes[shard]:
            os.close(descriptor)
            raise DataError(
                f"{path}: got {size} bytes, expected {self.table.sizes[shard]}; the shard was changed, start again"
            )
        self._open[shard] = descriptor
        if len(self._open) > OPEN_AT_ONCE:
            os.close(self._open.popitem(last=False)[1])
        return descriptor
