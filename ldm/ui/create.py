"""The first screen: type, watch the picture come out of the noise, keep it."""

import html
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ldm.diffusion.grids import GRIDS
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import LdmError, SettingError
from ldm.models.model_config import ModelConfig
from ldm.request import MAX_PROMPT, SEEDS
from ldm.ui import fields, markup
from ldm.ui.answering import owner
from ldm.ui.drawing import Picture
from ldm.ui.history import History
from ldm.ui.showing import Shown, generate, strip_of
from ldm.ui.studio import Studio

EXAMPLES = 4
"""So many of a model's own prompts are offered."""
# Gradio adds a component's events (`change`, `click`) when it is imported, where no type checker sees them.
Component = Any
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# For a handler that only looks: it never waits for a picture, and the last of many calls counts.
LOOK: dict[str, Any] = {**QUIET, "queue": False, "trigger_mode": "always_last"}
# Every press is taken: the line, not the button, says who is next. The request checks the values, not the components:
# so they are refused in its words, under their fields.
DRAW: dict[str, Any] = {**QUIET, "concurrency_limit": None, "trigger_mode": "multiple", "preprocess": False}
# A press on a picture tells its handler which one it was.
CHOOSE = """element.addEventListener("click", (event) => {
  const chosen = event.target.closest("[data-name]");
  if (chosen) trigger("click", { name: chosen.dataset.name });
});"""
KEPT_BETWEEN_MODELS = ("prompt", "negative_prompt", "num_images", "seed", "seed_mode", "preview")
# Runs in the browser: a server that answered late would overwrite what was typed meanwhile.
RESTORE = """(stored, ...now) => {
  const known = Array.isArray(stored) && stored.length === now.length && %s.includes(stored[%d]);
  return known ? stored : now;
}"""
STORED_FIELDS = "ldm-fields-1"


def chosen_name(event: gr.EventData) -> str:
    """What `CHOOSE` sends, where a press on a picture sent this."""
    return str(event._data.get("name", "")) if isinstance(event._data, dict) else ""


def failed_line(button: str) -> str:
    """A script for the status line when the server did not take or did not finish a request to draw."""
    line = json.dumps(markup.failure(f"page: the server did not answer; press {button} again"))
    return f'() => {line}.replace(/data-at="[0-9]+"/, `data-at="${{Date.now()}}"`)'


@dataclass(frozen=True)
class Create:
    """The parts of the screen: its fields by name, its buttons, and where it shows what happens."""

    fields: dict[str, Component]
    buttons: dict[str, gr.Button]
    stage: gr.HTML
    status: gr.HTML
    links: gr.HTML
    strip: gr.HTML
    last: gr.State  # the settings of the picture that is shown
    stored: gr.BrowserState  # the fields, as the browser keeps them

    @property
    def components(self) -> list[Component]:
        """The fields in the order of their names."""
        return [self.fields[name] for name in fields.NAMES]

    @property
    def outputs(self) -> list[Component]:
        """What `Shown.updates` is for."""
        seed, save = self.fields["seed"], self.buttons["save"]
        return [self.stage, self.status, self.links, self.strip, self.last, seed, save]


def values(made: Mapping[str, object]) -> list[object]:
    """Field values in the order of the components."""
    return [made[name] for name in fields.NAMES]


