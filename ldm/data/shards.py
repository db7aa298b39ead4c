"""WebDataset shards in and out: tar files of pictures with captions, in a form that runs no foreign code.

A sample is the files that share a name up to the first dot: `<key>.png` (or webp, jpg, jpeg), `<key>.txt` with the
caption, and optionally `<key>.json` with facts. Shards are opened here as plain files, never by a URL, so that
neither `pipe:` nor a download can hide in a name; WebDataset groups and shuffles what is in them.
"""

import io
import itertools
import json
import os
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

os.environ["WDS_SECURE"] = "1"  # read by webdataset when it is imported, here and in child processes
import webdataset
import webdataset.utils
from braceexpand import braceexpand
from webdataset.tariterators import base_plus_ext, group_by_keys

from ldm.data.captions import all_captions, without_words
from ldm.data.decoding import DECODED, Sample, decode, refuse_name
from ldm.data.tally import BadSample, Fault, Tally
from ldm.errors import DataError, SettingError
from ldm.files import appearing

webdataset.utils.enforce_security = True  # also where somebody else imported it first

EXECUTABLE = frozenset({"pickle", "pkl", "pyd", "pth", "pt", "ckpt", "joblib", "dill"})
"""Endings of files that can run code when they are read; a shard with one of them is refused."""

SHUFFLE_BUFFER = 1000  # samples, still encoded
LARGEST_MEMBER = 64 * 2**20  # bytes; a larger file in a shard is counted as bad and not read

TORN = "torn shard"
_TEAR = "__torn__"  # in place of an ending: the error that ended a shard within this sample

EncodedSample = dict[str, Any]
"""Files of a sample as bytes by their ending, with "__key__" and "__url__" (where the shard lies)."""


class TornShard(DataError):
    """A shard that cannot be read to its end."""

    def __init__(self, name: str, words: str) -> None:
        self.fault = Fault(name, TORN, words)
        super().__init__(f"{name}: {words}")


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
        write_shard(batch, path)
        written.append(path)
    raise AssertionError("unreachable")


def shard_path(folder: Path, prefix: str, number: int) -> Path:
    """Where the shard of this number lies."""
    return folder / f"{prefix}-{number:05d}.tar"


def write_shard(samples: Iterable[Mapping[str, object]], path: Path) -> int:
    """Write one shard, whole or not at all, in place of one of its name; returns the number of samples.

    ValueError for keys that would not be read back: one given twice, an empty one, one with a dot.
    """
    keys: set[object] = set()
    with (
        appearing(path, shared=True) as temporary,
        temporary.open("wb") as file,
        webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False) as tar,
    ):
        for sample in samples:
            key = str(sample["__key__"])
            if key in keys or not key or "." in key.rpartition("/")[2]:
                raise ValueError(f"{path}: key {key!r}, expected one that is new and has no dot")
            keys.add(key)
            tar.write({name: _member(name, value) for name, value in sample.items()})
    return len(keys)


def _member(name: str, value: object) -> object:
    """What TarWriter takes: the key as text, everything else as bytes, text and facts in UTF-8."""
    if name == "__key__" or isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()


# Reading -------------------------------------------------------------------------------------------------------


def find_shards(source: str | Path | Iterable[str | Path]) -> list[Path]:
    """The shards that a folder, a pattern (`*`, `?`, `{00000..00009}`) or a list of paths names, in order of name."""
    sources = [source] if isinstance(source, str | Path) else list(source)
    paths = [path for one in sources for path in _named(one)]
    if not paths:
        raise DataError(
            f"{source or 'shards'}: 0 shards match, expected .tar files; check the path, or prepare the data first"
        )
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such shard, expected a .tar file; check the path")
    return sorted(set(paths))


def _named(source: str | Path) -> list[Path]:
    """The paths that one folder, pattern or path stands for."""
    text = str(source)
    if text.startswith("pipe:"):
        raise SettingError(f"{text}: a command, expected the path of .tar files; commands in data paths are never run")
    if "://" in text:
        raise DataError(f"{text}: a remote address, expected local .tar files; read it in mode streaming, or copy it")
    if Path(source).is_dir():
        return list(Path(source).glob("*.tar"))
    return [path for pattern in expanded(text) for path in _glob(Path(pattern))]


def expanded(pattern: str) -> list[str]:
    """The paths or addresses that one with braces stands for."""
    try:
        return list(braceexpand(pattern))
    except ValueError:  # its UnbalancedBracesError, which its type stubs do not have
        raise SettingError(f"{pattern}: got unbalanced braces, expected {{first..last}}; close them") from None


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
    tally = Tally()
    order = random.Random(f"shards {seed}").sample(paths, len(paths)) if shuffle else paths
    encoded = _encoded_samples(order[index::parts], tally)
    if shuffle:
        rng = random.Random(f"samples {seed} {index}")
        encoded = webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng)(encoded)
    for sample in encoded:
        try:
            decoded = decode_named(sample)
        except BadSample as error:
            tally.add(1, [error.fault])
        else:
            tally.add(1)
            yield decoded
    tally.end()


