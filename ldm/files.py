"""What is written appears under its name when it is whole and on the disk, or not at all."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

ABANDONED_SECONDS = 86400


@contextmanager
def appearing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A name to write a file or folder to; at the end of the block it is `path`, or nothing is left.

    A file replaces one of its name. What a killed process left under the temporary name is removed, unless other
    processes may be writing the same path now: with `shared` each has a temporary name of its own, and one that nobody
    has written to for a day is left from a killed one.
    """
    if shared:
        remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        remove(temporary)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove_abandoned(path: Path) -> None:
    """Delete temporary files for `path` that were last written to a day ago."""
    for left in temporaries(path.parent):
        if left.name.removeprefix(f".{path.name}.").removesuffix(".tmp").isdigit():
            with suppress(FileNotFoundError):  # another process was here first
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    remove(left)


@cache
def temporaries(folder: Path) -> tuple[Path, ...]:
    """What had a temporary name in a folder when this process first wrote to it; listing it for each shard is slow."""
    return tuple(folder.glob(".*.tmp"))


def save_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, in place of one of its name."""
    with appearing(path, shared=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file or folder of ours, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Ask the operating system to put a file, or a folder with all in it, on the disk."""
    for inner in (path, *path.rglob("*")):
        sync(inner)


def sync(path: Path) -> None:
    """The same for one file, or for the list of names that a folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
