"""Batches are made in this process or by workers, in the same order either way, and what goes wrong there is said."""

import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ldm.data.order import Mixture, Part, Plan
from ldm.errors import DataError, LdmError, MachineError

LOOK_EVERY_SECONDS = 1.0  # whether workers are alive, where an item does not come
T = TypeVar("T")


class PartsOfBatches(Dataset[T | LdmError], Generic[T]):
    """Item `step` is what `make` makes of one rank's part of global batch `step`."""

    def __init__(self, plan: Plan | Mixture, make: Callable[[Part], T], rank: int, world_size: int) -> None:
        plan.part(0, rank, world_size)  # says at once what cannot be shared
        self._plan, self._make = plan, make
        self._rank, self._world_size = rank, world_size

    def __getitem__(self, step: int) -> T | LdmError:
        try:
            return self._make(self._plan.part(step, self._rank, self._world_size))
        except LdmError as error:
            return plain(error)


def plain(error: LdmError) -> LdmError:
    """An error as a value that can be sent to another process: raised there, it would arrive as a traceback."""
    return (DataError if isinstance(error, DataError) else type(error))(str(error))


def loaded(
    dataset: Dataset[T | LdmError], start: int | None, workers: int, timeout_s: float, where: str
) -> Iterator[T]:
    """The items of `dataset` from number `start` on without end, or all that an iterable one gives (`start` None).

    Worker w makes every `workers`-th item ahead of time, two items each; the order is the same for any number of them.
    Raises an item that is an error, DataError for one that takes more than `timeout_s` to come, and MachineError for a
    worker that died.
    """
    before = set(multiprocessing.active_children())
    loader: DataLoader[T | LdmError] = DataLoader(
        dataset,
        batch_size=None,
        sampler=None if start is None else range(start, sys.maxsize),
        num_workers=workers,
        collate_fn=_as_it_is,
        timeout=min(timeout_s, LOOK_EVERY_SECONDS) if workers else 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
    )
    items = _started(loader)
    mine = set(multiprocessing.active_children()) - before
    asked = time.monotonic()
    failed: LdmError | None = None
    while failed is None:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            if "timed out" not in str(error) or time.monotonic() - asked >= timeout_s:
                failed = _failure(str(error), timeout_s, where)
                if failed is None:
                    raise
            continue  # and leave this block: the error would keep the loader, and with it its workers
        try:
            if isinstance(item, LdmError):
                raise item
            yield item
        except BaseException:
            del items
            _end(mine)
            raise
        asked = time.monotonic()
    del items
    _end(mine)
    raise failed


def _started(loader: "DataLoader[T | LdmError]") -> Iterator[T | LdmError]:
    """The loader's iterator, with its workers running.

    torch would raise an error about a dead worker out of a signal handler, wherever the program is then. The handler of
    before is put back: whoever asks for an item hears of it, as soon as one does not come.
    """
    handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    items = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return items


def _failure(words: str, timeout_s: float, where: str) -> LdmError | None:
    """The error for what torch's DataLoader says of its workers; None where it is something else."""
    if "timed out" in words:
        return DataError(f"{where}: no batch in {timeout_s:g} s; check the disk or network, or set a longer timeout_s")
    if "DataLoader worker" in words and "Caught" not in words:
        cause = "killed by a signal: out of memory?" if "signal" in words or "exited" in words else words
        return MachineError(f"{where}: a data worker died ({cause}); use fewer workers or free memory")
    return None


def _end(workers: set[BaseProcess]) -> None:
    """End workers that their loader, which is gone, could not end: one that hangs in a read would outlive us."""
    for worker in workers:
        worker.kill()
        worker.join()


def _as_it_is(item: T) -> T:
    return item


def _leave_signals_to_the_parent(_: int) -> None:
    """A signal to the process group is for the parent to handle: it saves, and then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Streams(IterableDataset[T | LdmError], Generic[T]):
    """What `make(reader, readers)` gives: a stream in each worker, or without workers the one of this process."""

    def __init__(self, make: Callable[[int, int], Iterator[T]], rank: int, world_size: int) -> None:
        self._make, self._rank, self._world_size = make, rank, world_size

    def __iter__(self) -> Iterator[T | LdmError]:
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        try:
            yield from self._make(self._rank * workers + worker, self._world_size * workers)
        except LdmError as error:
            yield plain(error)
