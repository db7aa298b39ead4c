"""Tensors go to disk a few rows at a time, and what is written appears under its name only when it is whole."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import MachineError, ModelError, SettingError
from ldm.files import appearing
from ldm.formats.fill import not_finite
from ldm.formats.tensors import FLOATS, SIZES, StoredTensor


@dataclass(frozen=True)
class Rows:
    """`rows` rows of a stored tensor, from row `begin` on: how query, key and value are taken apart."""

    stored: StoredTensor
    begin: int
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As in PyTorch."""
        return (self.rows, *self.stored.shape[1:])

    @property
    def dtype(self) -> str:
        """The number format, in the word of safetensors."""
        return self.stored.dtype

    def chunks(self) -> Iterator[Tensor]:
        """Those parts of the stored tensor that are among the rows."""
        position = -self.begin
        for chunk in self.stored.chunks():
            part = chunk[max(0, -position) : max(0, self.rows - position)]
            position += len(chunk)
            if len(part):
                yield part


@dataclass(frozen=True)
class Reshaped:
    """A stored tensor with the same numbers in another shape."""

    stored: StoredTensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """The number format, in the word of safetensors."""
        return self.stored.dtype

    def chunks(self) -> Iterator[Tensor]:
        """The stored tensor's parts in the other shape."""
        return (chunk.reshape(-1, *self.shape[1:]) for chunk in self.stored.chunks())


@contextmanager
def whole_or_absent(destination: Path, size: int) -> Iterator[Path]:
    """A name to write some `size` bytes to, as a file or folder; at the end it is `destination`, or nothing is left.

    Raises SettingError where `destination` exists, MachineError where it cannot be written.
    """
    if os.path.lexists(destination):
        raise SettingError(f"{destination}: exists and is never overwritten; choose another name")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(destination.parent).free
        if free < size:
            raise MachineError(f"{destination}: {size} bytes do not fit on the disk, {free} are free; make room there")
        with appearing(destination) as temporary:
            yield temporary
    except OSError as error:
        reason = error.strerror or error
        raise MachineError(f"{destination}: cannot be written ({reason}); check its folder and the disk") from None


def written_dtype(stored: StoredTensor, dtype: str | None) -> str:
    """The number format a tensor is written in: what was asked for, else its own."""
    return dtype or stored.dtype


def written_bytes(tensors: Mapping[str, StoredTensor], dtype: str | None) -> int:
    """Bytes of the numbers of a file with these tensors."""
    return sum(_bytes(stored, dtype) for stored in tensors.values())


def _bytes(stored: StoredTensor, dtype: str | None) -> int:
    return torch.Size(stored.shape).numel() * SIZES[written_dtype(stored, dtype)]


def write_tensors(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], dtype: str | None = None
) -> None:
    """Write a safetensors file, numbers as they are or as `dtype` (F32, F16, BF16).

    Raises ModelError for numbers that are not finite floating-point ones, before or after the change of their format.
    """
    for name, stored in tensors.items():
        if stored.dtype not in FLOATS:
            raise ModelError(f"{name} is {stored.dtype}, expected fp32, fp16 or bf16; use another file of this model")
    # Wide formats first, so that every tensor begins at a multiple of its own size.
    order = sorted(tensors, key=lambda name: (-SIZES[written_dtype(tensors[name], dtype)], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        begin, end = end, end + _bytes(tensors[name], dtype)
        shape = list(tensors[name].shape)
        header[name] = {"dtype": written_dtype(tensors[name], dtype), "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            begin = file.tell()
            for chunk in tensors[name].chunks():
                file.write(_as_bytes(name, chunk, written_dtype(tensors[name], dtype)))
            assert file.tell() - begin == _bytes(tensors[name], dtype), name


def _as_bytes(name: str, chunk: Tensor, dtype: str) -> memoryview:
    """The numbers of a part as they lie in a file."""
    numbers = chunk.detach().cpu().to(getattr(torch, FLOATS[dtype])).contiguous().reshape(-1)
    if not_finite(numbers):
        what = "too large for" if not not_finite(chunk) else "not finite in"
        raise ModelError(f"{name}: holds numbers that are {what} {FLOATS[dtype]}; use --dtype float32, or another file")
    return numbers.view(torch.uint8).numpy().data


def write_text(path: Path, text: str) -> None:
    """Write a text file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, values: object) -> None:
    """Write a JSON file; its folder is made."""
    write_text(path, json.dumps(values, indent=2) + "\n")
