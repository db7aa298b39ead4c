"""The pictures of the output folder, newest first, whoever drew them: found, searched, starred, put into the trash."""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import DataError
from ldm.files import save_text
from ldm.outputs import check_writable
from ldm.ui.info import read_text, settings_of

TRASH, STARS = ".trash", ".stars"
PREVIEW_OF_A_STEP = ".step"


@dataclass(frozen=True)
class Entry:
    """One picture of the folder: its file, when it was written, its settings, and whether it has a star."""

    path: Path
    written: float
    settings: dict[str, object]
    starred: bool

    @property
    def name(self) -> str:
        """The file name."""
        return self.path.name

    @property
    def prompt(self) -> str:
        """What was asked for, as far as the picture says so."""
        return str(self.settings.get("prompt", ""))

    @property
    def model(self) -> str:
        """The model that drew it, as far as the picture says so."""
        return str(self.settings.get("model", ""))

    @property
    def day(self) -> str:
        """The day it was written, YYYY-MM-DD in local time."""
        return time.strftime("%Y-%m-%d", time.localtime(self.written))


class History:
    """One output folder. Settings are read once from each file and kept while it does not change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[tuple[str, int], dict[str, object]] = {}
        self._starring = threading.Lock()

    def find(self, name: str) -> Path:
        """The picture of that name. Raises DataError for a name that is no picture of this folder."""
        path = self.folder / name
        plain = name == os.path.basename(name) and not name.startswith(".") and "\0" not in name
        if not plain or path.suffix.lower() != ".png" or path.is_symlink() or not path.is_file():
            raise DataError("picture: it is not in the output folder any more; reload the page")
        return path

    def entries(self) -> list[Entry]:
        """All pictures, the newest first."""
        stars = self._stars()
        found = []
        for file in os.scandir(self.folder) if self.folder.is_dir() else ():
            named = file.name.lower().endswith(".png") and not file.name.startswith(".")
            if named and file.is_file(follow_symlinks=False) and PREVIEW_OF_A_STEP not in file.name:
                written = file.stat().st_mtime_ns
                key = (file.name, written)
                if key not in self._known:
                    self._known[key] = _settings(Path(file.path))
                found.append(Entry(Path(file.path), written / 1e9, self._known[key], file.name in stars))
        return sorted(found, key=lambda entry: (entry.written, entry.name), reverse=True)

    def star(self, name: str) -> None:
        """Give a picture a star, or take it away."""
        self.find(name)
        with self._starring:
            check_writable(self.folder)
            stars = self._stars() ^ {name}
            save_text(self.folder / STARS, "".join(f"{star}\n" for star in sorted(stars)))

    def trash(self, name: str) -> Path:
        """Move a picture into the folder's trash, under a name that is not taken there; returns its new path."""
        path = self.find(name)
        check_writable(self.folder)
        folder = self.folder / TRASH
        folder.mkdir(exist_ok=True)
        target, again = folder / name, 1
        while target.exists():
            again += 1
            target = folder / f"{path.stem}.{again}{path.suffix}"
        return path.rename(target)

    def _stars(self) -> set[str]:
        try:
            return set((self.folder / STARS).read_text(encoding="utf-8").splitlines())
        except FileNotFoundError:
            return set()


def search(
    entries: Sequence[Entry], words: str = "", model: str = "", day: str = "", starred: bool = False
) -> list[Entry]:
    """The entries whose prompts have all `words`, in any order and case, and that are of that model and day."""
    wanted = words.casefold().split()
    return [
        entry
        for entry in entries
        if all(word in entry.prompt.casefold() for word in wanted)
        and model in ("", entry.model)
        and day in ("", entry.day)
        and (entry.starred or not starred)
    ]


def _settings(path: Path) -> dict[str, object]:
    try:
        return settings_of(read_text(path))
    except DataError:
        return {}
