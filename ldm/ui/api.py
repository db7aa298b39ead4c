"""What programs may ask for: the same requests as the command line, by the same names and through the same checks."""

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


def follow(studio: Studio, name: str, orders: list[Order]) -> list[dict[str, object]]:
    """Draw orders and wait for the end; the pictures in order. Raises gr.Error where it fails or is stopped."""
    try:
        job, drawing = studio.draw(name, orders)
    except LdmError as error:
        raise refusal(error) from None
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
    """The endpoints. What is left out is the model's own, as on the command line."""

    def txt2img(
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
    ) -> list[dict[str, object]]:
        """Draw pictures from text; returns file, address, seed and settings of each."""
        given = {
            "prompt": prompt, "negative_prompt": negative_prompt, "width": width, "height": height, "steps": steps,
            "sampler": sampler, "schedule": schedule, "guidance_scale": guidance_scale, "seed": seed,
            "num_images": num_images, "allow_empty_prompt": allow_empty_prompt,
        }  # fmt: skip
        try:
            orders = studio.orders(model or studio.models.first, given)
        except LdmError as error:
            raise refusal(error) from None
        return follow(studio, owner(request), orders)

    def compare(
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
        name = model or studio.models.first
        try:
            planned = plan(studio, (x, x_values, y, y_values), {"prompt": prompt, "seed": seed}, name)
        except LdmError as error:
            raise refusal(error) from None
        return follow(studio, owner(request), planned.orders)

    def info(name: str) -> dict[str, object]:
        """What a picture of the output folder says of itself: usable settings, and what is ignored and why."""
        try:
            found = examine(read_text(history.find(str(name))))
        except LdmError as error:
            raise refusal(error) from None
        return {"settings": found.usable, "ignored": found.ignored, "text": found.text}

    for endpoint in (txt2img, compare, info):
        # gradio's own type does not know its function `api`
        gr.api(endpoint, api_name=endpoint.__name__, concurrency_limit=None)  # type: ignore[attr-defined]
