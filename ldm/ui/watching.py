"""What somebody who watches a job is shown: a view whenever there is news, but not more often than eyes can use."""

import time
from collections.abc import Generator
from dataclasses import dataclass

from ldm.ui.drawing import Drawing, Picture, as_jpeg_address
from ldm.ui.worker import Job, Place, State, Worker

PREVIEW_EVERY_SECONDS = 0.15
LOOK_EVERY_SECONDS = 0.5


@dataclass(frozen=True)
class View:
    """A job at one moment: its state and place, which picture and step it is at, and what there is to see."""

    state: State
    place: Place
    index: int  # of the picture that is being drawn
    total: int
    step: int  # steps done of it, 0 before the first
    steps: int
    done: float  # of the whole job, 0 … 1
    seconds: float
    preview: str  # the address of the latest frame, or nothing
    pictures: tuple[Picture, ...]
    error: str = ""

    @property
    def seconds_left(self) -> float | None:
        """Until the end of the job, by its own pace; None before the first step."""
        return self.seconds / self.done * (1 - self.done) if self.done else None


def watch(worker: Worker, job: Job, drawing: Drawing, preview: bool = True) -> Generator[View, None, None]:
    """Views of a job until it has ended. The first and the last step of a picture are always shown, the others at
    most one in 150 ms; frames are decoded here, so that a job nobody watches decodes none.

    A watcher that goes away before the end (a closed tab) makes the job end after its running picture.
    """
    seen, last = 0, ("", -1, -1)
    shown_at = 0.0
    frame = ""
    try:
        while True:
            ended = job.ended  # before the rest is read, so that the last view has everything
            now = drawing.now
            at = (job.state.value, now.index if now else -1, now.step.index if now else -1)
            if now is not None and preview and at != last:
                frame = as_jpeg_address(now.preview())
            if at != last or job.state is State.WAITING:
                last, shown_at = at, time.monotonic()
                yield _view(worker, job, drawing, frame)
            if ended:
                return
            seen = job.wait(seen, LOOK_EVERY_SECONDS)
            while (
                not _urgent(job, drawing, last) and (early := shown_at + PREVIEW_EVERY_SECONDS - time.monotonic()) > 0
            ):
                seen = job.wait(seen, early)
    finally:
        if not job.ended:
            worker.leave(job)


def _urgent(job: Job, drawing: Drawing, last: tuple[str, int, int]) -> bool:
    """Whether there is a first or last step to show, or another state."""
    now = drawing.now
    if job.state.value != last[0] or now is None:
        return job.state.value != last[0]
    return (now.index, now.step.index) != last[1:] and (now.index != last[1] or now.step.index == now.step.total - 1)


def _view(worker: Worker, job: Job, drawing: Drawing, frame: str) -> View:
    now = drawing.now
    return View(
        state=job.state,
        place=worker.place(job),
        index=now.index if now else len(drawing.pictures),
        total=len(drawing.orders),
        step=now.step.index + 1 if now else 0,
        steps=now.step.total if now else 0,
        done=job.done / job.cost if job.cost else 0.0,
        seconds=job.seconds,
        preview=frame,
        pictures=drawing.pictures,
        error=job.error,
    )
