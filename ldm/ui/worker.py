"""One job runs, the others wait in line: whose turn it is, how long that takes, and how a job ends."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from ldm.errors import LdmError, MachineError
from ldm.ui import bugs

MAX_WAITING = 8


class State(Enum):
    """Where a job is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


class Job:
    """Work of one owner: a generator that yields after each small piece, and looks at what it is asked to do.

    `cost` is how much there is to do and `done` how much is done, in a unit that is the same for all jobs.
    """

    def __init__(self, owner: str, work: "Work", cost: float) -> None:
        self.owner, self.work, self.cost = owner, work, cost
        self.done = 0.0
        self.state = State.WAITING
        self.error = ""
        self.stopping = False  # end after this piece
        self.skipping = False  # end this picture, go on with the next
        self.leaving = False  # nobody looks any more: end after this picture
        self._began = time.monotonic()
        self._changes = 0
        self._changed = threading.Condition()

    @property
    def ended(self) -> bool:
        """Whether nothing more happens."""
        return self.state not in (State.WAITING, State.RUNNING)

    @property
    def seconds(self) -> float:
        """How long the work has taken so far, what was needed to begin it left out."""
        return time.monotonic() - self._began

    def begin(self) -> None:
        """Say that the first piece of work begins now, after whatever had to be loaded for it."""
        if not self.done:
            self._began = time.monotonic()

    def changed(self) -> None:
        """Wake everybody who waits for news."""
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def wait(self, seen: int, seconds: float) -> int:
        """Wait until there is news after number `seen`, `seconds` at most; returns the number of the latest."""
        with self._changed:
            self._changed.wait_for(lambda: self._changes != seen, seconds)
            return self._changes


Work = Callable[[Job], Iterator[None]]


@dataclass(frozen=True)
class Place:
    """A place in line: how many jobs come before, and in how many seconds it begins, where that is known."""

    ahead: int
    begins: float | None


class Worker:
    """Runs jobs one after another in a thread of its own, so that a job lives as long as it has to, not its viewer."""

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self.max_waiting = max_waiting
        self.rate: float | None = None  # seconds for one unit of cost, learned
        self._jobs: list[Job] = []  # the first one runs or is about to
        self._news = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="ldm-worker", daemon=True)
        self._thread.start()

    def submit(self, owner: str, work: Work, cost: float) -> Job:
        """Put work at the end of the line. Raises MachineError where the line is full or the worker is closed."""
        job = Job(owner, work, cost)
        with self._news:
            if self._closed:
                raise MachineError("server: it is being shut down; start it again")
            if len(self._jobs) > self.max_waiting:
                seconds = self._seconds(self._jobs[:2])
                when = "" if seconds is None else f" in about {max(1, round(seconds))} s"
                raise MachineError(f"busy: {self.max_waiting} people are waiting; try again{when}")
            self._jobs.append(job)
            self._news.notify_all()
        return job

    def place(self, job: Job) -> Place:
        """The place of a job in line; 0 ahead is the one that runs."""
        with self._news:
            if job not in self._jobs:
                return Place(0, 0.0)
            ahead = self._jobs.index(job)
            return Place(ahead, self._seconds(self._jobs[:ahead]))

    def estimate(self, cost: float) -> float | None:
        """Seconds that work of that cost takes once it runs, if anything has run before."""
        return None if self.rate is None else cost * self.rate

    def jobs_of(self, owner: str) -> list[Job]:
        """The jobs of one owner that have not ended, in order."""
        with self._news:
            return [job for job in self._jobs if job.owner == owner]

    def stop(self, job: Job) -> None:
        """End a job: at once where it waits, after the running piece where it runs."""
        job.stopping = True
        self._drop_waiting(job)

    def leave(self, job: Job) -> None:
        """Nobody looks at this job any more: it ends after its running picture, or never begins."""
        job.leaving = True
        self._drop_waiting(job)

    def close(self, seconds: float = 8.0) -> None:
        """Take no more work, end what there is, and wait for the thread for so many seconds."""
        with self._news:
            self._closed = True
            jobs = list(self._jobs)
            self._news.notify_all()
        for job in jobs:
            self.stop(job)
        self._thread.join(seconds)

    def _drop_waiting(self, job: Job) -> None:
        with self._news:
            if job.state is State.WAITING and job in self._jobs:
                self._jobs.remove(job)
                job.state = State.STOPPED
        job.changed()

    def _seconds(self, jobs: list[Job]) -> float | None:
        left = sum(max(0.0, job.cost - job.done) for job in jobs)
        return 0.0 if not jobs else self.estimate(left)

    def _serve(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job = self._jobs[0]
                job.state = State.RUNNING
            job.changed()
            state, error = self._run(job)
            with self._news:
                self._jobs.remove(job)
                job.error, job.state = error, state
                others = list(self._jobs)
            for one in (job, *others):
                one.changed()

    def _run(self, job: Job) -> tuple[State, str]:
        """Do the work of a job. Only words are kept of an exception: its traceback holds tensors."""
        job.begin()
        try:
            for _ in job.work(job):
                if job.done:
                    self.rate = job.seconds / job.done
                job.changed()
        except LdmError as error:
            return State.FAILED, str(error)
        except Exception:  # the thread has to live on, and its owner has to hear of it
            return State.FAILED, bugs.told()
        return (State.STOPPED if job.stopping else State.DONE), ""