def build(studio: Studio, history: History) -> Create:
    """The screen, inside an open tab."""
    first = studio.models.first
    config = studio.models.config(first)
    with gr.Row(elem_id="create", elem_classes="screen"):
        with gr.Column(scale=5, min_width=300, elem_classes="controls"):
            made, tokens = _prompt(studio)
            with gr.Row(elem_id="go"):
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
                skip = gr.Button("Skip", elem_id="skip")
            made |= _fields(studio, fields.defaults(first, studio.models))
            with gr.Column(elem_id="examples"):
                offered = [gr.Button(text, size="sm", visible=bool(text)) for text in examples(config)]
        with gr.Column(scale=7, min_width=300, elem_classes="result"):
            stage = gr.HTML(markup.welcome("Write what you want to see, then press Generate."), elem_id="stage")
            status = gr.HTML(markup.status(f"Ready. Model: {first}"), elem_id="status")
            with gr.Row(elem_id="actions"):
                same = gr.Button("Same seed", size="sm", min_width=90, interactive=False)
                vary = gr.Button("Vary", size="sm", min_width=60, interactive=False)
                save = gr.Button("Save it", size="sm", min_width=60, visible=False)
                links = gr.HTML(markup.links([]), elem_id="links")
            strip = gr.HTML(strip_of(history), elem_id="strip", js_on_load=CHOOSE)
    buttons = {"go": go, "stop": stop, "skip": skip, "same": same, "vary": vary, "save": save}
    stored = gr.BrowserState(None, storage_key=STORED_FIELDS, secret=STORED_FIELDS)
    screen = Create(made, buttons, stage, status, links, strip, gr.State(None), stored)
    _count_tokens(studio, screen, tokens)
    _connect_drawing(studio, history, screen)
    _connect_results(studio, history, screen)
    _connect_fields(studio, screen)
    _connect_examples(studio, screen, offered)
    return screen


def examples(config: ModelConfig) -> list[str]:
    """What a model can draw, as prompts to begin with; empty ones where it names fewer."""
    return [*config.examples, *[""] * EXAMPLES][:EXAMPLES]


def _prompt(studio: Studio) -> tuple[dict[str, Component], gr.HTML]:
    """The prompt and its token counter."""
    config = studio.models.config(studio.models.first)
    prompt = gr.Textbox(
        label="Prompt", lines=3, max_lines=8, placeholder=examples(config)[0], autofocus=True,
        max_length=MAX_PROMPT, elem_id="prompt",
    )  # fmt: skip
    counter = gr.HTML(token_words("", config), elem_id="tokens")
    return {"prompt": prompt}, counter


def token_words(prompt: str, config: ModelConfig) -> str:
    """How much of the prompt the model reads, and what it does not."""
    count, room, cut = fields.tokens(prompt, config)
    over = f" · not read: {cut[:80]}" if cut else ""
    return f'<span class="tokens{" over" if cut else ""}">{count}/{room} tokens{html.escape(over)}</span>'


def _fields(studio: Studio, start: Mapping[str, object]) -> dict[str, Component]:
    """Everything below the button, as the first model wants it."""

    def value(name: str, **more: object) -> dict[str, Any]:
        return {"value": start[name], "elem_id": name.replace("_", "-"), **more}

    made: dict[str, Component] = {}
    best = [fields.steps_of_quality("Best", offer.config) for offer in studio.models.offers.values()]
    with gr.Column(elem_id="rest", elem_classes="rest"):
        made["negative_prompt"] = gr.Textbox(
            label="Negative prompt", placeholder="What you do not want to see", max_length=MAX_PROMPT,
            **value("negative_prompt"),
        )  # fmt: skip
        with gr.Row(elem_classes="pair"):
            made["shape"] = gr.Radio(list(fields.SHAPES), label="Shape", min_width=270, scale=2, **value("shape"))
            made["num_images"] = gr.Slider(
                1, studio.limits.max_images, step=1, label="Images", min_width=110, buttons=[], **value("num_images")
            )
        with gr.Row(elem_classes="pair"):
            made["quality"] = gr.Radio(
                list(fields.QUALITIES), label="Quality", min_width=270, scale=2, **value("quality")
            )
            made["steps"] = gr.Slider(
                1, max(fields.STEPS_SHOWN, *best), step=1, label="Steps", min_width=110, buttons=[], **value("steps")
            )
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            made |= _advanced(studio, value)
    return made


