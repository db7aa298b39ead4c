"""Tensors that lie in files and are read a few rows at a time, and the check of a safetensors header.

The safetensors library maps a file into memory: all that was read stays resident until the last tensor is gone. Plain
reads keep nothing. Format: 8 bytes with the length of the header, little-endian; the header as JSON; the numbers.
"""

import json
import math
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ldm.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

# The library allows 100 MB; a whole Stable Diffusion model has a header of 0.3 MB.
MAX_HEADER = 16 * 2**20
CHUNK = 2 * 2**20
# Bytes a number of every format of safetensors 0.8 takes; those that we read have a name in PyTorch.
SIZES = dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1)
SIZES |= dict.fromkeys(("U16", "I16", "F16", "BF16"), 2) | dict.fromkeys(("U32", "I32", "F32"), 4)
SIZES |= dict.fromkeys(("U64", "I64", "F64", "C64"), 8)
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

COPY_AGAIN = "copy or download it again"
# What a file that is no safetensors file starts with, and what it is.
STARTS = {
    b"PK\x03\x04": "is a pickle file; convert it: python scripts/convert.py",
    b"\x80": "is a pickle file; convert it: python scripts/convert.py",
    b"version https://git-lfs": "is a Git LFS pointer, not a model; fetch the file itself with git lfs pull",
    b"<": "is a web page, not a model; download the file itself",
    b"GGUF": "is a GGUF file; use the model's safetensors file",
}


class StoredTensor(Protocol):
    """A tensor that need not be in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As in PyTorch."""
        ...

    @property
    def dtype(self) -> str:
        """The number format, in the word of safetensors: F32, F16, BF16 and so on."""
        ...

    def chunks(self) -> "Iterator[Tensor]":
        """The tensor in parts along its first axis, each valid until the next one is asked for."""
        ...


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file, from the byte `begin` on."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * SIZES[self.dtype]

    def chunks(self) -> "Iterator[Tensor]":
        """Parts of about 2 MB. Raises ModelError for a number format other than fp32, fp16 and bf16."""
        import torch

        if self.dtype not in FLOATS:
            raise ModelError(f"{self.path}: {self.name} is {self.dtype}, expected fp32, fp16 or bf16; convert the file")
        dtype: torch.dtype = getattr(torch, FLOATS[self.dtype])
        if not self.size:
            yield torch.empty(self.shape, dtype=dtype)
            return
        row = self.size // self.shape[0] if self.shape else self.size
        rows = max(1, CHUNK // row)
        # Not a bytearray, which is cleared first.
        buffer = torch.empty(min(rows * row, self.size), dtype=torch.uint8, device="cpu").numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin)
            for first in range(0, self.size, len(buffer)):
                part = buffer[: self.size - first]
                self._read(file, part)
                yield torch.frombuffer(part, dtype=dtype).view(self.shape and (-1, *self.shape[1:]))

    def _read(self, file: Any, part: memoryview) -> None:
        done = 0
        while done < len(part):
            count = file.readinto(part[done:])
            if not count:
                raise ModelError(f"{self.path}: ends within {self.name}; {COPY_AGAIN}")
            done += count


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor that is in memory, for what is converted from files that cannot be read in parts."""

    tensor: "Tensor"

    @property
    def shape(self) -> tuple[int, ...]:
        """As in PyTorch."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        """The number format, in the word of safetensors."""
        known = {name: word for word, name in FLOATS.items()}
        name = str(self.tensor.dtype).removeprefix("torch.")
        return known.get(name, name)

    def chunks(self) -> "Iterator[Tensor]":
        """The whole tensor."""
        yield self.tensor


@dataclass(frozen=True)
class Joined:
    """One of our tensors, which a file holds as several (query, key, value), one behind the other along axis 0.

    `shape` is ours; a file may have further axes of length 1 behind it.
    """

    parts: tuple[StoredTensor, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """The number format of the first part."""
        return self.parts[0].dtype

    def chunks(self) -> "Iterator[Tensor]":
        """The parts one after another, in our shape."""
        for part in self.parts:
            for chunk in part.chunks():
                yield chunk.reshape(self.shape and (-1, *self.shape[1:]))


@dataclass(frozen=True)
class TensorFile:
    """What the header of a safetensors file says."""

    path: Path
    tensors: dict[str, FileTensor]
    metadata: dict[str, str] = field(default_factory=dict)


def refuse_special(path: Path) -> None:
    """Raise ModelError for what is there but cannot be read as a file: a device, a pipe, a lost link, no rights."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path}: cannot be read ({reason}); check the path and its rights") from None
    if not regular:
        raise ModelError(f"{path}: neither a file nor a folder; give the path of a model")


def read_header(path: Path) -> TensorFile:
    """Names, shapes, number formats and places of the tensors of a safetensors file; reads none of them.

    Raises ModelError for a file that cannot be read, is something else, is torn, or whose header is not consistent.
    """
    refuse_special(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(64)
            refuse_other_kinds(path, start)
            length = int.from_bytes(start[:8], "little")
            if length > min(MAX_HEADER, size - 8):
                much = f"a header of {length} bytes in a file of {size}"
                raise ModelError(f"{path}: not a whole safetensors file ({much}); {COPY_AGAIN}")
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_twins)
        return _checked(path, header, begin=8 + length, size=size - 8 - length)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({_words(error)}); {COPY_AGAIN}") from None


def refuse_other_kinds(path: Path, start: bytes) -> None:
    """Raise ModelError, which says what the file is, where its first bytes are not those of a safetensors file."""
    if len(start) < 8:
        raise ModelError(f"{path}: not a whole safetensors file (it has {len(start)} bytes); {COPY_AGAIN}")
    if start[8:9] == b"{":
        return
    for known, words in STARTS.items():
        if start.lstrip().startswith(known):
            raise ModelError(f"{path}: {words}")


def _words(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
        return "its header is not JSON"
    return str(error) if isinstance(error, ValueError) else f"no or a strange {error} in its header"


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return made


def _checked(path: Path, header: Any, begin: int, size: int) -> TensorFile:
    """The tensors of a header, which must fill all `size` bytes behind it, each byte once. Raises ValueError."""
    if not isinstance(header, dict):
        raise ValueError("its header is no list of tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is not text")
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in SIZES:
            raise ValueError(f"{name} has the unknown number format {dtype!r}")
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, first, last)):
            raise ValueError(f"{name} has a strange shape or place")
        if first != end or last - first != math.prod(shape) * SIZES[dtype]:
            raise ValueError(f"{name} lies at {first} to {last}, where it does not fit")
        tensors[name] = FileTensor(path, name, dtype, tuple(shape), begin + first)
        end = last
    if end != size:
        raise ValueError(f"{size} bytes of numbers, expected {end}")
    return TensorFile(path, tensors, metadata)


def refuse_difference(
    where: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], model: str, advice: str
) -> None:
    """Raise ModelError that names the first five tensors that are missing, unexpected or of another shape."""
    misshapen = [name for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name]]
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [f"{name} {found[name]}, expected {wanted[name]}" for name in misshapen],
    }
    words = [f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in problems.items() if names]
    if words:
        raise ModelError(f"{where}: does not fit {model}: {'; '.join(words)}; {advice}")


def total_bytes(tensors: Iterable[StoredTensor]) -> dict[str, int]:
    """Bytes by number format, most first."""
    made: dict[str, int] = {}
    for tensor in tensors:
        made[tensor.dtype] = made.get(tensor.dtype, 0) + math.prod(tensor.shape) * SIZES.get(tensor.dtype, 0)
    return dict(sorted(made.items(), key=lambda item: -item[1]))
