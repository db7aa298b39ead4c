"""Compare: one prompt over two axes, told beforehand how many pictures that is and how long it takes."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import gradio as gr
from PIL import Image

from ldm.errors import LdmError, SettingError
from ldm.images import save_png
from ldm.outputs import reserved
from ldm.ui import fields, markup
from ldm.ui.answering import owner
from ldm.ui.axes import AXES, EXAMPLES, NOTHING, Axis, axis, sheets, table
from ldm.ui.create import CHOOSE, DRAW, LOOK, Component, Create, chosen_name, failed_line, values
from ldm.ui.drawing import Order, Picture, check_size
from ldm.ui.studio import Studio
from ldm.ui.watching import watch
from ldm.ui.worker import State

SAYS_HOW = {"Model", "Sampler", "Schedule", "Guidance"}
"""Axes of what a quality may move beside the steps."""
INTRODUCTION = "Prompt and all other settings are those of the Create screen. Every picture is saved on its own."


@dataclass(frozen=True)
class Plan:
    """Two axes and the order of every cell, row by row."""

    x: Axis
    y: Axis
    orders: list[Order]

    def shown(self, pictures: tuple[Picture, ...], preview: str = "", index: int = -1) -> str:
        """The table as it is now."""
        names, labels = (self.x.name, self.y.name), (self.x.labels, self.y.labels)
        return markup.comparison(names, labels, self.orders, pictures, preview, index)


def plan(studio: Studio, axes: Sequence[object], settings: Mapping[str, object], model: str) -> Plan:
    """What is to be drawn. `axes` are name and values of X, then of Y. Raises SettingError for what cannot be."""
    x_name, x_values, y_name, y_values = (str(value or "") for value in axes)
    x, y = axis(x_name, x_values), axis(y_name, y_values)
    orders = []
    for cell in table(x, y, {**settings, "num_images": 1, "model": model}):
        if "quality" in cell:
            quality, name = str(cell.pop("quality")), str(cell["model"])
            moved = fields.of_quality(quality, name, studio.models)
            if {x.name, y.name} & SAYS_HOW:  # which then holds for every quality
                moved = {"steps": fields.steps_of_quality(quality, studio.models.config(name))}
            cell |= moved
        name = str(cell.pop("model"))
        orders.append(Order(name, studio.resolved(name, cell).model_copy(update={"batch_size": 1})))
    check_size(orders, studio.limits.max_pixels)
    return Plan(x, y, orders)


def plan_of_page(studio: Studio, given: Sequence[object]) -> Plan:
    """The plan of the four fields of this screen and the fields of the Create screen."""
    made = dict(zip(fields.NAMES, given[4:], strict=True))
    return plan(studio, given[:4], fields.settings(made), str(made["model"]))


def cost_words(studio: Studio, orders: list[Order]) -> str:
    """How many pictures, and how long they take by the pace of what was drawn before."""
    seconds = studio.worker.estimate(sum(order.cost for order in orders))
    time = f" · about {markup.seconds(seconds)}" if seconds is not None else ""
    return f"{len(orders)} image{'' if len(orders) == 1 else 's'}{time}"


def run(studio: Studio, owner: str, planned: Plan) -> Iterator[tuple[str, str, tuple[Picture, ...]]]:
    """Status, table and finished pictures, as the cells are filled."""
    try:
        job, drawing = studio.draw(owner, planned.orders)
    except LdmError as error:
        yield markup.failure(str(error)), planned.shown(()), ()
        return
    for view in watch(studio.worker, job, drawing, studio.limits.preview):
        done = len(view.pictures)
        if view.state is State.FAILED:
            gr.Warning(html.escape(view.error), duration=10, title="Not drawn")
            status = markup.failure(view.error)
        elif job.ended:
            how = "Done" if view.state is State.DONE else "Stopped"
            status = markup.status(f"{how}: {done} of {view.total} images in {markup.seconds(view.seconds)}", "done")
        else:
            status = markup.progress(view)
        yield status, planned.shown(view.pictures, "" if job.ended else view.preview, view.index), view.pictures


def save_sheets(studio: Studio, planned: Plan, pictures: tuple[Picture, ...]) -> list[Picture]:
    """The table as one labelled picture in the output folder, or as several where it would be too large."""
    if not pictures:
        raise SettingError("compare: nothing is drawn yet; press Start")
    opened: list[Image.Image | None] = [None] * len(planned.orders)
    for picture in pictures:
        with Image.open(picture.path, formats=["PNG"]) as image:
            opened[picture.index] = image.convert("RGB")
    saved = []
    settings: dict[str, object] = {"compare": {"x": planned.x.name, "y": planned.y.name}}
    for index, sheet in enumerate(sheets(planned.x, planned.y, opened)):
        with reserved(studio.outdir, "compare") as path:
            save_png(sheet, path, {**settings, "prompt": planned.orders[0].request.prompt})
        saved.append(Picture(index, path, settings))
    return saved


@dataclass(frozen=True)
class Parts:
    """What is on the screen: the fields of both axes, the buttons, and where it shows what happens."""

    axes: list[Component]
    buttons: dict[str, gr.Button]
    cost: gr.HTML
    status: gr.HTML
    cells: gr.HTML
    links: gr.HTML


def build(studio: Studio, screen: Create, tab: gr.Tab, tabs: gr.Tabs, home: str) -> None:
    """The screen, inside an open tab."""
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        x = gr.Dropdown(list(AXES), value="Guidance", label="X axis", filterable=False, min_width=120)
        x_values = gr.Textbox(EXAMPLES["Guidance"], label="X values, with commas between", min_width=160, scale=2)
        y = gr.Dropdown([NOTHING, *AXES], value="Seed", label="Y axis", filterable=False, min_width=120)
        y_values = gr.Textbox("1, 2", label="Y values, with commas between", min_width=160, scale=2)
    with gr.Row(elem_id="compare-go"):
        cost = gr.HTML(elem_id="compare-cost")
        start = gr.Button("Start", variant="primary", elem_id="compare-start", min_width=100)
        stop = gr.Button("Stop", variant="stop", elem_id="compare-stop", min_width=100)
    status = gr.HTML(markup.status(""), elem_id="compare-status")
    cells = gr.HTML(elem_id="compare-table", js_on_load=CHOOSE)
    with gr.Row(elem_id="compare-after"):
        use = gr.Button("Use this cell", size="sm", min_width=90, interactive=False)
        sheet = gr.Button("Save as one picture", size="sm", min_width=120)
        links = gr.HTML(elem_id="compare-links")
    x.input(lambda name: EXAMPLES.get(str(name), ""), x, x_values, **LOOK)
    y.input(lambda name: EXAMPLES.get(str(name), ""), y, y_values, **LOOK)
    buttons = {"start": start, "stop": stop, "use": use, "sheet": sheet}
    parts = Parts([x, x_values, y, y_values], buttons, cost, status, cells, links)
    planned, drawn = gr.State(None), gr.State(())
    _connect_drawing(studio, screen, parts, tab, planned, drawn)
    _connect_results(studio, screen, parts, tabs, home, planned, drawn)


def _connect_drawing(
    studio: Studio, screen: Create, parts: Parts, tab: gr.Tab, planned: gr.State, drawn: gr.State
) -> None:
    """The words on what it costs, Start and Stop."""

    def count(*given: object) -> str:
        try:
            return markup.status(cost_words(studio, plan_of_page(studio, given).orders))
        except LdmError as error:
            return markup.failure(str(error))

    def draw(request: gr.Request, *given: object) -> Iterator[tuple[object, ...]]:
        try:
            ready = plan_of_page(studio, given)
        except LdmError as error:
            yield markup.failure(str(error)), gr.skip(), gr.skip(), gr.skip()
            return
        for said, shown, pictures in run(studio, owner(request), ready):
            yield said, shown, ready, pictures

    def stop(request: gr.Request) -> None:
        studio.stop(owner(request))

    inputs, outputs = [*parts.axes, *screen.components], [parts.status, parts.cells, planned, drawn]
    gr.on([part.change for part in parts.axes] + [tab.select], count, inputs, parts.cost, preprocess=False, **LOOK)
    drawing = parts.buttons["start"].click(draw, inputs, outputs, **DRAW)
    drawing.failure(None, None, parts.status, js=failed_line("Start"), **LOOK)
    parts.buttons["stop"].click(stop, **LOOK)


def _connect_results(
    studio: Studio, screen: Create, parts: Parts, tabs: gr.Tabs, home: str, planned: gr.State, drawn: gr.State
) -> None:
    """What can be done with the pictures: choose one and use its settings, and save them all as one."""
    chosen = gr.State(None)

    def choose(ready: Plan | None, event: gr.EventData) -> tuple[int, object, str]:
        name = chosen_name(event)
        if ready is None or name not in map(str, range(len(ready.orders))):
            raise SettingError("compare: there is no such picture; press Start")
        index = int(name)
        request = ready.orders[index].request
        said = f"Chosen: {request.sampler}, {request.steps} steps, guidance {request.guidance_scale:g}"
        return index, gr.update(interactive=True), markup.status(said)

    def apply(ready: Plan | None, index: int | None) -> list[object]:
        if ready is None or index is None:
            raise SettingError("compare: no picture is chosen; press on one")
        order = ready.orders[index]
        made = fields.from_picture(order.request.settings(), order.model, studio.models)
        return [*values(made), gr.update(selected=home)]

    def save(ready: Plan | None, pictures: tuple[Picture, ...]) -> tuple[str, str]:
        try:
            if ready is None:
                raise SettingError("compare: nothing is drawn yet; press Start")
            saved = save_sheets(studio, ready, pictures)
        except LdmError as error:
            return markup.failure(str(error)), markup.links([])
        said = f"Saved {', '.join(str(picture.path) for picture in saved)}"
        return markup.status(said, "done"), markup.links(saved)

    use, sheet = parts.buttons["use"], parts.buttons["sheet"]
    parts.cells.click(choose, planned, [chosen, use, parts.status], **LOOK)
    use.click(apply, [planned, chosen], [*screen.components, tabs], **LOOK)
    sheet.click(save, [planned, drawn], [parts.status, parts.links], **LOOK)