def _encoded_samples(paths: Iterable[Path], tally: Tally) -> Iterator[EncodedSample]:
    for path in paths:
        with path.open("rb") as file:
            yield from shard_samples(file, str(path), lambda fault: tally.add(1, [fault]))


def read_shard(path: Path, tally: Tally, need_words: bool = False) -> Iterator[tuple[str, Sample]]:
    """Key and content of every good sample of one shard, in order; the others are counted. DataError for a torn one.

    With `need_words` samples without a caption are bad.
    """
    for encoded in _encoded_samples([path], tally):
        try:
            decoded = decode_named(encoded)
            if need_words and not all_captions(decoded.caption, decoded.facts):
                raise without_words(where(encoded))
        except BadSample as error:
            tally.add(1, [error.fault])
        else:
            tally.add(1)
            yield encoded["__key__"], decoded


def check_shard(path: Path) -> tuple[int, list[str]]:
    """How many good samples a shard has, and a line for every fault found in it."""
    good, faults = 0, []
    try:
        with path.open("rb") as file:
            for encoded in shard_samples(file, str(path), lambda fault: faults.append(str(fault))):
                try:
                    decode_named(encoded)
                    good += 1
                except DataError as error:
                    faults.append(str(error))
    except DataError as error:
        faults.append(str(error))
    return good, faults


def decode_named(sample: EncodedSample) -> Sample:
    """The sample, whose name is text. Raises BadSample."""
    refuse_name(sample["__key__"], where(sample))
    return decode(sample, where(sample))


def where(sample: EncodedSample) -> str:
    """Shard and key of a sample, for messages."""
    return f"{sample['__url__']}: sample {sample['__key__']!r}"


def shard_samples(stream: BinaryIO, name: str, report: Callable[[Fault], None]) -> Iterator[EncodedSample]:
    """The samples of one shard, still encoded; what is wrong with single ones is reported, and they are left out.

    Raises TornShard, behind the whole samples before it, where the shard is torn or is no tar file, and DataError for a
    file that can run code.
    """

    def twice(error: Exception) -> bool:
        if not isinstance(error, ValueError):
            raise error
        words = f"{str(error.args[0]).split(':')[0]}: twice in the shard, expected once; the first is taken"
        report(Fault(name, "file given twice", words))
        return True

    seen: set[str] = set()
    for sample in group_by_keys(_files(stream, name, report), handler=twice):
        if _TEAR in sample:
            raise TornShard(name, torn(sample[_TEAR])) from sample[_TEAR]
        refuse_executable(sample, name)
        if sample["__key__"] in seen:  # the files of a sample must lie side by side
            report(
                Fault(where(sample), "files apart", "got its files with others between them, expected them in a row")
            )
            continue
        seen.add(sample["__key__"])
        yield sample


def torn(error: Exception) -> str:
    """What to say of a shard that cannot be read to its end."""
    reason = str(error.args[0] if error.args else error)
    return f"torn or no tar file ({reason}); copy or prepare this shard again (compressed ones are not read)"


def refuse_executable(endings: Iterable[str], name: str) -> None:
    """DataError where one of these files could run code when it is read."""
    for ending in endings:
        if EXECUTABLE.intersection(ending.lower().split(".")):
            raise DataError(
                f"{name}: a file .{ending} can run code when it is read, expected only {', '.join(DECODED)}; "
                "do not use this shard"
            )


def _files(stream: BinaryIO, name: str, report: Callable[[Fault], None]) -> Iterator[dict[str, Any]]:
    """The files in a tar, in order, and behind them the error of a tear, in the name of the sample it lies in."""
    last = ""
    try:
        with tarfile.open(fileobj=stream, mode="r:" if can_seek(stream) else "r|") as tar:
            for member in regular_files(tar):
                last = member.name
                if member.size > LARGEST_MEMBER:
                    words = f"{member.name} has {member.size} bytes, expected at most {LARGEST_MEMBER}"
                    report(Fault(name, "file too large", words))
                    continue
                file = tar.extractfile(member)
                assert file is not None, member
                yield {"fname": member.name, "data": file.read(), "__url__": name}
            refuse_open_end(stream, tar)
    except (tarfile.TarError, EOFError, OSError) as error:
        yield {"fname": f"{base_plus_ext(last)[0] or 'tear'}.{_TEAR}", "data": error, "__url__": name}


def regular_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files in a tar that can be a sample's, in order."""
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # not in typeshed; kept, they would be most of the memory
        if member.isreg() and not member.issparse() and not member.name.startswith("__"):
            yield member


def refuse_open_end(stream: BinaryIO, tar: tarfile.TarFile) -> None:
    """Raise ReadError where a tar, read to its end, does not end in zeros: cut between files, or noise in its middle.

    Of a stream that cannot go back only the opener knows whether it is all there.
    """
    if can_seek(stream):
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")


def can_seek(stream: BinaryIO) -> bool:
    """Whether a stream is a file that can go back; WebDataset's pipes cannot, and do not know the question."""
    return isinstance(stream, io.IOBase) and stream.seekable()
