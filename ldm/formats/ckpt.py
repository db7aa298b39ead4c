"""`.ckpt` files are pickles, which can hold a program: they are read with nothing allowed but tensors, and only here.

Only `scripts/convert.py` comes here. PyTorch's `weights_only` unpickler builds tensors and plain containers and refuses
every other name; there is no second try without it.
"""

import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.errors import ModelError
from ldm.formats.tensors import COPY_AGAIN, refuse_special

# What the unpickler raises for bytes that are no pickle, or half of one.
DAMAGED = (
    *(RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(OverflowError, struct.error),
)
FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)|function <?([\w. ]+)|got <class '([\w.]+)'>")
# A pickle may hold itself.
WRAPPED_AT_MOST = 3
ZIP, SAFETENSORS = b"PK\x03\x04", b"{"


class _Left:
    """Takes the place of what training programs saved beside the weights; computes nothing and keeps nothing."""

    def __new__(cls, *args: object) -> "_Left":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# CompVis's own files carry these: the name of a callback of PyTorch Lightning, and its best score as a NumPy number.
LEFT_BEHIND = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "_codecs.encode"),
)


def is_pickle(path: Path) -> bool:
    """Whether a file, by its first bytes and not by its name, is for this module. Raises ModelError if unreadable."""
    refuse_special(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
    return start[:4] == ZIP or (start[:1] == b"\x80" and start[8:] != SAFETENSORS)


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.ckpt`, out of the dictionaries around them.

    Raises ModelError for a file that is torn, holds no tensors, or asks for anything that is no tensor.
    """
    try:
        with path.open("rb") as file:
            # PyTorch maps into memory what it is given by name, and takes a name in .safetensors at its word.
            mapped = file.read(4) == ZIP and path.suffix != ".safetensors"
            file.seek(0)
            found = _unpickled(path if mapped else file, mapped)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path}: {_reason(str(error))}") from None
    except DAMAGED:
        raise ModelError(f"{path}: not a whole PyTorch file; {COPY_AGAIN}") from None
    tensors = _tensors(found)
    if not tensors:
        raise ModelError(f"{path}: holds no tensors; use the file of a model")
    return tensors


def _unpickled(source: Path | BinaryIO, mapped: bool) -> Any:
    with torch.serialization.safe_globals([(_Left, name) for name in LEFT_BEHIND]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the age of the pickle's protocol; what it cannot read, it refuses
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def _reason(message: str) -> str:
    """Our words for PyTorch's, which advise to read the file without protection."""
    found = FORBIDDEN.search(message)
    if found is None:
        return f"not a PyTorch file of tensors; {COPY_AGAIN}"
    name = next(group for group in found.groups() if group)
    return f"unsafe: it asks for {name}, which is no tensor, and was not run; use a safetensors file of this model"


def _tensors(found: Any) -> dict[str, Tensor]:
    for _ in range(WRAPPED_AT_MOST):
        if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
    if not isinstance(found, dict):
        return {}
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
