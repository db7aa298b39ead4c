"""The screens on pictures that exist: History, which reads the output folder, and PNG info, which reads one file."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

import gradio as gr

from ldm.errors import DataError, LdmError, SettingError
from ldm.ui import fields, markup
from ldm.ui.create import CHOOSE, LOOK, Create, chosen_name, values
from ldm.ui.history import History, search
from ldm.ui.info import Info, changes, examine, read_text
from ldm.ui.studio import Studio

PER_PAGE = 60
ANY = "any"
CONFIRM = (
    """(name) => [name, name !== "" && confirm("Move this picture to the trash (.trash in the output folder)?")]"""
)


def used(studio: Studio, info: Info, now: str) -> list[object]:
    """The fields with the settings of a picture, as its model has the rest; without its model the chosen one stays."""
    name = info.model or now
    return values(fields.from_picture(info.usable, name, studio.models))


def grid(
    history: History, words: str, model: str, day: str, starred: bool, page: int, chosen: str
) -> tuple[str, object]:
    """One page of the folder, and how many pages there are."""
    given = ("" if model == ANY else model, "" if day == ANY else day)
    found = search(history.entries(), words or "", *given, starred)
    pages = max(1, -(-len(found) // PER_PAGE))
    page = max(1, min(fields.whole(page, 1), pages))
    shown = found[(page - 1) * PER_PAGE : page * PER_PAGE]
    count = f'<p class="hint" role="status">{len(found)} picture{"" if len(found) == 1 else "s"}</p>'
    return count + markup.thumbnails(shown, "No pictures here.", chosen), gr.update(
        maximum=max(2, pages), visible=pages > 1
    )


def history_screen(studio: Studio, history: History, screen: Create, tab: gr.Tab, tabs: gr.Tabs, home: str) -> None:
    """Search, look, use again, star, delete."""
    with gr.Row():
        words = gr.Textbox(label="Search in prompts", elem_id="history-search", min_width=160)
        model = gr.Dropdown([ANY], value=ANY, label="Model", filterable=False, min_width=110)
        day = gr.Dropdown([ANY], value=ANY, label="Day", filterable=False, min_width=110)
        starred = gr.Checkbox(label="Starred only", min_width=110)
    with gr.Row(elem_classes="screen"):
        with gr.Column(scale=7, min_width=300):
            pictures = gr.HTML(elem_id="history-grid", js_on_load=CHOOSE)
            page = gr.Slider(1, 2, 1, step=1, label="Page", visible=False)
        with gr.Column(scale=4, min_width=300, elem_id="history-detail"):
            with gr.Row():
                use = gr.Button("Use settings", size="sm", min_width=90)
                star = gr.Button("Star", size="sm", min_width=60)
                delete = gr.Button("Delete", size="sm", min_width=60)
            detail = gr.HTML('<p class="hint">Choose a picture.</p>', elem_id="history-chosen")
    chosen, sure = gr.State(""), gr.Checkbox(visible=False)
    filters, shown = [words, model, day, starred, page, chosen], [pictures, page]

    def look(*given: object) -> tuple[str, object]:
        return grid(history, *given)  # type: ignore[arg-type]  # in the order of `filters`

    def enter(*given: object) -> tuple[object, ...]:
        entries = history.entries()
        models = sorted({entry.model for entry in entries if entry.model})
        days = sorted({entry.day for entry in entries}, reverse=True)
        return gr.update(choices=[ANY, *models]), gr.update(choices=[ANY, *days]), *look(*given)

    def choose(event: gr.EventData) -> tuple[str, str]:
        return (name := chosen_name(event)), details(history, name)

    def apply(name: str, now: str) -> list[object]:
        try:
            info = examine(read_text(history.find(name)), studio.models.digests)
        except DataError as error:
            gr.Warning(escape(str(error)), title="Not used")
            return [gr.skip()] * (len(screen.components) + 1)
        return [*used(studio, info, now), gr.update(selected=home)]

    def toggle(name: str) -> str:
        if any(entry.name == name for entry in history.entries()):
            history.star(name)
        return details(history, name)

    def remove(name: str, agreed: bool) -> tuple[str, str]:
        if not agreed or not name:
            return name, details(history, name)
        try:
            moved = history.trash(name)
        except LdmError as error:
            return "", f'<p class="hint" role="status">{escape(str(error))}</p>'
        return "", f'<p class="hint" role="status">Moved to {escape(str(moved))}.</p>'

    tab.select(enter, filters, [model, day, *shown], **LOOK)
    gr.on([words.change, model.input, day.input, starred.input, page.input], look, filters, shown, **LOOK)
    pictures.click(choose, None, [chosen, detail], **LOOK).then(look, filters, shown, **LOOK)
    use.click(apply, [chosen, screen.fields["model"]], [*screen.components, tabs], **LOOK)
    star.click(toggle, chosen, detail, **LOOK).then(look, filters, shown, **LOOK)
    delete.click(remove, [chosen, sure], [chosen, detail], js=CONFIRM, **LOOK).then(look, filters, shown, **LOOK)


def details(history: History, name: str) -> str:
    """One picture, large, with its settings."""
    entry = next((one for one in history.entries() if one.name == name), None)
    if entry is None:
        return '<p class="hint">Choose a picture.</p>'
    star = " ★" if entry.starred else ""
    image = (
        f'<a href="{markup.address(entry.path)}" target="_blank" title="Full size">'
        f'<img class="large" src="{markup.address(entry.path)}" alt="{escape(entry.prompt or entry.name)}"></a>'
    )
    return image + markup.table(entry.settings.items(), f"{entry.name}{star}")


def info_screen(studio: Studio, screen: Create, tabs: gr.Tabs, home: str) -> None:
    """Drop a PNG, see what it says and what would change, then use it."""
    gr.Markdown("Drop a PNG that this program drew. Nothing changes on the page until you press the button.")
    with gr.Row(elem_classes="screen"):
        with gr.Column(scale=4, min_width=300):
            file = gr.File(label="PNG file", file_types=[".png"], height=160, elem_id="info-file")
            use = gr.Button("Use these settings", variant="primary", interactive=False, elem_id="info-use")
        with gr.Column(scale=6, min_width=300):
            found = gr.HTML('<p class="hint">No picture yet.</p>', elem_id="info-found")
    read = gr.State(None)

    def look(path: str | None, *given: object) -> tuple[str, object, object]:
        if path is None:
            return '<p class="hint">No picture yet.</p>', None, gr.update(interactive=False)
        try:
            info = examine(read_text(Path(path)), studio.models.digests)
        except DataError as error:
            return markup.failure(str(error)), None, gr.update(interactive=False)
        if not info.usable:
            shown = '<p class="hint">No settings of this program are in this picture.</p>' + raw(info)
            return shown, None, gr.update(interactive=False)
        now: Mapping[str, object] = dict(zip(fields.NAMES, given, strict=True))
        parts = [
            markup.table(info.usable.items(), "Settings in the picture"),
            markup.changes_table(changes(info, now)),
            markup.table(info.ignored.items(), "Ignored"),
            raw(info),
        ]
        return "".join(parts), info, gr.update(interactive=True)

    def apply(info: Info | None, now: str) -> list[object]:
        if info is None:
            raise SettingError("picture: none is given; drop a PNG here first")
        return [*used(studio, info, now), gr.update(selected=home)]

    file.change(look, [file, *screen.components], [found, read, use], **LOOK)
    use.click(apply, [read, screen.fields["model"]], [*screen.components, tabs], **LOOK)


def raw(info: Info) -> str:
    """The text as it stands in the file."""
    text = escape(info.text[:20_000])
    return f'<details><summary>Raw text</summary><pre class="raw" tabindex="0">{text}</pre></details>'
