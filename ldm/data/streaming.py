"""Streaming captioned pictures: an endless stream over shards that may be far away, for sets too large to index.

Round r deals all shards, in an order of (seed, start, r), to the readers (ranks × workers); each reads its shards one
after another, draws from a buffer of samples, and goes on with the next round. That is deterministic, but weaker than
indexed reading: another number of readers reads another order, the readers' rounds drift apart, and a run that goes on
at step s gets another stream than one that was never stopped (`start` is in the key, so that it gets fresh data).
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from random import Random
from typing import BinaryIO, NamedTuple

import numpy as np
import webdataset

from ldm.data.buckets import assign, bucket_sizes
from ldm.data.index import picture_dimensions
from ldm.data.loading import Streams, loaded
from ldm.data.order import Chance, Permutation
from ldm.data.pictures import Picture, PictureBatch, batch_of, read_picture_sample
from ldm.data.settings import PicturesConfig
from ldm.data.shards import TORN, EncodedSample, TornShard, expanded, find_shards, shard_samples, where
from ldm.data.tally import BadSample, Fault, Tally
from ldm.errors import DataError, SettingError

REMOTE = ("http", "https", "gs", "hf", "sftp", "ftps", "scp", "ais")
"""Kinds of addresses that WebDataset opens, with curl and the like. Commands (`pipe:`) are refused."""


Report = Callable[[Fault], None]


class Waiting(NamedTuple):
    """A sample, still encoded, until its batch is full."""

    encoded: EncodedSample
    chance: Chance


class StreamedShards:
    """Captioned pictures of local or remote shards as an endless stream; every batch is full and of one bucket.

    Memory: `shuffle_buffer` encoded samples a reader, and a batch of them for each bucket. Files: one open shard each.
    """

    def __init__(self, config: PicturesConfig) -> None:
        self.config = config
        self.shards = stream_addresses(config.shards)
        self.sizes = bucket_sizes(config.pictures.side, config.buckets)
        self.tally = Tally(config.max_bad_fraction, window=None, quiet=True)  # the readers name what is bad

    @property
    def tallies(self) -> tuple[Tally, ...]:
        """What counts bad samples: one tally, since nothing is looked at before it is read."""
        return (self.tally,)

    def batches(self, start: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0) -> Iterator[PictureBatch]:
        """This rank's part of global batches from step `start` on, without end.

        Raises SettingError at once for fewer shards than readers and for a batch that cannot be shared; while reading
        DataError for too many bad samples or shards, MachineError for a dead worker.
        """
        size = self._share(world_size, workers)
        streams = Streams(partial(self._stream, start, size), rank, world_size)
        batches = loaded(streams, None, workers, self.config.timeout_s, self.shards[0])
        return self._numbered(batches, start, rank * size)

    def _share(self, world_size: int, workers: int) -> int:
        readers = world_size * max(1, workers)
        if len(self.shards) < readers:
            most = len(self.shards) // world_size
            remedy = f"use at most {most} workers (data.workers={most})" if most else "use fewer processes"
            raise SettingError(
                f"shards: got {len(self.shards)} shards for {world_size} processes × {max(1, workers)} workers = "
                f"{readers} readers, expected at least one each; {remedy}, or write smaller shards"
            )
        if self.config.batch_size % world_size:
            raise SettingError(
                f"batch_size: {self.config.batch_size} cannot be shared by {world_size} processes; use a multiple"
            )
        return self.config.batch_size // world_size

    def _numbered(self, batches: Iterator[PictureBatch], start: int, first: int) -> Iterator[PictureBatch]:
        for step, batch in enumerate(batches, start):
            self.tally.add(len(batch) + len(batch.faults), batch.faults)
            yield replace(batch, step=step, first=first)

    def _stream(self, start: int, size: int, reader: int, readers: int) -> Iterator[PictureBatch]:
        """One reader's batches, with the faults on the way to each; too many end the stream."""
        key = f"{self.config.seed} {start} {reader} {readers}"
        tally = Tally(self.config.max_bad_fraction)
        faults: list[Fault] = []

        def report(fault: Fault) -> None:
            faults.append(fault)
            tally.add(1, [fault])

        encoded = self._encoded(f"{self.config.seed} {start}", reader, readers, tally, report)
        buffer = self.config.shuffle_buffer
        mixed = webdataset.shuffle(buffer, initial=buffer, rng=Random(f"samples {key}"))(encoded)
        waiting: dict[int, list[Waiting]] = defaultdict(list)
        for number, sample in enumerate(mixed):
            bucket = self._bucket(sample)
            waiting[bucket].append(Waiting(sample, Chance(f"{key} {number}")))
            if len(waiting[bucket]) < size:
                continue
            good, pictures = self._read(waiting.pop(bucket), bucket, report)
            if len(good) < size:
                waiting[bucket] = good
                continue
            tally.add(size)
            yield batch_of(0, 0, pictures, faults)
            faults.clear()

    def _encoded(self, seed: str, reader: int, readers: int, tally: Tally, report: Report) -> Iterator[EncodedSample]:
        """This reader's samples, round after round."""
        barren: set[str] = set()  # shards without a sample since the last one
        for number in itertools.count():
            order = Permutation(len(self.shards), f"shards {seed} {number}")(np.arange(len(self.shards)))
            for shard in (self.shards[index] for index in order[reader::readers]):
                fault, found = None, False
                try:
                    with closing(opened(shard)) as stream:
                        for sample in shard_samples(stream, shard, report):
                            found = True
                            yield sample
                except TornShard as error:
                    fault = error.fault
                except OSError as error:
                    fault = Fault(
                        shard, TORN, f"cannot be read ({error.strerror or 'download failed'}); check the address"
                    )
                if fault is not None:
                    report(fault)
                tally.shard(shard, torn=fault is not None)
                barren = set() if found else barren | {shard}
            if len(barren) == len(self.shards):
                why = tally.reasons() or "they are empty"
                raise DataError(f"{self.shards[0]}: no sample in any shard ({why}); prepare the data again")

    def _bucket(self, sample: EncodedSample) -> int:
        found = (picture_dimensions(ending, data) for ending, data in sample.items() if isinstance(data, bytes))
        width, height = next((size for size in found if size), (1, 1))
        return int(assign(np.array([width]), np.array([height]), self.sizes)[0])

    def _read(self, waiting: list[Waiting], bucket: int, report: Report) -> tuple[list[Waiting], list[Picture]]:
        """Those that are good, and what is in them."""
        good, pictures = [], []
        for one in waiting:
            key, name = one.encoded["__key__"], where(one.encoded)
            try:
                size = self.sizes[bucket]
                pictures.append(read_picture_sample(one.encoded, key, name, self.config, size, one.chance))
                good.append(one)
            except BadSample as error:
                report(error.fault)
        return good, pictures


def opened(shard: str) -> BinaryIO:
    """A shard as a stream of bytes. Raises OSError where there is none."""
    return webdataset.gopen(shard, "rb") if "://" in shard else open(shard, "rb")


def stream_addresses(source: str | tuple[str, ...]) -> list[str]:
    """Local paths or remote addresses of the shards that folders, patterns or addresses with braces name.

    Raises SettingError for commands and unknown kinds of addresses, DataError where nothing is there or both kinds are.
    """
    sources = [source] if isinstance(source, str) else list(source)
    local = [one for one in sources if "://" not in one]
    remote = [address for one in sources if "://" in one for address in expanded(one)]
    for address in remote:
        kind = address.partition("://")[0]
        if kind not in REMOTE:
            raise SettingError(f"{address}: got {kind}://, expected a path, or one of {', '.join(REMOTE)}; correct it")
    if local and remote:
        raise DataError(f"{local[0]}: local and remote shards in one set; copy the ones, or make it two runs")
    return remote or [str(path) for path in find_shards(local)]
