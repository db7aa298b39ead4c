"""One job runs and the others wait: order, places, stopping, leaving, and what a watcher sees; no model, no page."""

import gc
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image

from ldm.bundle import Bundle
from ldm.diffusion.samplers import Step
from ldm.errors import MachineError, SettingError
from ldm.formats.finding import bundled_names
from ldm.images import read_settings
from ldm.pipeline import TextToImage
from ldm.request import GenerationRequest
from ldm.ui.drawing import Drawing, Moment, split
from ldm.ui.models import Models
from ldm.ui.studio import Limits, Studio
from ldm.ui.watching import View, watch
from ldm.ui.worker import Job, Place, State, Work, Worker

SECONDS = 60.0  # how long a test waits at most for what should come at once


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close(SECONDS)


class Gate:
    """Work of so many pieces, each of which waits to be let through; it says when it begins."""

    def __init__(self, pieces: int = 1) -> None:
        self.pieces = pieces
        self.begun = threading.Event()
        self.through = threading.Semaphore(0)

    def __call__(self, job: Job) -> Iterator[None]:
        self.begun.set()
        for piece in range(self.pieces):
            assert self.through.acquire(timeout=SECONDS)
            job.done = job.cost * (piece + 1) / self.pieces
            yield
            if job.stopping or job.leaving:
                return

    def open(self) -> None:
        self.through.release(self.pieces)


def end(job: Job) -> Job:
    """The job after its end."""
    until, seen = time.monotonic() + SECONDS, 0
    while not job.ended and time.monotonic() < until:
        seen = job.wait(seen, 0.1)
    assert job.ended
    return job


def running(worker: Worker, owner: str = "a", pieces: int = 1) -> tuple[Job, Gate]:
    """A job that has begun and waits to be let through."""
    gate = Gate(pieces)
    job = worker.submit(owner, gate, cost=10.0)
    assert gate.begun.wait(SECONDS)
    return job, gate


def test_jobs_run_one_at_a_time_in_the_order_they_came(worker: Worker) -> None:
    order: list[str] = []
    inside = threading.Lock()

    def work(name: str) -> Work:
        def run(job: Job) -> Iterator[None]:
            assert inside.acquire(blocking=False), "two jobs at once"
            order.append(name)
            yield
            inside.release()

        return run

    jobs = [worker.submit(name, work(name), 1.0) for name in "abcde"]
    assert [end(job).state for job in jobs] == [State.DONE] * 5
    assert order == list("abcde")


def test_of_twelve_one_runs_eight_wait_and_three_are_told_when_to_come_again(worker: Worker) -> None:
    first, gate = running(worker)
    worker.rate = 2.0  # seconds for one unit of cost
    waiting = [worker.submit(str(n), Gate(), 10.0) for n in range(8)]
    for _ in range(3):
        with pytest.raises(MachineError, match=r"busy: 8 people are waiting; try again in about 40 s"):
            worker.submit("late", Gate(), 10.0)
    places = [worker.place(job) for job in waiting]
    assert [place.ahead for place in places] == list(range(1, 9))
    assert [place.begins for place in places] == [20.0 * n for n in range(1, 9)]
    assert worker.place(first) == Place(0, 0.0)
    for job in waiting:
        worker.stop(job)
    gate.open()
    assert end(first).state is State.DONE


def test_a_waiting_job_that_is_stopped_never_begins_and_leaves_the_others_alone(worker: Worker) -> None:
    first, gate = running(worker, "a")
    second, third = worker.submit("b", Gate(), 1.0), worker.submit("c", Gate(), 1.0)
    worker.stop(second)
    assert second.state is State.STOPPED and worker.place(third).ahead == 1
    gate.open()
    cast(Gate, third.work).open()
    assert end(first).state is State.DONE and end(third).state is State.DONE
    assert not cast(Gate, second.work).begun.is_set()


def test_a_running_job_that_is_stopped_ends_after_its_piece(worker: Worker) -> None:
    job, gate = running(worker, pieces=10)
    worker.stop(job)
    gate.open()
    assert end(job).state is State.STOPPED and job.done == 1.0


