"""Checkpoints as folders that are whole or absent: tensors in safetensors, numbers in JSON, no pickle.

A folder is written under a temporary name on the same file system, flushed, and renamed; only then are older ones
removed. `MANIFEST.json` holds the sha256 of every file, and the loader takes the newest folder that verifies.
"""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.cli import warn
from ldm.errors import MachineError, ModelError
from ldm.files import appearing, remove, save_text, sha256, sync

MANIFEST = "MANIFEST.json"
STATE = "state.json"
LATEST, BEST = "latest", "best"
"""Files beside the checkpoints, each with the name of one of them; `latest` is for people, nothing here reads it."""
FULL = (errno.ENOSPC, errno.EDQUOT)
TRIES, SECONDS_BETWEEN = 6, 60.0  # where the disk is full: somebody may make room


@dataclass(frozen=True)
class Checkpoint:
    """What a training run is at one step: tensors by file, and plain numbers."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    numbers: dict[str, Any]


def write_manifest(folder: Path) -> None:
    """Write the size and sha256 of every file of `folder` beside them."""
    files = {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")


def verify_manifest(folder: Path) -> str | None:
    """What is wrong with `folder`, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        entries = {str(name): (entry["sha256"], entry["bytes"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or torn"
    if STATE not in entries:
        return f"{MANIFEST} is no checkpoint's, it does not list {STATE}"
    for name, (digest, size) in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or sha256(path) != digest:
            return f"{name}: sha256 differs"
    return None


def save(root: Path, checkpoint: Checkpoint, keep: int = 2, best: bool = False) -> Path:
    """Write `checkpoint` as `root/step_XXXXXXXX`, whole or not at all, then remove all but the newest `keep`.

    The one that was last called `best` stays too; those of later steps go: the run has passed them over as damaged.
    Waits for room on a full disk, some minutes; raises MachineError
    where there is none then, or where the disk refuses for another reason.
    """
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(".step_*.tmp"):
        remove(stale)
    final = root / f"step_{checkpoint.step:08d}"
    for left in reversed(range(TRIES)):
        try:
            _write(final, checkpoint)
            break
        except OSError as error:
            if error.errno not in FULL or not left:
                raise MachineError(f"{final}: cannot be written ({error.strerror}); free space and run again") from None
            words = f"{error.strerror}; make room: it is tried again in {SECONDS_BETWEEN:g} s, {left} times more"
            warn(f"{final}: {words}")
            time.sleep(SECONDS_BETWEEN)
    save_text(root / LATEST, f"{final.name}\n")
    if best:
        save_text(root / BEST, f"{final.name}\n")
    _prune(root, keep, final.name)
    return final


def _write(final: Path, checkpoint: Checkpoint) -> None:
    """Everything of a checkpoint, and its name, on the disk."""
    with appearing(final) as folder:
        folder.mkdir()
        for name, tensors in checkpoint.tensors.items():
            write_tensors(folder / f"{name}.safetensors", tensors)
        (folder / STATE).write_text(json.dumps({"step": checkpoint.step, **checkpoint.numbers}, indent=2) + "\n")
        write_manifest(folder)
        remove(final)  # there only where it did not verify: a run never saves a step twice
    sync(final.parent)


def _prune(root: Path, keep: int, last: str) -> None:
    """Remove all checkpoints but the newest `keep` up to the `last` one, and the best one of them."""
    best = (root / BEST).read_text().strip() if (root / BEST).is_file() else ""
    folders = _newest_first(root)
    damaged = [folder for folder in folders if folder.name > last]
    older = [folder for folder in folders if folder.name <= last][keep:]
    for old in (*damaged, *(folder for folder in older if folder.name != best)):
        shutil.rmtree(old)


def newest(root: Path) -> Path | None:
    """The newest checkpoint below `root` whose manifest verifies; says which ones it passed over.

    Raises ModelError where there are checkpoints and not one verifies.
    """
    folders = _newest_first(root)
    for folder in folders:
        problem = verify_manifest(folder)
        if problem is None:
            return folder
        warn(f"{folder}: {problem}; the checkpoint before it is used")
    if folders:
        raise ModelError(
            f"{root}: not one of its {len(folders)} checkpoints is whole; copy them again, or delete them to begin anew"
        )
    return None


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder that was verified."""
    numbers = json.loads((folder / STATE).read_text())
    tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return Checkpoint(numbers.pop("step"), tensors, numbers)


def _newest_first(root: Path) -> list[Path]:
    return sorted(root.glob(f"step_{'[0-9]' * 8}"), reverse=True)


def check_space(folder: Path, keep: int, size: int) -> None:
    """Raise MachineError where the disk has no room for `keep` checkpoints of `size` bytes and one on its way.

    Those that lie in `folder`, which may not exist yet, have their room already.
    """
    needed = (keep + 1 - min(keep, len(_newest_first(folder)))) * size
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise MachineError(
            f"{folder}: checkpoints need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free space or lower keep"
        )


# Single files ---------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, whole or not at all."""
    with appearing(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of contiguous copies on the CPU. Raises OSError where it cannot be written."""
    try:
        save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
            path,
            dict(metadata) if metadata else None,
        )
    except SafetensorError as error:  # which has the system's error in words only
        number = re.search(r"os error ([0-9]+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises ModelError for one that is not whole."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: torn ({error}); delete it and run the same command again") from None
