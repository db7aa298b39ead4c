"""Records become shards with a manifest, and an interrupted import goes on to the very bytes of one that was not.

Beside the shards lie `manifest.jsonl`, a line for each finished shard, and `rejects.jsonl`. A shard is finished when
its line is there; what a killed process left behind it is removed. Samples carry the fingerprints of their pictures, so
that finished shards say what has been seen.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from ldm.data.cleaning import Cleaned, Rules, clean
from ldm.data.duplicates import Fingerprint, Seen
from ldm.data.records import Record, Records, Reject
from ldm.errors import DataError
from ldm.files import sha256

MANIFEST, REJECTS = "manifest.jsonl", "rejects.jsonl"
AT_ONCE = 256  # records that are in memory at a time

Each = Callable[..., Iterable[Cleaned | Reject]]
"""A `map` that keeps the order, perhaps over processes."""


@dataclass(frozen=True)
class Finished:
    """A line of the manifest: a shard, or with an empty name the end of the import.

    `read` records of the source lie behind it, whose origins have this `digest`; `rejects` lines of rejects.jsonl.
    """

    shard: str
    samples: int
    sha256: str
    read: int
    digest: str
    rejects: int


@dataclass(frozen=True)
class Progress:
    """How far an import is: records read, samples kept, rejects by reason. `finished` at its end."""

    read: int
    kept: int
    rejects: Mapping[str, int]
    finished: bool = False


def import_records(
    source: Records, each: Each, rules: Rules, folder: Path, prefix: str, shard_size: int
) -> Iterator[Progress]:
    """Write what the records of `source` become, from behind the last finished shard on; yields progress as it goes.

    DataError where the source is not the one that the finished shards were made from.
    """
    lines = resume(folder, prefix)
    last = lines[-1] if lines else Finished("", 0, "", 0, "", 0)
    rejects = Counter(json.loads(line)["reason"] for line in _lines(folder / REJECTS))
    kept = sum(line.samples for line in lines)
    read, digest = last.read, skip(source, last, folder)
    if lines and not last.shard:
        if next(source, None) is not None:
            raise DataError(f"{folder}: the input has grown since this was finished; name a new folder")
        yield Progress(read, kept, rejects, finished=True)
        return
    seen = Seen(rules.near_bits if rules.duplicates == "near" else None)
    for line in lines if rules.duplicates != "keep" else ():
        remember(seen, folder / line.shard)
    samples: list[dict[str, object]] = []
    found: list[Reject] = []
    number = len(lines)
    for record, outcome in _outcomes(source, each, rules):
        if isinstance(outcome, Cleaned) and rules.duplicates != "keep":
            outcome = _new(outcome, seen)
        if isinstance(outcome, Cleaned):
            samples.append({"__key__": f"{read:09d}", **outcome.members})
        else:
            found.append(outcome)
            rejects[outcome.reason] += 1
        read += 1
        digest.update(record.origin.encode(errors="surrogatepass") + b"\0")
        if len(samples) == shard_size:
            finish(folder, shard_name(prefix, number), samples, found, read, digest.hexdigest(), rejects.total())
            number, kept, samples, found = number + 1, kept + len(samples), [], []
        yield Progress(read, kept + len(samples), rejects)
    if samples:
        finish(folder, shard_name(prefix, number), samples, found, read, digest.hexdigest(), rejects.total())
        kept, found = kept + len(samples), []
    finish(folder, "", [], found, read, digest.hexdigest(), rejects.total())
    yield Progress(read, kept, rejects, finished=True)


def shard_name(prefix: str, number: int) -> str:
    """The name of the shard of this number."""
    return f"{prefix}-{number:05d}.tar"


def _outcomes(source: Records, each: Each, rules: Rules) -> Iterator[tuple[Record | Reject, Cleaned | Reject]]:
    while records := list(islice(source, AT_ONCE)):
        yield from zip(records, each(partial(clean, rules=rules), records), strict=True)


def _new(one: Cleaned, seen: Seen) -> Cleaned | Reject:
    """The sample, if no equal or near one was seen; it is remembered then."""
    other = seen.find(one.fingerprint)
    if other is not None:
        return Reject(one.origin, "duplicate", f"shows what {other} shows")
    seen.add(one.fingerprint, one.origin)
    return one


def skip(source: Records, last: Finished, folder: Path) -> "hashlib._Hash":
    """Pass over the records that are done with; the digest of their origins, from which the import goes on."""
    digest = hashlib.sha256()
    for record in islice(source, last.read):
        digest.update(record.origin.encode(errors="surrogatepass") + b"\0")
    if last.read and digest.hexdigest() != last.digest:
        raise DataError(f"{folder}: the input has changed since this was begun; bring it back, or name a new folder")
    return digest


def remember(seen: Seen, shard: Path) -> None:
    """Add the fingerprints in the samples of a finished shard."""
    from ldm.data.index import Reader, open_table

    table = open_table([shard], ("json",), keep=False)
    reader = Reader(table)
    for sample in range(len(table)):
        facts = json.loads(reader.files(sample)["json"])
        found = Fingerprint(facts["pixels"], facts.get("gradients", ""), facts.get("colours", ""))
        seen.add(found, facts["origin"])


# The journal ---------------------------------------------------------------------------------------------------


def finish(
    folder: Path, name: str, samples: list[dict[str, object]], found: list[Reject], read: int, digest: str, rejects: int
) -> None:
    """Write a shard, then the rejects on the way to it, then the line that makes both count."""
    from ldm.data.shards import write_shard

    of_shard = ""
    if name:
        write_shard(samples, folder / name)
        of_shard = sha256(folder / name)
    _append(folder / REJECTS, [asdict(reject) for reject in found])
    _append(folder / MANIFEST, [asdict(Finished(name, len(samples), of_shard, read, digest, rejects))])


def _append(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("ab") as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def resume(folder: Path, prefix: str) -> list[Finished]:
    """The finished shards, and the folder as it was when the last of them was: what came later is removed."""
    lines = read_manifest(folder)
    keep = {line.shard for line in lines}
    for path in [*folder.glob(f"{prefix}-*.tar"), *folder.glob(f".{prefix}-*.tar.*.tmp")]:
        if path.name not in keep:
            path.unlink()
    _cut(folder / MANIFEST, len(lines))
    _cut(folder / REJECTS, lines[-1].rejects if lines else 0)
    return lines


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file; one that was cut short is none."""
    data = path.read_bytes() if path.is_file() else b""
    return data[: data.rfind(b"\n") + 1].splitlines()


