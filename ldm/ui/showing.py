"""What the Create screen shows of one press of its button, from the first word to the saved picture."""

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import gradio as gr

from ldm.errors import LdmError
from ldm.ui import fields, markup
from ldm.ui.drawing import Drawing, Picture
from ldm.ui.history import History
from ldm.ui.studio import Studio
from ldm.ui.watching import View, watch
from ldm.ui.worker import State

STRIP = 24


@dataclass(frozen=True)
class Shown:
    """What one moment changes on the screen; None leaves a part as it is."""

    status: str
    stage: str | None = None
    pictures: tuple[Picture, ...] | None = None
    strip: str | None = None
    seed: int | None = None
    partial: bool = False

    def updates(self) -> tuple[object, ...]:
        """For the components stage, status, links, strip, last settings, seed, and the button that saves a partial."""
        last = dict(self.pictures[0].settings) if self.pictures else gr.skip()
        return (
            gr.skip() if self.stage is None else self.stage,
            self.status,
            gr.skip() if self.pictures is None else markup.links(self.pictures),
            gr.skip() if self.strip is None else self.strip,
            last,
            gr.skip() if self.seed is None else self.seed,
            gr.update(visible=self.partial),
        )


def strip_of(history: History) -> str:
    """The latest pictures of the folder."""
    return markup.thumbnails(history.entries()[:STRIP], "Your pictures appear here.")


def generate(studio: Studio, history: History, owner: str, made: Mapping[str, object]) -> Iterator[Shown]:
    """What the screen shows from the press of the button to the end of the last picture."""
    studio.memory(owner).kept = None
    try:
        orders = studio.orders(str(made["model"]), fields.settings(made))
        job, drawing = studio.draw(owner, orders)
    except LdmError as error:
        yield Shown(markup.failure(str(error)))
        return
    prompt, seed = orders[0].request.prompt, orders[0].request.seed
    finished = 0
    for view in watch(studio.worker, job, drawing, bool(made["preview"]) and studio.limits.preview):
        new = len(view.pictures) > finished
        if job.ended:
            studio.memory(owner).kept = drawing.kept if view.state is State.STOPPED else None
            yield _ended(view, drawing, prompt, history)
            return
        finished = len(view.pictures)
        seen = view.preview or view.pictures
        yield Shown(
            markup.progress(view),
            markup.stage(view.total, view.pictures, view.preview, view.index, prompt) if seen else None,
            strip=strip_of(history) if new else None,
            seed=seed,
        )


def _ended(view: View, drawing: Drawing, prompt: str, history: History) -> Shown:
    count = len(view.pictures)
    if view.state is State.FAILED:
        gr.Warning(html.escape(view.error), duration=10, title="Not drawn")
        words = markup.failure(view.error)
        return Shown(words, pictures=view.pictures or None, strip=strip_of(history) if count else None)
    partial = view.state is State.STOPPED and drawing.kept is not None
    if partial:
        assert drawing.kept is not None
        before = f"{count} of {view.total} saved. " if count else ""
        said = f"Stopped at step {drawing.kept.step.index + 1}. {before}Partial image kept (not saved)."
    elif view.state is State.STOPPED:
        said = f"Stopped. {count} of {view.total} saved." if count else "Stopped before it began. Nothing was drawn."
    else:
        skipped = f" · {view.total - count} skipped" if count < view.total else ""
        where = view.pictures[0].path if count == 1 else f"{count} pictures to {drawing.outdir}"
        saved = f" · seed {view.pictures[0].settings['seed']} · saved {where}" if count else ""
        said = f"Done in {view.seconds:.1f} s{saved}{skipped}"
    stage = markup.stage(view.total, view.pictures, view.preview if partial else "", view.index, prompt)
    return Shown(
        markup.status(said, view.state.value),
        stage if count or (partial and view.preview) else None,
        view.pictures or None,
        strip_of(history),
        partial=partial,
    )
