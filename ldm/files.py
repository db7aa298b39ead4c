"""What is written appears under its name when it is whole and on the disk, or not at all."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appearing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A name to write a file or folder to; at the end of the block it is `path`, or nothing is left.

    A file replaces one of its name. What a killed process left under the temporary name is removed, unless other
    processes may be writing the same path now: with `shared` each has a temporary name of its own.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        remove(temporary)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        remove(temporary)


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
