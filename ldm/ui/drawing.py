"""Drawing as the work of a job: one picture after another, each saved when it is finished, all of it to be watched."""

import base64
import io
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ldm.diffusion.samplers import Step
from ldm.errors import SettingError
from ldm.images import save_png
from ldm.outputs import reserved
from ldm.pipeline import GeneratedImage, TextToImage
from ldm.prompts import slug
from ldm.request import GenerationRequest
from ldm.ui.models import Models
from ldm.ui.worker import Job

RECORDED_STEPS = 100
PREVIEW_QUALITY = 85


@dataclass(frozen=True)
class Order:
    """One picture to draw: a resolved request for one image, and the name of the model."""

    model: str
    request: GenerationRequest

    @property
    def cost(self) -> float:
        """What a step costs times the steps: pixels through the network, once for each text."""
        request = self.request
        assert request.width and request.height and request.steps
        return request.steps * request.width * request.height * request.passes / 1e6


@dataclass(frozen=True)
class Picture:
    """A finished picture: the place of its order, its file, and the settings in it."""

    index: int
    path: Path
    settings: dict[str, object]


@dataclass(frozen=True)
class Moment:
    """A picture that is being drawn: the place of its order, its latest step, and who can show what it looks like."""

    index: int
    step: Step
    engine: TextToImage

    def preview(self) -> Image.Image:
        """The clean estimate, as small as the latent."""
        return self.engine.preview(self.step)


@dataclass(frozen=True)
class Kept:
    """A picture that was stopped: what was ordered, and the last step it came to."""

    order: Order
    step: Step


@dataclass
class Recording:
    """The steps of one picture, at most 100 of them evenly; it does not keep a model in memory that is let go of."""

    order: Order
    engine: "weakref.ref[TextToImage]"
    steps: list[Step] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """Keep a step, if it is one of those that are kept."""
        every = -(-step.total // RECORDED_STEPS)
        if step.index % every == 0 or step.index == step.total - 1:
            self.steps.append(step)


class Drawing:
    """Draws orders for a job. Everything public is replaced whole, so that other threads may read it at any time."""

    def __init__(
        self,
        models: Models,
        outdir: Path,
        orders: Sequence[Order],
        recorded: Callable[[Recording], None] = lambda recording: None,
    ) -> None:
        self.models, self.outdir, self.orders, self.recorded = models, outdir, orders, recorded
        self.pictures: tuple[Picture, ...] = ()
        self.now: Moment | None = None
        self.kept: Kept | None = None

    @property
    def cost(self) -> float:
        """The cost of all orders."""
        return sum(order.cost for order in self.orders)

    def __call__(self, job: Job) -> Iterator[None]:
        """Draw until all is done, or until the job is asked to end."""
        before = 0.0
        try:
            for index, order in enumerate(self.orders):
                for step in self._draw(index, order, job):
                    job.done = before + order.cost * (step.index + 1) / step.total
                    yield
                before += order.cost
                job.done = before
                if job.stopping or job.leaving:
                    return
        finally:
            self.now = None

    def _draw(self, index: int, order: Order, job: Job) -> Iterator[Step]:
        engine = self.models.engine(order.model)
        job.begin()
        recording = Recording(order, weakref.ref(engine))
        self.recorded(recording)
        for step in engine.stream(order.request):
            self.now = Moment(index, step, engine)
            recording.add(step)
            yield step
            if job.stopping or job.skipping:
                self.kept, job.skipping = Kept(order, step), False
                return
        self.pictures += (keep(self.outdir, index, engine.images(order.request, step.x)[0]),)


def keep(outdir: Path, index: int, image: GeneratedImage) -> Picture:
    """Save a picture under the next free name, with its settings inside."""
    with reserved(outdir, slug(str(image.settings["prompt"]))) as path:
        save_png(image.image, path, image.settings)
    return Picture(index, path, image.settings)


def keep_partial(engine: TextToImage, outdir: Path, kept: Kept) -> Picture:
    """Save what a stopped picture looked like, decoded; its settings say after how many steps it was stopped."""
    image = engine.images(kept.order.request, kept.step.denoised)[0]
    image.settings["stopped_after_steps"] = kept.step.index + 1
    return keep(outdir, 0, image)


def as_jpeg_address(image: Image.Image) -> str:
    """A small picture as an address that holds the picture itself, so that previews leave no files behind."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=PREVIEW_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def split(model: str, request: GenerationRequest) -> list[Order]:
    """One order for each image of a resolved request."""
    one = {"num_images": 1, "batch_size": 1}
    return [Order(model, request.model_copy(update={"seed": seed, **one})) for seed in request.seeds]


def check_size(orders: Sequence[Order], max_pixels: int) -> None:
    """Raise SettingError for pictures that are larger than this server draws."""
    for request in (order.request for order in orders):
        assert request.width and request.height
        if request.width * request.height > max_pixels:
            raise SettingError(
                f"{request.width}x{request.height}: this server draws {max_pixels} pixels at most; use a smaller size"
            )
