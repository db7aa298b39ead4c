"""Which samples make up global batch b: a function of (seed, b), computed where it is needed and written down nowhere.

Position p of an endless sequence belongs to epoch p // n, and each epoch is a permutation of the n samples. Batch b is
the positions b·B to (b + 1)·B − 1, so every batch is full, no sample is left out, and the state of a run is one number.
A rank takes its part of each global batch; how many ranks or workers there are changes nothing else.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ldm.errors import SettingError

Indices = NDArray[np.int64]
_ROUNDS = 8


def _digest(key: str, size: int) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=size).digest()


class Permutation:
    """A permutation of 0 … n − 1 that `key` names, at any positions, in constant memory.

    A Feistel network over the next even number of bits; what falls outside is sent through again until it is inside
    (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking). The round function is splitmix64's
    (Steele et al. 2014). Only integers: the same on every machine and with every version of the libraries.
    """

    def __init__(self, n: int, key: str) -> None:
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.frombuffer(_digest(f"permutation {n} {key}", 8 * _ROUNDS), dtype="<u8").astype(np.uint64)

    def __call__(self, positions: Indices) -> Indices:
        values = self._once(positions.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._once(values[outside])
        return values.astype(np.int64)

    def _once(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            mixed = right + key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & self._mask)
        return left << self._half | right


@lru_cache(maxsize=64)
def _permutation(n: int, key: str) -> Permutation:
    return Permutation(n, key)


class Chance:
    """Numbers in [0, 1) for one sample, a function of (key, purpose): what is asked for first does not matter."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, purpose: str) -> float:
        return int.from_bytes(_digest(f"{self._key} {purpose}", 8), "big") / 2**64

    def other(self, name: str) -> "Chance":
        """Numbers for the same sample that have nothing to do with these."""
        return Chance(f"{self._key} {name}")


@dataclass(frozen=True)
class Part:
    """The samples of one rank in one global batch.

    `first` is the place of its first sample in the global batch, `bucket` the one that all samples of the batch are in.
    """

    step: int
    first: int
    bucket: int
    samples: Indices

    def places(self) -> Iterator[tuple[int, int]]:
        """(place in the global batch, sample) of each."""
        return enumerate(self.samples.tolist(), self.first)


class Plan:
    """All global batches of a set of n samples, each batch from one bucket, the buckets in proportion to their sizes.

    `buckets` has the bucket of every sample, or is None where there is only one. Every bucket is an endless sequence of
    its own, and before epoch e it has given ⌊e·n_k / B⌋ batches: the rest opens the next epoch, nothing is dropped. The
    order of buckets within an epoch is a permutation too. With one bucket, n positions in a row are one epoch.
    """

    def __init__(self, n: int, batch_size: int, seed: int, buckets: NDArray[np.integer] | None = None) -> None:
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        count = 1 if buckets is None else int(buckets.max()) + 1
        self._members = [np.arange(n) if buckets is None else np.flatnonzero(buckets == k) for k in range(count)]
        self._labels: tuple[int, NDArray[np.int64]] | None = None

    def epoch(self, step: int) -> int:
        """The epoch that batch `step` counts for: the last one before which at most `step` batches were given.

        A batch that opens with the rest of an epoch counts for the next one.
        """
        epoch = step * self.batch_size // self.n
        while self._batches_before(epoch + 1) <= step:
            epoch += 1
        return epoch

    def batch(self, step: int) -> Part:
        """All samples of global batch `step`."""
        return self.part(step, 0, 1)

    def part(self, step: int, index: int, parts: int) -> Part:
        """Part `index` of so many equal ones of global batch `step`. SettingError where it cannot be cut so."""
        if self.batch_size % parts:
            raise SettingError(
                f"batch_size: {self.batch_size} cannot be shared by {parts} (processes × accumulation); "
                f"use a multiple of {parts}"
            )
        size = self.batch_size // parts
        bucket, number = self._bucket(step)
        positions = number * self.batch_size + index * size + np.arange(size)
        return Part(step, index * size, bucket, self._at(bucket, positions))

    def at(self, positions: Indices) -> Indices:
        """The samples at these positions of the endless sequence of a set without buckets."""
        return self._at(0, positions)

    def from_on(self, bucket: int, sample: int) -> Iterator[int]:
        """The sample and the others of its bucket behind it, round once: what stands in for one that is bad."""
        yield sample
        members = self._members[bucket]
        place = int(np.searchsorted(members, sample))
        for step in range(1, len(members)):
            yield int(members[(place + step) % len(members)])

    def _at(self, bucket: int, positions: Indices) -> Indices:
        members = self._members[bucket]
        epochs, places = np.divmod(positions, len(members))
        chosen = np.empty_like(positions)
        for epoch in np.unique(epochs):
            of_it = epochs == epoch
            chosen[of_it] = members[_permutation(len(members), f"{self.seed} {bucket} {epoch}")(places[of_it])]
        return chosen

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * len(members) // self.batch_size for members in self._members)

    def _bucket(self, step: int) -> tuple[int, int]:
        """The bucket of batch `step`, and how many batches that bucket has given before it."""
        if len(self._members) == 1:
            return 0, step
        epoch = self.epoch(step)
        if self._labels is None or self._labels[0] != epoch:
            given = [len(m) * (epoch + 1) // self.batch_size - len(m) * epoch // self.batch_size for m in self._members]
            labels = np.repeat(np.arange(len(given)), given)
            order = _permutation(len(labels), f"{self.seed} buckets {epoch}")(np.arange(len(labels)))
            self._labels = epoch, labels[order]
        labels = self._labels[1]
        place = step - self._batches_before(epoch)
        bucket = int(labels[place])
        before = len(self._members[bucket]) * epoch // self.batch_size
        return bucket, before + int((labels[:place] == bucket).sum())


class Mixture:
    """All global batches of two sets, `first` and `second` samples, of which the second has a `share` of all places.

    Position p belongs to the second set where ⌊(p + 1)·share⌋ > ⌊p·share⌋, so that it comes in even steps (Bresenham
    1965), and is then its ⌊p·share⌋th; both sets have an endless order of their own. The samples of the second set are
    numbered behind those of the first.
    """

    def __init__(self, first: int, second: int, share: float, batch_size: int, seed: int) -> None:
        self.n, self.batch_size = first + second, batch_size
        self._first, self._share = first, share
        self._plans = Plan(first, batch_size, seed), Plan(second, batch_size, seed)

    def batch(self, step: int) -> Part:
        """All samples of global batch `step`."""
        return self.part(step, 0, 1)

    def part(self, step: int, index: int, parts: int) -> Part:
        """Part `index` of so many equal ones of global batch `step`. SettingError where it cannot be cut so."""
        whole = self._plans[0].part(step, index, parts)  # says where it cannot
        positions = step * self.batch_size + whole.first + np.arange(len(whole.samples))
        before = np.floor(positions * self._share).astype(np.int64)
        is_second = np.floor((positions + 1) * self._share) > before
        first, second = self._plans
        samples = np.where(is_second, self._first + second.at(before), first.at(positions - before))
        return Part(step, whole.first, 0, samples)

    def in_second(self, sample: int) -> bool:
        """Whether a sample is one of the second set."""
        return sample >= self._first

    def from_on(self, bucket: int, sample: int) -> Iterator[int]:
        """The sample and the others of its set behind it, round once: what stands in for one that is bad."""
        start, plan = (self._first, self._plans[1]) if self.in_second(sample) else (0, self._plans[0])
        return (start + other for other in plan.from_on(bucket, sample - start))
