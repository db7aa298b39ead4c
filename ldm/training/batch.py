"""What one training step reads: a process's part of the global batch, and random numbers for just that part.

Random numbers are drawn as if one process computed the whole batch, so that a step is a function of (seed, step)
whatever the number of processes and however a process divides its share.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


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


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one training step, a function of (seed, step) alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


class Draws:
    """The random numbers of one step, on the CPU; `part` gives those of some samples of the global batch.

    Every part sees the same sequence of draws of the whole batch and takes its rows; each is drawn once.
    """

    def __init__(self, seed: int, step: int, total: int) -> None:
        self.step = step
        self._total = total
        self._rows = slice(0, total)
        self._generator = step_generator(seed, step)
        self._tape: list[object] = []
        self._at = 0

    def part(self, rows: slice) -> "Draws":
        """The draws of the samples `rows` of the global batch, from the first draw on."""
        other = copy.copy(self)
        other._rows, other._at = rows, 0
        return other

    def whole(self, draw: Callable[[torch.Generator], T]) -> T:
        """One draw for the whole batch."""
        if self._at == len(self._tape):
            self._tape.append(draw(self._generator))
        self._at += 1
        return self._tape[self._at - 1]  # type: ignore[return-value]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, `shape` for each sample of this part."""
        return self.whole(lambda g: torch.randn((self._total, *shape), generator=g))[self._rows]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), `shape` for each sample of this part."""
        return self.whole(lambda g: torch.rand((self._total, *shape), generator=g))[self._rows]

    def integers(self, high: int) -> Tensor:
        """An integer from 0 to below `high` for each sample of this part."""
        return self.whole(lambda g: torch.randint(0, high, (self._total,), generator=g))[self._rows]
