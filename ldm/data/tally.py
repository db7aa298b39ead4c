"""Bad samples are named, counted by reason, and end the run when they are too many."""

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ldm.errors import DataError

WINDOW = 1000  # samples over which the share of bad ones is taken
TOLERATED = 0.01  # that share, above which a data set is called bad
NAMED = 10  # faults that are named one by one; behind them, one line for every thousand
SHARDS_IN_A_ROW = 3

log = logging.getLogger(__name__)


class Fault(NamedTuple):
    """One bad sample or shard: where it lies, a reason to count by, and what is wrong in words."""

    where: str
    reason: str
    words: str

    def __str__(self) -> str:
        return f"{self.where}: {self.words}; left out"


class BadSample(DataError):
    """Raised by what reads one sample; who reads many catches it, counts it and goes on."""

    def __init__(self, where: str, reason: str, words: str) -> None:
        self.fault = Fault(where, reason, words)
        super().__init__(str(self.fault))


class Tally:
    """Counts samples as they pass. DataError once more than a share `tolerated` of the last `window` were bad.

    Of a set of known `size` the window is no larger, and a sample that comes twice in it, at the border of two epochs,
    is one. Without a window only `end` judges. A `quiet` one names nothing: another one has named the same faults.
    """

    def __init__(
        self,
        tolerated: float = TOLERATED,
        window: int | None = WINDOW,
        quiet: bool = False,
        size: int | None = None,
    ) -> None:
        self.tolerated = tolerated
        self.size = size
        window = window if window is None or size is None else min(window, size)
        self.window = window
        self.quiet = quiet
        self.seen = 0
        self.counts: Counter[str] = Counter()
        self._recent: deque[str] = deque(maxlen=window or 0)  # where the bad ones lie, "" for good ones
        self._bad_shards: set[str] = set()

    @property
    def bad(self) -> int:
        """How many samples and shards were bad so far."""
        return self.counts.total()

    def add(self, seen: int, faults: Sequence[Fault] = ()) -> None:
        """Count samples, the bad ones among them by their faults."""
        self.seen += seen
        self._recent.extend([""] * max(0, seen - len(faults)) + [fault.where for fault in faults])
        for fault in faults:
            self.counts[fault.reason] += 1
            if not self.quiet and (self.bad <= NAMED or self.bad % 1000 == 0):
                log.warning("%s%s", fault, "" if self.bad <= NAMED else f" (bad sample {self.bad})")
        if faults and self.window is not None:
            bad = [where for where in self._recent if where]
            if len(bad if self.size is None else {*bad}) > self.tolerated * self.window:
                raise self._too_many(f"of {self.window}")

    def again(self, seen: int, counts: Mapping[str, int]) -> None:
        """Count samples, the bad ones by reason, that an earlier run has judged and named."""
        self.seen += seen
        self.counts.update(counts)

    def shard(self, name: str, torn: bool) -> None:
        """Count a shard. DataError for the third torn one in a row."""
        self._bad_shards = self._bad_shards | {name} if torn else set()
        if len(self._bad_shards) >= SHARDS_IN_A_ROW:
            raise DataError(
                f"{name}: {SHARDS_IN_A_ROW} bad shards in a row ({self.reasons()}), expected whole tar files; "
                "check the path, copy or prepare them again"
            )

    def end(self) -> None:
        """At the end of a data set: DataError where too large a share of all of it was bad."""
        if self.bad > self.tolerated * self.seen:
            raise self._too_many("of them")

    def reasons(self) -> str:
        """The counts in words, the most frequent reason first."""
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())

    def _too_many(self, of: str) -> DataError:
        return DataError(
            f"shards: got {self.bad} bad samples among {self.seen} ({self.reasons()}), expected at most "
            f"{self.tolerated:.1%} {of}; they are named in the log; prepare the data again"
        )