def test_an_error_is_said_in_words_and_the_next_job_runs(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(job: Job) -> Iterator[None]:
        raise SettingError("steps: 0 is not between 1 and 1000; use 30")
        yield

    def bug(job: Job) -> Iterator[None]:
        yield
        raise ZeroDivisionError("secret")

    said, hidden = end(worker.submit("a", wrong, 1.0)), end(worker.submit("a", bug, 1.0))
    assert said.state is State.FAILED and said.error == "steps: 0 is not between 1 and 1000; use 30"
    assert hidden.state is State.FAILED and "secret" not in hidden.error
    assert hidden.error.split()[-1] in caplog.text and "ZeroDivisionError: secret" in caplog.text
    job, gate = running(worker)
    gate.open()
    assert end(job).state is State.DONE


def test_an_error_keeps_nothing_of_what_it_was_about_in_memory(worker: Worker) -> None:
    class Tensor:
        pass

    kept: list[weakref.ref[Tensor]] = []

    def out_of_memory(job: Job) -> Iterator[None]:
        large = Tensor()
        kept.append(weakref.ref(large))
        yield
        raise MachineError("memory: not enough")

    job = end(worker.submit("a", out_of_memory, 1.0))
    assert job.error == "memory: not enough" and kept[0]() is None


def test_closing_ends_what_runs_drops_what_waits_and_takes_no_more() -> None:
    worker = Worker()
    first, gate = running(worker, pieces=10)
    second = worker.submit("b", Gate(), 1.0)
    gate.open()
    worker.close(SECONDS)
    assert first.ended and second.state is State.STOPPED
    with pytest.raises(MachineError, match="shut down"):
        worker.submit("c", Gate(), 1.0)


# What a watcher sees: a drawing whose steps come when the test says so.


@dataclass
class Engine:
    """Counts how often somebody wanted to see something."""

    looks: int = 0

    def preview(self, step: Step) -> Image.Image:
        self.looks += 1
        return Image.new("RGB", (4, 4))


class Scene:
    """A drawing of one picture whose steps take a given time."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.engine = Engine()
        self.orders, self.pictures = ["one"], ()
        self.kept = None
        self.now: Moment | None = None

    def __call__(self, job: Job) -> Iterator[None]:
        for index, seconds in enumerate(self.seconds):
            time.sleep(seconds)
            step = Step(index, len(self.seconds), 1.0, cast(Any, None), cast(Any, None))
            self.now = Moment(0, step, cast(TextToImage, self.engine))
            job.done = (index + 1) / len(self.seconds)
            yield


def views(worker: Worker, scene: Scene) -> list[View]:
    return list(watch(worker, worker.submit("a", scene, 1.0), cast(Drawing, scene)))


class Played(Job):
    """A job of one picture, whose steps and end come at known times of a clock that only goes while somebody waits."""

    def __init__(self, scene: Scene, times: list[float]) -> None:
        super().__init__("a", scene, 1.0)
        self.state = State.RUNNING
        self.clock = 0.0
        self._times, self._pieces = times, scene(self)

    def wait(self, seen: int, seconds: float) -> int:
        if not self._times or self._times[0] > self.clock + seconds:
            self.clock += seconds
            return seen
        self.clock = self._times.pop(0)
        next(self._pieces, None)
        if not self._times:
            self.state = State.DONE
        return seen + 1


def test_fast_steps_are_shown_at_most_once_in_150_ms_and_the_first_and_last_always(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene([0.0] * 50)
    job = Played(scene, [0.011 * number for number in range(1, 52)])
    monkeypatch.setattr("ldm.ui.watching.time", SimpleNamespace(monotonic=lambda: job.clock))
    seen = [(round(job.clock, 3), view.step) for view in watch(worker, job, cast(Drawing, scene)) if view.step]
    # The first, whatever is there after each 150 ms, the last, and the end of the job.
    assert seen == [(0.011, 1), (0.161, 14), (0.311, 28), (0.461, 41), (0.55, 50), (0.561, 50)]
    assert scene.engine.looks == len(seen)


def test_slow_steps_are_all_shown(worker: Worker) -> None:
    seen = [view.step for view in views(worker, Scene([0.5, 0.5, 0.5]))]
    assert [step for step in (1, 2, 3) if step in seen] == [1, 2, 3]


def test_nothing_is_decoded_when_nobody_looks(worker: Worker) -> None:
    scene = Scene([0.0] * 5)
    assert end(worker.submit("a", scene, 1.0)).state is State.DONE
    assert scene.engine.looks == 0


def test_a_closed_tab_takes_its_waiting_job_out_of_the_line(worker: Worker) -> None:
    _, gate = running(worker)
    job = worker.submit("b", Scene([0.0]), 1.0)
    watching = watch(worker, job, cast(Drawing, job.work))
    assert next(watching).place.ahead == 1
    watching.close()
    assert job.state is State.STOPPED
    gate.open()


# The same with the real engine on the tiny model.


@pytest.fixture
def studio(tiny_folder: Path, tmp_path: Path) -> Iterator[Studio]:
    made = Studio(Models(str(tiny_folder), []), tmp_path, Worker(), Limits(max_images=4))
    yield made
    made.worker.close(SECONDS)


def test_a_tab_closed_while_a_picture_is_drawn_keeps_that_picture_and_drops_the_rest(studio: Studio) -> None:
    orders = studio.orders("tiny", {"prompt": "a red circle", "steps": 3, "seed": 5, "num_images": 3})
    job, drawing = studio.draw("a", orders)
    watching = watch(studio.worker, job, drawing)
    while next(watching).step == 0:
        pass
    watching.close()
    end(job)
    assert [path.name for path in sorted(studio.outdir.glob("*.png"))] == ["0001-a-red-circle.png"]


def test_skip_ends_one_picture_and_goes_on_with_the_next(studio: Studio) -> None:
    orders = studio.orders("tiny", {"prompt": "a red circle", "steps": 60, "seed": 5, "num_images": 2})
    job, drawing = studio.draw("a", orders)
    while drawing.now is None:
        time.sleep(0.001)
    studio.skip("a")
    while not job.ended and drawing.now is not None and drawing.now.index == 0:
        time.sleep(0.001)
    end(job)
    assert [picture.index for picture in drawing.pictures] == [1]
    assert drawing.pictures[0].settings["seed"] == 6


def test_a_stopped_picture_can_still_be_saved_and_says_that_it_was_stopped(studio: Studio) -> None:
    job, drawing = studio.draw("a", studio.orders("tiny", {"prompt": "a star", "steps": 60, "seed": 5}))
    while drawing.now is None:
        time.sleep(0.001)
    studio.stop("somebody else")
    assert not job.stopping
    studio.stop("a")
    end(job)
    assert drawing.pictures == () and drawing.kept is not None
    studio.memory("a").kept = drawing.kept
    with pytest.raises(SettingError, match="nothing was stopped"):
        studio.save_kept("b")
    settings = read_settings(studio.save_kept("a").path)
    assert settings is not None and settings["stopped_after_steps"] == drawing.kept.step.index + 1


def test_each_picture_of_a_request_is_the_engines_own(studio: Studio, tiny_bundle: Bundle) -> None:
    job, drawing = studio.draw("a", studio.orders("tiny", {"prompt": "a star", "steps": 2, "seed": 5, "num_images": 2}))
    end(job)
    engine = TextToImage(tiny_bundle)
    for picture in drawing.pictures:
        (known,) = engine(GenerationRequest(prompt="a star", steps=2, seed=5 + picture.index))
        assert Image.open(picture.path).tobytes() == known.image.tobytes()


def test_a_run_that_has_no_memory_says_what_to_do_keeps_nothing_and_the_next_one_works(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder = studio.models.engine("tiny").bundle.autoencoder
    latents: list[weakref.ref[torch.Tensor]] = []

    def decode(latent: torch.Tensor) -> torch.Tensor:
        latents.append(weakref.ref(latent))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(autoencoder, "decode", decode)
    job, drawing = studio.draw("a", studio.orders("tiny", {"prompt": "a star", "steps": 2, "seed": 5}))
    words = "memory: not enough for a picture of 64x64; use a smaller size, a smaller model, or close other programs"
    assert end(job).error == words and drawing.pictures == ()
    studio.memory("a").recording = None  # the steps of the last picture are kept on purpose
    gc.collect()
    assert latents[0]() is None
    monkeypatch.undo()
    job, drawing = studio.draw("a", studio.orders("tiny", {"prompt": "a star", "steps": 2, "seed": 5}))
    assert end(job).state is State.DONE and len(drawing.pictures) == 1


def test_a_page_that_orders_twice_gets_both_one_after_the_other(studio: Studio) -> None:
    orders = [studio.orders("tiny", {"prompt": "a star", "steps": 2, "seed": seed}) for seed in (1, 2)]
    drawn = [studio.draw("a", order) for order in orders]
    for job, drawing in drawn:
        end(job)
        assert [picture.settings["seed"] for picture in drawing.pictures] == drawing.orders[0].request.seeds


def test_switching_models_lets_go_of_the_one_before(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "models" / "other")
    shutil.copytree(tiny_folder, tmp_path / "models" / "tiny")
    models = Models(str(tiny_folder), [tmp_path / "models"])
    assert [name for name in models.names if name not in bundled_names()] == ["tiny", "other", "models/tiny"]
    assert models.problems == []
    first = weakref.ref(models.engine("tiny"))
    assert models.engine("tiny") is first()
    second = models.engine("other")
    gc.collect()
    assert first() is None and models.loaded == ("other", second)
    with pytest.raises(SettingError, match="no model '/etc/passwd'"):
        models.engine("/etc/passwd")


def test_models_that_cannot_be_read_are_named_and_left_out(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"1234")
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x04N.")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("unet: 3")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    models = Models(str(tiny_folder), [tmp_path])
    assert [name for name in models.names if name not in bundled_names()] == ["tiny"]
    assert [Path(problem.split(":")[0]).parts[len(tmp_path.parts)] for problem in models.problems] == [
        "broken", "old.ckpt", "torn.safetensors",
    ]  # fmt: skip
    assert models.digests[models.engine("tiny").bundle.sha256] == "tiny"


def test_a_request_over_the_limits_is_refused_before_it_waits(studio: Studio) -> None:
    with pytest.raises(SettingError, match="num_images: 5 are too many at once; use at most 4"):
        studio.orders("tiny", {"prompt": "a star", "num_images": 5})
    small = Studio(studio.models, studio.outdir, studio.worker, Limits(max_pixels=64 * 64))
    request = small.resolved("tiny", {"prompt": "a star", "width": 128, "height": 64})
    with pytest.raises(SettingError, match="128x64: this server draws 4096 pixels at most"):
        small.draw("a", split("tiny", request))