def _cut(path: Path, count: int) -> None:
    if path.is_file():
        kept = b"".join(line + b"\n" for line in _lines(path)[:count])
        if path.stat().st_size > len(kept):
            os.truncate(path, len(kept))


def read_manifest(folder: Path) -> list[Finished]:
    """The lines of the manifest, none where there is none. DataError for lines that are something else."""
    try:
        return [Finished(**json.loads(line)) for line in _lines(folder / MANIFEST)]
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST}: no manifest ({error}); prepare the data again") from None


def manifest_faults(folder: Path) -> list[str]:
    """What in a folder is not as its manifest says; nothing for a folder without one."""
    lines, faults = read_manifest(folder), []
    if not lines:
        return []
    for line in lines[: -1 if not lines[-1].shard else None]:
        path = folder / line.shard
        if not path.is_file():
            faults.append(f"{path}: no such shard, expected {line.samples} samples; prepare the data again")
            continue
        if sha256(path) != line.sha256:
            faults.append(f"{path}: sha256 differs from {MANIFEST}: torn or changed; prepare the data again")
    names = {line.shard for line in lines}
    faults += [
        f"{path}: not in {MANIFEST}; remove it" for path in sorted(folder.glob("*.tar")) if path.name not in names
    ]
    if lines[-1].shard:
        faults.append(f"{folder}: the import has not reached its end; give its command again")
    return faults
