"""A request to stop becomes a saved state: SIGTERM, SIGUSR1, Ctrl-C and the end of a time limit are noted.

The loop ends after the step that is under way.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CAUGHT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGALRM)
EXIT_SAVED = 75
"""The exit code of a run that was told to stop and can go on: EX_TEMPFAIL of sysexits.h."""
EXIT_INTERRUPTED = 130


class Stopped(Exception):
    """The run ends because a signal asked for it, or its time is up; its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__("--minutes" if number == signal.SIGALRM else signal.Signals(number).name)
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_SAVED


class StopRequest:
    """The signal that asked this process to stop, or 0."""

    def __init__(self) -> None:
        self.number = 0
        self._owner = os.getpid()

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; a second Ctrl-C interrupts at once. A child that inherited this dies as if it had not."""
        if os.getpid() != self._owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def check(self) -> None:
        """Raise Stopped if a signal came: for work that has no state to save."""
        if self.number:
            raise Stopped(self.number)


@contextmanager
def caught(minutes: float | None = None) -> Iterator[StopRequest]:
    """Note the signals that mean stop, instead of dying of them, until the block ends; one comes after `minutes`."""
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in CAUGHT}
    signal.setitimer(signal.ITIMER_REAL, 60.0 * minutes if minutes else 0.0)
    try:
        yield request
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
