"""Indexed reading of captioned pictures: batch b is a function of (seed, b), and each sample comes once per epoch."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from ldm.data.buckets import assign, bucket_sizes
from ldm.data.decoding import DECODED
from ldm.data.index import PICTURES, Reader, open_table
from ldm.data.loading import PartsOfBatches, loaded
from ldm.data.order import Chance, Indices, Mixture, Part, Plan
from ldm.data.pictures import Picture, PictureBatch, batch_of, read_picture_sample
from ldm.data.settings import PicturesConfig
from ldm.data.shards import find_shards
from ldm.data.tally import WINDOW, BadSample, Fault, Tally
from ldm.errors import DataError

T = TypeVar("T")


class Batch(Protocol):
    """What any batch says of itself."""

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The samples that were bad, and that others stand in for."""
        ...

    def __len__(self) -> int: ...


Counted = TypeVar("Counted", bound=Batch)
STAND_INS = 100  # samples tried in place of a bad one


class IndexedShards:
    """Captioned pictures of local shards, as batches that (seed, step) alone decides.

    All random choices for a sample are keyed by (seed, step, its place in the global batch). In place of a bad sample
    comes the next good one of its bucket; it is named, and counted in `tally`. Memory, with keys of 9 characters: 117
    bytes a sample, 125 with buckets, shared by forked workers, and while it is opened twice that. Files: at most 64
    open shards a process.
    """

    def __init__(self, config: PicturesConfig) -> None:
        self.config = config
        plain = config.pictures.model_copy(update={"mirror": 0.0, "grounds": 0.0})
        every = config.captions.model_copy(update={"exclude": ()})
        self._as_they_are = config.model_copy(update={"pictures": plain, "captions": every})
        self.sizes = bucket_sizes(config.pictures.side, config.buckets)
        measure = None if config.buckets is None else PICTURES
        paths = find_shards(config.shards)
        further = find_shards(config.mix.shards) if config.mix is not None else []
        self.table = open_table([*paths, *further], DECODED, config.index, measure, config.max_bad_fraction)
        self.tally = Tally(config.max_bad_fraction, size=len(self.table))
        self.plan = self._plan(int((self.table.shard < len(paths)).sum()))
        self.reader = Reader(self.table)

    def _plan(self, first: int) -> Plan | Mixture:
        """The order of all samples; the first `first` of them are not those of the mix."""
        config, n = self.config, len(self.table)
        if config.mix is None:
            return Plan(n, config.batch_size, config.seed, self._buckets())
        if not 0 < first < n:
            raise DataError(f"{config.mix.shards}: no samples to mix, {first} and {n - first}; prepare the data again")
        return Mixture(first, n - first, config.mix.share, config.batch_size, config.seed)

    def _buckets(self) -> Indices | None:
        if self.config.buckets is None:
            return None
        widths, heights = self.table.dimensions.T
        return assign(widths, heights, self.sizes)

    @property
    def tallies(self) -> tuple[Tally, ...]:
        """What counts bad samples: those that the index left out, and those that reading finds."""
        return self.table.tally, self.tally

    def __len__(self) -> int:
        return len(self.table)

    def keys(self, step: int) -> tuple[str, ...]:
        """The keys of global batch `step`, bad samples among them; nothing is read."""
        return tuple(self.table.key(sample) for sample in self.plan.batch(step).samples.tolist())

    def batches(self, start: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0) -> Iterator[PictureBatch]:
        """This rank's part of every global batch from step `start` on, without end.

        Raises SettingError at once for a batch that cannot be shared, and while reading DataError for too many bad
        samples, MachineError for a dead worker.
        """
        parts = PartsOfBatches(self.plan, self.batch, rank, world_size)
        where = str(self.table.shards[0].parent)
        return counted(loaded(parts, start, workers, self.config.timeout_s, where), self.tally)

    def batch(self, part: Part) -> PictureBatch:
        """The batch of these samples."""
        faults: list[Fault] = []
        pictures = []
        for place, sample in part.places():
            chance = Chance(f"{self.config.seed} {part.step} {place}")
            choices = self.plan.from_on(part.bucket, sample)
            pictures.append(first_good(choices, partial(self._picture, part.bucket, chance), faults))
        return batch_of(part.step, part.first, pictures, faults)

    def _picture(self, bucket: int, chance: Chance, sample: int) -> Picture:
        files, key, where = self.reader.files(sample), self.table.key(sample), self.table.where(sample)
        return read_picture_sample(files, key, where, self.config_of(sample), self.sizes[bucket], chance)

    def config_of(self, sample: int) -> PicturesConfig:
        """The config that a sample is read with: pictures of the mix are what their captions say, as they are."""
        is_mix = isinstance(self.plan, Mixture) and self.plan.in_second(sample)
        return self._as_they_are if is_mix else self.config


def first_good(samples: Iterable[int], read: Callable[[int], T], faults: list[Fault]) -> T:
    """What `read` makes of the first sample that is not bad.

    If the very first is bad, that is added to `faults`; those that were to stand in for it have a place of their own.
    """
    for tried, sample in enumerate(islice(samples, STAND_INS), 1):
        try:
            return read(sample)
        except BadSample as error:
            last = error.fault
            if tried == 1:
                faults.append(last)
    raise DataError(f"{last.where}: the last of {tried} bad samples in a row; prepare the data again")


def counted(batches: Iterator[Counted], tally: Tally) -> Iterator[Counted]:
    """The batches, while their samples and faults are counted; DataError once too many were bad."""
    for batch in batches:
        tally.add(len(batch), batch.faults)
        yield batch
