"""Where pictures go: names that are safe, numbered and never taken twice, also by two processes at once."""

import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ldm.errors import MachineError, SettingError

NUMBERED = re.compile(r"([0-9]{4,9})-")
# What a killed process can leave behind: our reservations, and the temporary files of `images.save_png`.
LEFT_BEHIND = re.compile(r"\.[0-9]{4,9}(\.reserved|-.*\.png\.[0-9]+\.tmp)")
STALE_SECONDS = 24 * 3600


def check_writable(folder: Path) -> None:
    """Prove that `folder` can be written, or made if it is missing, and remove what was left there a day ago.

    Raises MachineError otherwise, before anything is computed; leaves no trace.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise MachineError(f"{folder}: cannot write there: {error.strerror}; choose another folder") from None
    for path in folder.iterdir() if folder.is_dir() else ():
        if LEFT_BEHIND.fullmatch(path.name) and path.stat().st_mtime < time.time() - STALE_SECONDS:
            path.unlink(missing_ok=True)


def check_new(path: Path, field: str = "output") -> None:
    """Raise SettingError for an exact output name that is taken or that is no PNG's."""
    if path.suffix.lower() != ".png":
        raise SettingError(f"{field}: {path} does not end in .png; only PNG files are written, change the name")
    taken = [path, *path.parent.glob(f"{_literal(path.stem)}.step[0-9]*.png")]
    for other in taken:
        if other.exists() or other.is_symlink():
            raise SettingError(f"{field}: {other} exists and is never overwritten; give another name or remove it")


def preview_path(path: Path, step: int) -> Path:
    """The name of the preview of `path` after `step` steps: NAME.step012.png."""
    return path.with_name(f"{path.stem}.step{step:03d}.png")


@contextmanager
def reserved(folder: Path, name: str) -> Iterator[Path]:
    """The next free path `NNNN-name.png` in `folder`, which is made, kept from other processes until the block ends.

    The reservation is a hidden file that is created exclusively: a killed process leaves no empty picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = max(_numbers(folder), default=0) + 1
    while True:
        reservation, ours = folder / f".{number:04d}.reserved", False
        try:
            with ctrl_c_waits():
                ours = _create(reservation)
            # Another process may have finished this number between our look and our reservation.
            if ours and number not in _numbers(folder):
                yield folder / f"{number:04d}-{name}.png"
                return
        finally:
            with ctrl_c_waits():
                if ours:
                    reservation.unlink(missing_ok=True)
        number += 1


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """What must not be done by half: a Ctrl-C in the block counts when it is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = list[tuple[int, FrameType | None]]()
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        if came and callable(before):
            before(*came[0])


def _create(file: Path) -> bool:
    """Make an empty file; False where there is one already."""
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _numbers(folder: Path) -> set[int]:
    matches = (NUMBERED.match(name) for name in os.listdir(folder))
    return {int(match[1]) for match in matches if match}


def _literal(name: str) -> str:
    """`name` as a glob pattern that matches itself only."""
    return re.sub(r"([*?[])", r"[\1]", name)
