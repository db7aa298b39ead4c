"""Cached latents and text states as WebDataset shards of plain .npy files, read back straight into a batch.

A sample has `<key>.latent.npy`, fp16 (2 c h w): mean and standard deviation of the posterior; where text states are
kept, `<key>.text.npy`, fp16 (k l d), one row for each of its k captions; `<key>.json` with "captions". Beside the
shards lie `latents.json`, which says what they were made from, and `null.npy`, the states (l d) of the null prompt.
Since the header of an .npy file is written by one function here, reading compares it instead of parsing it.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.captions import which
from ldm.data.index import UNKNOWN, Measure, Reader, Span, open_table
from ldm.data.indexed import counted, first_good
from ldm.data.loading import PartsOfBatches, loaded
from ldm.data.order import Chance, Part, Plan
from ldm.data.settings import LatentsConfig
from ldm.data.shards import find_shards
from ldm.data.tally import WINDOW, BadSample, Fault, Tally
from ldm.errors import DataError
from ldm.files import appearing

ABOUT, NULL = "latents.json", "null.npy"
LATENT, TEXT, FACTS = "latent.npy", "text.npy", "json"
HEADER = 128  # bytes before the numbers
_SHAPE = re.compile(rb"'shape': \(([0-9, ]+)\)")

Half = NDArray[np.float16]


@dataclass(frozen=True)
class MadeFrom:
    """What cached latents depend on: digests of two networks (`weights_digest`), and the size of the pictures.

    `text` is empty where no text states are kept, `buckets` where the pictures are square.
    """

    autoencoder: str
    text: str
    side: int
    buckets: str = ""
    format: int = 1


@dataclass(frozen=True)
class LatentBatch:
    """A process's part of a global batch: q(z|image) = N(mean, std²), fp16, all of one size, and text states.

    `text` has the null prompt's states where `dropped`. `first` is the place of the first sample in the global batch.
    """

    step: int
    first: int
    keys: tuple[str, ...]
    mean: Float[Tensor, "b c h w"]
    std: Float[Tensor, "b c h w"]
    text: Float[Tensor, "b l d"] | None
    dropped: Bool[Tensor, " b"]
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> "LatentBatch":
        """The same in memory that a GPU can fetch from by itself; the loader asks for it."""
        text = None if self.text is None else self.text.pin_memory()
        return replace(self, mean=self.mean.pin_memory(), std=self.std.pin_memory(), text=text)


# Writing -------------------------------------------------------------------------------------------------------


def npy(array: Half) -> bytes:
    """An .npy file (format 1.0) of little-endian fp16, its header HEADER bytes long."""
    return npy_header(array.shape) + np.ascontiguousarray(array, dtype="<f2").tobytes()


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The first HEADER bytes of the file that `npy` makes of an array of this shape."""
    words = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({', '.join(map(str, shape))},), }}".encode()
    assert len(words) < HEADER - 10, shape
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + words.ljust(HEADER - 11) + b"\n"


def latent_sample(key: str, mean: Half, std: Half, captions: tuple[str, ...], text: Half | None) -> dict[str, object]:
    """A sample as `write_shard` takes it; mean and std (c h w), text (k l d) with one row for each caption."""
    sample: dict[str, object] = {"__key__": key, LATENT: npy(np.stack([mean, std])), FACTS: {"captions": captions}}
    return sample if text is None else {**sample, TEXT: npy(text)}


def weights_digest(weights: Mapping[str, Tensor], about: str) -> str:
    """A name for a network: its config, and its weights as fp16, which is what is left of them in a bundle."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(weights):
        array = weights[name].detach().to("cpu", torch.float16).contiguous().numpy()
        digest.update(f"{name} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def describe(folder: Path, made_from: MadeFrom, pictures: str, null: Half | None) -> None:
    """Write what the latents in `folder` are made from. DataError where latents made from something else lie there.

    `pictures` is a name for the shards of pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / ABOUT).is_file():
        refuse_other(folder, made_from)
        if (kept := json.loads((folder / ABOUT).read_bytes()).get("pictures")) != pictures:
            raise DataError(f"{folder}: got latents of other pictures ({kept}), expected {pictures}; name a new folder")
        return
    if null is not None:
        _write(folder / NULL, npy(null))
    _write(folder / ABOUT, json.dumps({**asdict(made_from), "pictures": pictures}, indent=2).encode() + b"\n")


