"""What all screens share: the models, the worker, the output folder, and what is remembered of each open page."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import SettingError
from ldm.outputs import check_writable
from ldm.request import GenerationRequest, resolve, resolve_seed
from ldm.ui.drawing import Drawing, Kept, Order, Picture, Recording, check_size, keep_partial, split
from ldm.ui.models import Models
from ldm.ui.worker import Job, State, Worker

REMEMBERED_PAGES = 16
MAX_PIXELS = 2048 * 2048


@dataclass
class Memory:
    """What one open page can ask for again: its last recorded picture, and the one it stopped."""

    recording: Recording | None = None
    kept: Kept | None = None


@dataclass(frozen=True)
class Limits:
    """What one request may ask of this server."""

    max_images: int = 4
    max_pixels: int = MAX_PIXELS
    preview: bool = True


class Studio:
    """Takes requests of pages and of the API, and gives back jobs to watch. Owners are the names of open pages."""

    def __init__(self, models: Models, outdir: Path, worker: Worker, limits: Limits | None = None) -> None:
        check_writable(outdir)
        self.models, self.outdir, self.worker = models, outdir, worker
        self.limits = limits or Limits()
        self._memories: OrderedDict[str, Memory] = OrderedDict()
        self._remembering = threading.Lock()

    def resolved(self, model: str, settings: Mapping[str, object]) -> GenerationRequest:
        """The checked request of these settings, with the model's own where they have none, and a seed."""
        request = resolve(GenerationRequest(**settings), self.models.config(model))
        return request.model_copy(update={"seed": resolve_seed(request.seed)})

    def orders(self, model: str, settings: Mapping[str, object]) -> list[Order]:
        """One order for each picture of these settings. Raises SettingError where they break a rule or a limit."""
        request = self.resolved(model, settings)
        if request.num_images > self.limits.max_images:
            raise SettingError(
                f"num_images: {request.num_images} are too many at once; use at most {self.limits.max_images}"
            )
        return split(model, request)

    def draw(self, owner: str, orders: list[Order]) -> tuple[Job, Drawing]:
        """Put orders in line. Raises MachineError where the folder cannot be written or the line is full."""
        check_size(orders, self.limits.max_pixels)
        check_writable(self.outdir)
        memory = self.memory(owner)

        def recorded(recording: Recording) -> None:
            memory.recording = recording

        drawing = Drawing(self.models, self.outdir, orders, recorded)
        return self.worker.submit(owner, drawing, drawing.cost), drawing

    def save_kept(self, owner: str) -> Picture:
        """Decode and save the picture that this page stopped; waits for its turn. Raises SettingError without one."""
        kept = self.memory(owner).kept
        if kept is None:
            raise SettingError("picture: nothing was stopped here; press Stop while a picture is drawn")
        saved: list[Picture] = []

        def work(job: Job) -> Iterator[None]:
            saved.append(keep_partial(self.models.engine(kept.order.model), self.outdir, kept))
            yield

        job = self.worker.submit(owner, work, 0.0)
        seen = 0
        while not job.ended:
            seen = job.wait(seen, 1.0)
        if not saved:
            raise SettingError(job.error or "picture: stopped before it was saved; press Save it again")
        self.memory(owner).kept = None
        return saved[0]

    def stop(self, owner: str) -> None:
        """Stop what this page has running and waiting, and nothing of anybody else."""
        for job in self.worker.jobs_of(owner):
            self.worker.stop(job)

    def skip(self, owner: str) -> None:
        """End the picture this page has running, and go on with its next."""
        for job in self.worker.jobs_of(owner):
            job.skipping = job.state is State.RUNNING

    def memory(self, owner: str) -> Memory:
        """What is remembered of a page; the pages that were used longest ago are forgotten."""
        with self._remembering:
            memory = self._memories.setdefault(owner, Memory())
            self._memories.move_to_end(owner)
            while len(self._memories) > REMEMBERED_PAGES:
                self._memories.popitem(last=False)
        return memory

    def warm_up(self) -> None:
        """Load the first model and take one step with it, so that times are known before the first picture."""
        settings = {"steps": 1, "seed": 0, "allow_empty_prompt": True, "num_images": 1, "batch_size": 1}
        order = Order(self.models.first, self.resolved(self.models.first, settings))

        def work(job: Job) -> Iterator[None]:
            engine = self.models.engine(order.model)
            job.begin()
            for _ in engine.stream(order.request):
                job.done = order.cost
                yield

        self.worker.submit("", work, order.cost)
