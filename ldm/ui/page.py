"""The page: its screens as tabs on one studio."""

import functools

import gradio as gr

from ldm.ui import about, answering, api, archive, compare, create, explain
from ldm.ui.guard import UPLOADS_KEPT_SECONDS
from ldm.ui.history import History
from ldm.ui.showing import strip_of
from ldm.ui.studio import Studio

CACHE_SECONDS = (600, UPLOADS_KEPT_SECONDS)  # look every ten minutes, remove what is older than an hour
STRIP_SECONDS = 5  # a picture that was begun before a reload is seen so long after it is saved
HOME = "create"


def page(studio: Studio, history: History) -> gr.Blocks:
    """All screens for one studio. Image to image and Inpaint come between Create and Compare when they can be done."""
    with answering.Blocks(title="ldm", analytics_enabled=False, delete_cache=CACHE_SECONDS) as blocks:
        with gr.Tabs(selected=HOME, elem_id="tabs") as tabs:
            with gr.Tab("Create", id=HOME):
                screen = create.build(studio, history)
            with gr.Tab("Compare") as tab:
                compare.build(studio, screen, tab, tabs, HOME)
            with gr.Tab("How it works") as tab:
                explain.build(studio, history, tab)
            with gr.Tab("History") as tab:
                archive.history_screen(studio, history, screen, tab, tabs, HOME)
            with gr.Tab("PNG info"):
                archive.info_screen(studio, screen, tabs, HOME)
            with gr.Tab("About") as tab:
                about.build(studio, tab)
        gr.HTML(about.key_sheet())
        api.build(studio, history)
        create.restore(studio, screen, blocks)
        look = functools.partial(strip_of, history)
        gr.on([blocks.load, gr.Timer(STRIP_SECONDS).tick], look, None, screen.strip, **create.LOOK)
    return blocks
