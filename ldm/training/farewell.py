"""A process that ends says so, in the store where all met: one that did not is the dead or silent one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store

from ldm.errors import LdmError, MachineError
from ldm.training.workers import Workers

SECONDS = 5.0  # in which the others notice, too, that somebody is missing
LISTENING = 0.5  # for which the main process stays once all others have failed, since the store may lie in it


@contextmanager
def together(me: Workers) -> Iterator[None]:
    """What all processes do together: one that fails tells the others, and one that others leave alone says who did.

    Raises MachineError in the first of those that are left, and ends the others, where nobody has said why.
    """
    try:
        yield
    except Exception as error:  # any of them is the end here, and its kind says whose
        if not is_of_others(error):
            say(me, f"failed: {error}")
            if isinstance(error, LdmError):
                if said_by_main(me, str(error)):
                    raise SystemExit(error.exit_code) from None
                if me.main and me.world > 1 and not missing(me, failed=False):
                    time.sleep(LISTENING)  # they look once more whether it is what the main one says
            raise
        silent = missing(me) if say(me, "left alone") else [0]
        if silent is None or me.rank != min(set(range(me.world)) - set(silent)):
            raise SystemExit(MachineError.exit_code) from None
        who = f"rank {', '.join(map(str, silent))}" if silent else "no rank, but the network,"
        what = "said nothing for --dist-timeout" if "imed out" in str(error) else "is gone"
        raise MachineError(
            f"processes: {who} {what}; see what it printed and whether its machine has memory, then give the same "
            "command again: it goes on from the last checkpoint"
        ) from None


def is_of_others(error: Exception) -> bool:
    """Whether an error means that other processes did not answer; gloo has no class for it."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def said_by_main(me: Workers, words: str) -> bool:
    """Whether the main process ends with the same words, which then are said once."""
    until = time.monotonic() + SECONDS
    try:
        while me.rank > 0 and time.monotonic() < until:
            if _get_default_store().check(["ended/0"]):
                return _get_default_store().get("ended/0") == f"failed: {words}".encode()
            time.sleep(0.1)
    except torch.distributed.DistError:
        pass
    return False


def say(me: Workers, how: str) -> bool:
    """Leave word of how this process ends: "left alone", or "failed: " and why. False where the store is gone."""
    if me.world > 1:
        try:
            _get_default_store().set(f"ended/{me.rank}", how)
        except torch.distributed.DistError:
            return False
    return True


def beat(me: Workers) -> None:
    """Let those know that wait for this process, by `heartbeat`, that it works."""
    if me.world > 1:
        _get_default_store().add("beats", 1)


def heartbeat(me: Workers) -> Callable[[], None]:
    """What a process calls now and then while it waits for the main one to do something alone.

    It raises DistError, as an exchange would, where that one has ended, or has not called `beat` for as long as
    processes wait for one another.
    """
    heard, since = -1, time.monotonic()

    def listen() -> None:
        nonlocal heard, since
        store = _get_default_store()
        if store.check(["ended/0"]):
            raise torch.distributed.DistError("rank 0 has ended")
        if (beats := store.add("beats", 0)) != heard:
            heard, since = beats, time.monotonic()
        elif time.monotonic() - since > me.patience:
            raise torch.distributed.DistError("timed out waiting for rank 0")

    return listen


def missing(me: Workers, failed: bool = True) -> list[int] | None:
    """The ranks that have not said within some seconds how they end; None, if `failed` ends it, where one failed."""
    awaited, until = [rank for rank in range(me.world) if rank != me.rank], time.monotonic() + SECONDS
    try:
        while awaited and time.monotonic() < until:
            time.sleep(0.1)
            heard = [rank for rank in awaited if _get_default_store().check([f"ended/{rank}"])]
            if failed and any(_get_default_store().get(f"ended/{rank}").startswith(b"failed") for rank in heard):
                return None
            awaited = [rank for rank in awaited if rank not in heard]
    except torch.distributed.DistError:
        pass  # rank 0, in which the store may lie, has waited as long and is gone
    return awaited