def pictures_name(shards: Sequence[Path]) -> str:
    """A name for shards of pictures that changes with their number, names and sizes."""
    return hashlib.sha256(repr([(path.name, path.stat().st_size) for path in shards]).encode()).hexdigest()[:16]


def _write(path: Path, data: bytes) -> None:
    with appearing(path, shared=True) as temporary:  # by every rank at once
        temporary.write_bytes(data)


# Reading -------------------------------------------------------------------------------------------------------


def refuse_other(folder: Path, made_from: MadeFrom) -> None:
    """DataError that names what differs, if the latents in `folder` are made from something else.

    Latents that have text states can be read without them: `made_from.text` is empty then.
    """
    path = folder / ABOUT
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected what the latents are made from; cache them again") from None
    except ValueError:
        raise DataError(f"{path}: no JSON, expected what the latents are made from; cache them again") from None
    for name, wanted in asdict(made_from).items():
        found = kept.get(name) if isinstance(kept, dict) else None
        if found != wanted and not (name == "text" and not wanted):
            shown = [str(value)[:12] or "none" for value in (found, wanted)]
            raise DataError(
                f"{path}: got latents made from {name} {shown[0]}, expected {shown[1]}; cache them again with "
                "scripts/cache_latents.py, into another folder"
            )


def read_null(path: Path) -> Half:
    """The text states (l d) of the null prompt."""
    states = numbers(path.read_bytes()) if path.is_file() else None
    if states is None or states.ndim != 2:
        raise DataError(f"{path}: no text states of the null prompt there; cache the latents again")
    return states.copy()