def _advanced(studio: Studio, value: Callable[..., dict[str, Any]]) -> dict[str, Component]:
    made: dict[str, Component] = {}
    made["model"] = gr.Dropdown(studio.models.names, label="Model", filterable=False, **value("model"))
    with gr.Row():
        made["sampler"] = gr.Dropdown(list(SAMPLERS), label="Sampler", min_width=120, **value("sampler"))
        made["schedule"] = gr.Dropdown(list(GRIDS), label="Schedule", min_width=120, **value("schedule"))
    made["guidance_scale"] = gr.Slider(
        0,
        30,
        step=0.5,
        label="Guidance",
        info="How closely the prompt is followed; 1 is off",
        **value("guidance_scale"),
    )
    with gr.Row():
        made["seed"] = gr.Number(
            label="Seed", info="The same seed gives the same picture", precision=0, min_width=120, **value("seed")
        )
        made["seed_mode"] = gr.Radio(
            [fields.NEW_SEED, fields.KEEP_SEED], label="Next seed", min_width=120, **value("seed_mode")
        )
    with gr.Row():
        made["width"] = gr.Number(label="Width", precision=0, min_width=90, **value("width"))
        made["height"] = gr.Number(label="Height", precision=0, min_width=90, **value("height"))
    made["preview"] = gr.Checkbox(
        label="Preview", info="Show every step while it is drawn", **value("preview"), visible=studio.limits.preview
    )
    return made


def _connect_drawing(studio: Studio, history: History, screen: Create) -> None:
    """Generate, Stop, Skip and Vary."""

    def draw(request: gr.Request, *given: object) -> Iterator[tuple[object, ...]]:
        made = dict(zip(fields.NAMES, given, strict=True))
        for shown in generate(studio, history, owner(request), made):
            yield shown.updates()

    def stop(request: gr.Request) -> None:
        studio.stop(owner(request))

    def skip(request: gr.Request) -> None:
        studio.skip(owner(request))

    def next_seed(last: Mapping[str, object] | None, count: int) -> tuple[int, str]:
        return (seed_of(last) + fields.whole(count, 1)) % SEEDS, fields.KEEP_SEED

    buttons, seed = screen.buttons, [screen.fields["seed"], screen.fields["seed_mode"]]
    varied = buttons["vary"].click(
        next_seed, [screen.last, screen.fields["num_images"]], seed, preprocess=False, **LOOK
    )
    for drawing in (
        buttons["go"].click(draw, screen.components, screen.outputs, **DRAW),
        varied.success(draw, screen.components, screen.outputs, **DRAW),
    ):
        drawing.failure(None, None, screen.status, js=failed_line("Generate"), **LOOK)
    buttons["stop"].click(stop, **LOOK)
    buttons["skip"].click(skip, **LOOK)


def seed_of(last: Mapping[str, object] | None) -> int:
    """The seed of the picture that is shown. Raises SettingError where none is, or where it does not say."""
    seed = (last or {}).get("seed")
    if not isinstance(seed, int):
        raise SettingError("seed: no picture with a seed is shown; draw one, or choose one below")
    return seed


