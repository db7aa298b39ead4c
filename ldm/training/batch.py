"""What one training step reads: a process's part of the global batch, and random numbers for just that part.

Random numbers are drawn as if one process computed the whole batch, so that a step is a function of (seed, step)
whatever the number of processes and however a process divides its share.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldm.diffusion.noise import key

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """Tensors with one row a sample, tensors that all samples share, and what each sample is called."""

    rows: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()
    keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows[0])

    def part(self, chosen: slice) -> "Batch":
        """Some of the samples."""
        return Batch(tuple(row[chosen] for row in self.rows), self.shared, self.keys[chosen])

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        rows, shared = (tuple(t.to(device, non_blocking=True) for t in ts) for ts in (self.rows, self.shared))
        return Batch(rows, shared, self.keys)


def step_generator(seed: int, step: int, device: torch.device = CPU) -> torch.Generator:
    """Randomness of one training step, a function of (seed, step) and the kind of device alone."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)


class Draws:
    """The random numbers of one step; `part` gives those of some samples of the global batch.

    What is one number a sample is drawn for the whole batch, once, and every part takes its rows. Noise is large: each
    sample has a generator of its own, and a process draws for its own samples only. A GPU, for which a CPU is too slow,
    draws the noise of the whole batch by itself: other numbers, as much a function of (seed, step).
    """

    def __init__(self, seed: int, step: int, total: int, device: torch.device = CPU) -> None:
        self.step = step
        self._seed = seed
        self._total = total
        self._rows = slice(0, total)
        self._generator = step_generator(seed, step)
        self._tape: list[Any] = []
        self._at = 0
        self._own: list[torch.Generator] = []
        self._device = device
        self._large = step_generator(seed, step, device) if device.type != "cpu" else self._generator

    def part(self, rows: slice) -> "Draws":
        """The draws of the samples `rows` of the global batch, from the first draw on."""
        other = copy.copy(self)
        other._rows, other._at, other._own = rows, 0, []
        return other

    def whole(self, draw: Callable[[torch.Generator], T]) -> T:
        """One draw for the whole batch."""
        if self._at == len(self._tape):
            self._tape.append(draw(self._generator))
        self._at += 1
        drawn: T = self._tape[self._at - 1]
        return drawn

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, `shape` for each sample of this part, on the device of the step."""
        if self._large is not self._generator:
            return self.whole(lambda _: self._noise(shape))[self._rows]
        if not self._own:
            rows = range(*self._rows.indices(self._total))
            self._own = [torch.Generator().manual_seed(key(self._seed, self.step, f"sample {row}")) for row in rows]
        return torch.stack([torch.randn(shape, generator=own) for own in self._own])

    def _noise(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn((self._total, *shape), generator=self._large, device=self._device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), `shape` for each sample of this part."""
        return self.whole(lambda g: torch.rand((self._total, *shape), generator=g))[self._rows]

    def integers(self, high: int) -> Tensor:
        """An integer from 0 to below `high` for each sample of this part."""
        return self.whole(lambda g: torch.randint(0, high, (self._total,), generator=g))[self._rows]