class LatentShards:
    """Cached latents as batches that (seed, step) alone decides; the sizes of latents are the buckets.

    `made_from` says what the model at hand would make them from; with other ones DataError. Memory: 61 bytes a
    sample with a key of 9 characters, shared by forked workers. Files: at most 64 open shards a process.
    """

    def __init__(self, config: LatentsConfig, made_from: MadeFrom) -> None:
        self.config = config
        paths = find_shards(config.shards)
        for folder in sorted({path.parent for path in paths}):
            refuse_other(folder, made_from)
        measure = Measure(HEADER, latent_dimensions)
        self.table = open_table(paths, (LATENT, TEXT), config.index, measure, config.max_bad_fraction)
        self.shapes, buckets = np.unique(known_dimensions(self.table.dimensions), axis=0, return_inverse=True)
        several = buckets.ravel() if len(self.shapes) > 1 else None
        self.tally = Tally(config.max_bad_fraction, size=len(self.table))
        self.plan = Plan(len(self.table), config.batch_size, config.seed, several)
        self.null = read_null(paths[0].parent / NULL) if made_from.text else None
        self._reader = Reader(self.table)
        self._channels = self._first_channels()

    def _first_channels(self) -> int:
        """Channels of the first good latent; others must have as many."""
        for sample in range(len(self.table)):
            descriptor = self._reader.descriptor(int(self.table.shard[sample]))
            shape = shape_of(os.pread(descriptor, HEADER, int(self.table.spans[sample, 0, 0])))
            if shape is not None and len(shape) == 4:
                return shape[1]
        raise DataError(f"{self.table.where(0)}: no latent, expected {LATENT} of fp16 (2 c h w); cache them again")

    @property
    def tallies(self) -> tuple[Tally, ...]:
        """What counts bad samples: those that the index left out, and those that reading finds."""
        return self.table.tally, self.tally

    def __len__(self) -> int:
        return len(self.table)

    def keys(self, step: int) -> tuple[str, ...]:
        """The keys of global batch `step`; nothing is read."""
        return tuple(self.table.key(sample) for sample in self.plan.batch(step).samples.tolist())

    def batches(self, start: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0) -> Iterator[LatentBatch]:
        """This rank's part of every global batch from step `start` on, without end; errors as for pictures."""
        parts = PartsOfBatches(self.plan, self.batch, rank, world_size)
        where = str(self.table.shards[0].parent)
        return counted(loaded(parts, start, workers, self.config.timeout_s, where), self.tally)

    def batch(self, part: Part) -> LatentBatch:
        """The batch of these samples."""
        width, height = self.shapes[part.bucket].tolist()
        latents = np.empty((len(part.samples), 2, self._channels, height, width), dtype="<f2")
        header = npy_header(latents.shape[1:])
        faults: list[Fault] = []
        keys, states, dropped = [], [], []
        for row, (place, sample) in zip(latents, part.places(), strict=True):
            chance = Chance(f"{self.config.seed} {part.step} {place}")
            dropped.append(chance("caption dropout") < self.config.dropout)
            read = partial(self._sample, row, header, None if dropped[-1] else chance)
            found, of_text = first_good(self.plan.from_on(part.bucket, sample), read, faults)
            keys.append(self.table.key(found))
            states.append(of_text)
        mean, std = torch.from_numpy(latents).unbind(1)
        text = (
            None
            if self.null is None
            else torch.from_numpy(np.stack([of_text for of_text in states if of_text is not None]))
        )
        return LatentBatch(part.step, part.first, tuple(keys), mean, std, text, torch.tensor(dropped), tuple(faults))

    def _sample(self, row: Half, header: bytes, chance: Chance | None, sample: int) -> tuple[int, Half | None]:
        """Read a latent into `row`; the sample, and the states (l d) of one of its captions or of the null prompt."""
        offset, size = self.table.spans[sample, 0].tolist()
        descriptor = self._reader.descriptor(int(self.table.shard[sample]))
        found = bytearray(HEADER)
        # The one copy on the way from the page cache to the batch.
        read = os.preadv(descriptor, [found, row.data], offset) if size == HEADER + row.nbytes else -1
        if read != size or found != header:
            words = f"got a file of {max(size, 0)} bytes, expected an .npy of fp16 {row.shape}"
            raise BadSample(self.table.where(sample), "latent of another form", words)
        return sample, self._states(sample, chance)

    def _states(self, sample: int, chance: Chance | None) -> Half | None:
        """The states (l d) of one of the sample's captions; without a chance the null prompt's."""
        if self.null is None or chance is None:
            return self.null
        offset, size = self.table.spans[sample, 1].tolist()
        descriptor = self._reader.descriptor(int(self.table.shard[sample]))
        states = numbers(os.pread(descriptor, max(size, 0), offset))
        if states is None or states.ndim != 3 or states.shape[1:] != self.null.shape or not len(states):
            words = f"got {TEXT} of {max(size, 0)} bytes, expected fp16 (captions, *{self.null.shape})"
            raise BadSample(self.table.where(sample), "text states of another form", words)
        return states[which(len(states), self.config.choice, self.config.first, chance)]


def shape_of(header: bytes) -> tuple[int, ...] | None:
    """The shape of the array in a file that `npy` made, from its first HEADER bytes; None for any other file."""
    found = _SHAPE.search(header[:HEADER])
    if found is None:
        return None
    shape = tuple(int(part) for part in found[1].replace(b" ", b"").split(b",") if part)
    return shape if header[:HEADER] == npy_header(shape) else None


def numbers(data: bytes) -> Half | None:
    """The array that `npy` made a file of; None for any other file."""
    shape = shape_of(data)
    if shape is None or len(data) != HEADER + 2 * math.prod(shape):
        return None
    return np.ndarray(shape, "<f2", data, HEADER)


def known_dimensions(dimensions: NDArray[np.int32]) -> NDArray[np.int32]:
    """Width and height of each latent (n 2); one that does not say them is taken for the most frequent ones."""
    unknown = (dimensions == UNKNOWN).all(axis=1)
    if not unknown.any() or unknown.all():
        return dimensions
    shapes, counts = np.unique(dimensions[~unknown], axis=0, return_counts=True)
    return np.where(unknown[:, None], shapes[counts.argmax()], dimensions)


def latent_dimensions(ending: str, header: bytes) -> Span | None:
    """Width and height of a cached latent (2 c h w)."""
    shape = shape_of(header) if ending == LATENT else None
    return None if shape is None or len(shape) != 4 else (shape[3], shape[2])
