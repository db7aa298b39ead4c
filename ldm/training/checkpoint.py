"""Checkpoints as folders that are whole or absent: tensors in safetensors, numbers in JSON, no pickle.

A folder is written under a temporary name on the same file system, flushed, and renamed; only then are older ones
removed. `MANIFEST.json` holds the sha256 of every file, and the loader takes the newest folder that verifies.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.bundle import sha256
from ldm.cli import warn
from ldm.errors import MachineError, ModelError
from ldm.training.ema import EMA

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a training run is at one step: tensors by file, and plain numbers."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    numbers: dict[str, Any]


def flush(path: Path) -> None:
    """Ask the operating system to put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path) -> None:
    """Write the size and sha256 of every file of `folder` beside them."""
    files = {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")


def verify_manifest(folder: Path) -> str | None:
    """What is wrong with `folder`, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or torn"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            return f"{name}: sha256 differs"
    return None


def save(root: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write `checkpoint` as `root/step_XXXXXXXX`, whole or not at all, then remove all but the newest `keep`."""
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(".tmp-*"):
        shutil.rmtree(stale)
    final = root / f"step_{checkpoint.step:08d}"
    temporary = root / f".tmp-{final.name}"
    temporary.mkdir()
    for name, tensors in checkpoint.tensors.items():
        write_tensors(temporary / f"{name}.safetensors", tensors)
    (temporary / "state.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.numbers}, indent=2))
    write_manifest(temporary)
    for path in temporary.iterdir():
        flush(path)
    flush(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    flush(root)
    for old in sorted(root.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    return final


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint below `root` whose manifest verifies; says which ones it passed over."""
    for folder in _newest_first(root):
        problem = verify_manifest(folder)
        if problem is not None:
            warn(f"{folder}: {problem}; the checkpoint before it is used")
            continue
        numbers = json.loads((folder / "state.json").read_text())
        tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        return Checkpoint(numbers.pop("step"), tensors, numbers)
    return None


def _newest_first(root: Path) -> list[Path]:
    return sorted(root.glob("step_*"), reverse=True)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_tensors(temporary, tensors)
    flush(temporary)
    os.replace(temporary, path)


def save_text(path: Path, text: str) -> None:
    """Write one text file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file of contiguous copies on the CPU. Raises MachineError where it cannot be written."""
    try:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise MachineError(f"{path}: cannot be written ({error}); free space on the disk and run again") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises ModelError for one that is not whole."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: torn ({error}); delete it and run the same command again") from None


def capture(step: int, module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> Checkpoint:
    """The state of a run after `step` updates."""
    state = optimizer.state_dict()["state"]
    moments = {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}
    tensors = {"model": dict(module.state_dict()), "ema": ema.state(), "optimizer": moments}
    return Checkpoint(step, tensors, {"ema_updates": ema.updates})


def restore(checkpoint: Checkpoint, module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> None:
    """Put a captured state back, exactly."""
    module.load_state_dict(checkpoint.tensors["model"])
    ema.load(checkpoint.tensors["ema"], checkpoint.numbers["ema_updates"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors["optimizer"].items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
