"""What a run leaves to be looked at: every step in log.jsonl, TensorBoard or W&B, and status.json for programs."""

import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from ldm.cli import warn
from ldm.errors import SettingError
from ldm.files import save_text
from ldm.training.loop import Report
from ldm.training.workers import Workers

STATUS_EVERY_SECONDS = 10.0
Reporter = Literal["tensorboard", "wandb", "none"]


def trackers(chosen: Reporter | None, name: str, folder: Path) -> list[GeneralTracker]:
    """The tracker that was asked for, running; by default TensorBoard, which an install without dependencies may lack.

    Raises SettingError for one that is asked for and not installed.
    """
    if chosen == "none" or (chosen is None and importlib.util.find_spec("tensorboard") is None):
        return []
    kind = chosen or "tensorboard"
    if importlib.util.find_spec(kind) is None:
        raise SettingError(f"--report-to: {kind} is not installed; pip install {kind}, or choose --report-to none")
    try:
        tracker = wandb_tracker(name, folder) if kind == "wandb" else TensorBoardTracker("tensorboard", folder)
        tracker.start()
    except OSError as error:
        warn(f"{folder}: {kind} cannot write there ({error.strerror}); training goes on without it")
        return []
    return [tracker]


def wandb_tracker(name: str, folder: Path) -> WandBTracker:
    """The tracker of the W&B run that this folder began, if it has: a run that goes on is the same one there."""
    noted = folder / "wandb.txt"
    if not noted.is_file():
        save_text(noted, uuid.uuid4().hex[:8] + "\n")
    return WandBTracker(name, id=noted.read_text(encoding="utf-8").strip(), resume="allow", dir=str(folder))


class Record:
    """The log of a run, kept by its main process; a log or tracker that cannot be written is no reason to end.

    `bad_samples` gives how many samples that process has left out so far, by reason.
    """

    def __init__(
        self,
        folder: Path,
        me: Workers,
        watching: Sequence[GeneralTracker] = (),
        bad_samples: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.folder = folder
        self.me = me
        self.watching = list(watching)
        self.bad_samples = bad_samples
        self._said = -STATUS_EVERY_SECONDS
        self._began: dict[str, tuple[float, int]] = {}
        self._defined: set[str] = set()

    def step(self, stage: str, report: Report) -> None:
        """Write down one step."""
        if not self.me.main:
            return
        numbers = {
            **{name: round(value, 6) for name, value in report.losses.items()},
            "learning_rate": report.learning_rate,
            "grad_norm": round(report.grad_norm, 5),
            "rate": round(report.rate, 2),
            "skipped": report.skipped,
        }
        bad = {"bad_samples": found} if (found := self.bad_samples()) else {}
        self._append({"stage": stage, "step": report.step, "time": round(time.time(), 1), **_json(numbers), **bad})
        self._each(lambda tracker: _tell(tracker, stage, report.step, numbers, self._defined))
        if time.monotonic() - self._said >= STATUS_EVERY_SECONDS or report.step == report.total:
            began, first = self._began.setdefault(stage, (time.monotonic(), report.step))
            pace = (time.monotonic() - began) / max(1, report.step - first)
            left = round(pace * (report.total - report.step))
            self.status("training", stage=stage, step=report.step, total=report.total, seconds_left=left, **numbers)

    def status(self, state: str, **facts: Any) -> None:
        """Say in status.json what the run is doing: training, saved, failed or finished."""
        self._said = time.monotonic()
        who = {"state": state, "rank": self.me.rank, "world": self.me.world, "pid": os.getpid()}
        about = {**who, "time": time.time(), "bad_samples": self.bad_samples(), **_json(facts)}
        try:
            save_text(self.folder / "status.json", json.dumps(about, indent=2) + "\n")
        except OSError as error:
            warn(f"{self.folder}/status.json: {error.strerror}; training goes on")

    def _append(self, row: dict[str, Any]) -> None:
        try:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            warn(f"{self.folder}/log.jsonl: {error.strerror}; this step is not in it")

    def close(self) -> None:
        """End what watches."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, act: Callable[[GeneralTracker], object]) -> None:
        """Do something with every tracker; one that cannot write, to a full disk say, is left out from there on."""
        for tracker in tuple(self.watching):
            try:
                act(tracker)
            except OSError as error:
                self.watching.remove(tracker)
                why = error.strerror or error
                warn(f"{self.folder}: {tracker.name} cannot write ({why}); training goes on without it")


def _tell(tracker: GeneralTracker, stage: str, step: int, numbers: Mapping[str, float], defined: set[str]) -> None:
    """Tell a tracker the numbers of a step. Each stage counts from 1, and W&B drops what is behind.

    `defined` has the stages of which W&B knows that.
    """
    values = {f"{stage}/{name}": value for name, value in numbers.items()}
    if not isinstance(tracker, WandBTracker):
        tracker.log(values, step=step)
        return
    if stage not in defined:
        tracker.tracker.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        defined.add(stage)
    tracker.log({**values, f"{stage}/step": step})


def _json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with null for numbers that are not finite, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in facts.items()
    }