def _connect_results(studio: Studio, history: History, screen: Create) -> None:
    """What can be done with a picture that is shown, and the strip of earlier ones."""

    def keep(request: gr.Request) -> tuple[object, ...]:
        try:
            picture = studio.save_kept(owner(request))
        except LdmError as error:
            return Shown(markup.failure(str(error))).updates()
        said = markup.status(f"Saved {picture.path}", "done")
        stage = markup.stage(1, [picture], alt=str(picture.settings["prompt"]))
        return Shown(said, stage, (picture,), strip_of(history)).updates()

    def look_at(event: gr.EventData) -> tuple[object, ...]:
        name = chosen_name(event)
        entry = next((one for one in history.entries() if one.name == name), None)
        if entry is None:
            return Shown(markup.failure("picture: it is not in the folder any more"), strip=strip_of(history)).updates()
        picture = Picture(0, entry.path, entry.settings)
        said = markup.status(f"{entry.name} · seed {entry.settings.get('seed', 'unknown')}")
        return Shown(said, markup.stage(1, [picture], alt=entry.prompt), (picture,)).updates()

    def usable(last: Mapping[str, object] | None) -> list[object]:
        return [gr.update(interactive=isinstance((last or {}).get("seed"), int))] * 2

    buttons, seed = screen.buttons, [screen.fields["seed"], screen.fields["seed_mode"]]
    buttons["save"].click(keep, None, screen.outputs, concurrency_limit=None, **QUIET)
    screen.strip.click(look_at, None, screen.outputs, **LOOK)
    screen.last.change(usable, screen.last, [buttons["same"], buttons["vary"]], **LOOK)
    buttons["same"].click(lambda last: (seed_of(last), fields.KEEP_SEED), screen.last, seed, **LOOK)


def _count_tokens(studio: Studio, screen: Create, counter: gr.HTML) -> None:
    prompt, model = screen.fields["prompt"], screen.fields["model"]

    def count(text: str, name: str) -> str:
        return token_words(text or "", studio.models.config(name))

    gr.on([prompt.change, model.change], count, [prompt, model], counter, **LOOK)


def _connect_examples(studio: Studio, screen: Create, offered: list[Component]) -> None:
    """A press writes a prompt; another model offers its own."""
    prompt, model = screen.fields["prompt"], screen.fields["model"]

    def of_model(name: str) -> list[object]:
        texts = examples(studio.models.config(name))
        return [gr.update(placeholder=texts[0]), *(gr.update(value=text, visible=bool(text)) for text in texts)]

    for button in offered:
        button.click(lambda text: text, button, prompt, **LOOK)
    model.change(of_model, model, [prompt, *offered], **LOOK)


def _connect_fields(studio: Studio, screen: Create) -> None:
    """Fields that move one another, and their memory in the browser."""
    made, config = screen.fields, studio.models.config

    def of_model(name: str, *kept: object) -> list[object]:
        return values({**fields.defaults(name, studio.models), **dict(zip(KEPT_BETWEEN_MODELS, kept, strict=True))})

    def of_quality(quality: str, model: str) -> list[object]:
        moved = fields.of_quality(quality, model, studio.models)
        return [moved.get(name, gr.skip()) for name in fields.PACE]

    # Fields take whatever is typed; what is wrong with it is said when it is used.
    look = {**LOOK, "preprocess": False}
    kept = [made[name] for name in KEPT_BETWEEN_MODELS]
    made["model"].input(of_model, [made["model"], *kept], screen.components, **look)
    made["shape"].input(
        lambda shape, model: fields.size_of_shape(shape, config(model)),
        [made["shape"], made["model"]], [made["width"], made["height"]], **look,
    )  # fmt: skip
    gr.on(
        [made["width"].input, made["height"].input],
        lambda width, height, model: fields.shape_of_size(width, height, config(model)),
        [made["width"], made["height"], made["model"]], made["shape"], **look,
    )  # fmt: skip
    made["quality"].input(of_quality, [made["quality"], made["model"]], [made[name] for name in fields.PACE], **look)
    made["steps"].input(
        lambda steps, model: fields.quality_of_steps(steps, model, studio.models),
        [made["steps"], made["model"]], made["quality"], **look,
    )  # fmt: skip
    gr.on(
        [component.change for component in screen.components], None, screen.components, screen.stored,
        js="(...values) => [values]", **QUIET,
    )  # fmt: skip


def restore(studio: Studio, screen: Create, blocks: gr.Blocks) -> None:
    """When the page opens: the fields of the last visit, where the browser has them and their model is on offer."""
    script = RESTORE % (json.dumps(studio.models.names), fields.NAMES.index("model"))
    blocks.load(None, [screen.stored, *screen.components], screen.components, js=script, **QUIET)
