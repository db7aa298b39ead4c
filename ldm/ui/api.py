"""What programs may ask for: the same requests as the command line, by the same names and through the same checks."""

from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from ldm.errors import LdmError
from ldm.ui.answering import owner, refusal
from ldm.ui.axes import NOTHING
from ldm.ui.compare import plan
from ldm.ui.drawing import Drawing, Order
from ldm.ui.history import History
from ldm.ui.info import examine, read_text
from ldm.ui.markup import address
from ldm.ui.studio import Studio
from ldm.ui.watching import watch
from ldm.ui.worker import State


class Endpoints:
    """What can be called, under the name of the function. What is left out is the model's own."""

    def __init__(self, studio: Studio, history: History) -> None:
        self.studio, self.history = studio, history

    def txt2img(
        self,
        request: gr.Request,
        prompt: str,
        negative_prompt: str = "",
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        guidance_scale: float | None = None,
        seed: int = -1,
        num_images: int = 1,
        model: str | None = None,
        allow_empty_prompt: bool = False,
        sigmas: str | list[float] | None = None,
        timesteps: str | list[float] | None = None,
        convention: str | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: str | list[float] | None = None,
        perp_neg: float = 0.0,
        reuse: int = 1,
        merge_tokens: float = 0.0,
        prompt_syntax: str = "plain",
        rng: str = "keyed",
    ) -> list[dict[str, object]]:
        """Draw pictures from text; returns file, address, seed and settings of each."""
        given = {
            "prompt": prompt, "negative_prompt": negative_prompt, "width": width, "height": height, "steps": steps,
            "sampler": sampler, "schedule": schedule, "guidance_scale": guidance_scale, "seed": seed,
            "num_images": num_images, "allow_empty_prompt": allow_empty_prompt, "sigmas": sigmas,
            "timesteps": timesteps, "convention": convention, "guidance_rescale": guidance_rescale,
            "guidance_interval": guidance_interval, "perp_neg": perp_neg, "reuse": reuse,
            "merge_tokens": merge_tokens, "prompt_syntax": prompt_syntax, "rng": rng,
        }  # fmt: skip
        with in_its_words():
            orders = self.studio.orders(model or self.studio.models.first, given)
            return follow(self.studio, owner(request), orders)

    def compare(
        self,
        request: gr.Request,
        prompt: str,
        x: str,
        x_values: str,
        y: str = NOTHING,
        y_values: str = "",
        seed: int = -1,
        model: str | None = None,
    ) -> list[dict[str, object]]:
        """Draw one prompt over two axes, row by row; the values of an axis have commas between them."""
        name = model or self.studio.models.first
        with in_its_words():
            planned = plan(self.studio, (x, x_values, y, y_values), {"prompt": prompt, "seed": seed}, name)
            return follow(self.studio, owner(request), planned.orders)

    def info(self, name: str) -> dict[str, object]:
        """What a picture of the output folder says of itself: usable settings, and what is ignored and why."""
        with in_its_words():
            found = examine(read_text(self.history.find(str(name))))
        return {"settings": found.usable, "ignored": found.ignored, "text": found.text}


@contextmanager
def in_its_words() -> Iterator[None]:
    """What is wrong with a request is told as the command line tells it: no page shows it, so nothing is escaped."""
    try:
        yield
    except LdmError as error:
        raise refusal(error) from None


def follow(studio: Studio, name: str, orders: list[Order]) -> list[dict[str, object]]:
    """Draw orders and wait for the end; the pictures in order. Raises gr.Error where it fails or is stopped."""
    job, drawing = studio.draw(name, orders)
    for view in watch(studio.worker, job, drawing, preview=False):
        last = view
    if last.state is State.FAILED:
        raise refusal(last.error)
    return results(drawing)


def results(drawing: Drawing) -> list[dict[str, object]]:
    """File, address, seed and settings of every picture. A key `path` would make gradio_client fetch it on its own."""
    return [
        {
            "file": str(picture.path),
            "address": address(picture.path),
            "seed": picture.settings["seed"],
            "settings": picture.settings,
        }
        for picture in drawing.pictures
    ]


def build(studio: Studio, history: History) -> None:
    """The endpoints, in an open page."""
    endpoints = Endpoints(studio, history)
    for endpoint in (endpoints.txt2img, endpoints.compare, endpoints.info):
        name = endpoint.__name__
        gr.api(endpoint, api_name=name, concurrency_limit=None)  # type: ignore[attr-defined]  # not in gradio's own type
