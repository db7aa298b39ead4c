"""How it works: the steps of the last picture under a slider, and noise poured over any picture."""

from html import escape
from pathlib import Path

import gradio as gr
from PIL import Image

from ldm.errors import LdmError
from ldm.ui import fields
from ldm.ui.answering import owner
from ldm.ui.create import LOOK
from ldm.ui.drawing import as_jpeg_address
from ldm.ui.history import History
from ldm.ui.noising import frame, noised
from ldm.ui.studio import Studio

STEPS = """### From noise to a picture: the steps of your last picture
A latent is a small picture with four channels that the autoencoder can turn into a large one. Drawing begins with a
latent of pure noise. At each step the network looks at the noisy latent and at your words and guesses the **clean**
latent; the sampler goes a little towards it. Move the slider: the guess is blurred at first and sharp at the end."""
FORWARD = """### From a picture to noise: what the model learned to undo
In training, noise was added to pictures at a random timestep t, and the network learned to say what was added:
x_t = √ᾱ_t · x0 + √(1−ᾱ_t) · ε. Move the slider: at t = 0 it is the picture, at the end only noise is left."""


def three(pictures: list[tuple[Image.Image, str]]) -> str:
    """Pictures side by side, each with words below."""
    made = (
        f'<figure><img src="{as_jpeg_address(image)}" alt=""><figcaption>{escape(words)}</figcaption></figure>'
        for image, words in pictures
    )
    return f'<div class="pictures3">{"".join(made)}</div>'


def steps_of(studio: Studio, name: str, number: int) -> str:
    """What the step of that number, from 1, looked like, of the picture that this page drew last."""
    recording = studio.memory(name).recording
    if recording is None or not recording.steps:
        return '<p class="hint">Draw a picture first; its steps are then here.</p>'
    number = max(1, min(number, len(recording.steps)))
    try:
        noisy, clean = frame(recording, number - 1)
    except LdmError as error:
        return f'<p class="hint">{escape(str(error))}</p>'
    step = recording.steps[number - 1]
    words = f"After step {step.index + 1} of {step.total}: noise level σ = {step.sigma:.3g}"
    request = recording.order.request
    about = f"{request.prompt} · seed {request.seed} · {request.sampler}, {request.schedule}"
    return three([(noisy, f"The latent. {words}"), (clean, f"The clean estimate at that step. {about}")])


def forward_of(studio: Studio, history: History, uploaded: str | None, timestep: int) -> str:
    """What noise of that timestep does to the uploaded picture, or else to the latest one."""
    entries = history.entries()
    if uploaded is None and not entries:
        return '<p class="hint">Draw a picture first, or give one here.</p>'
    loaded = studio.models.loaded
    if loaded is None:
        return '<p class="hint">A model is being loaded; move the slider again in a moment.</p>'
    try:
        made = noised(loaded[1], Path(uploaded) if uploaded else entries[0].path, timestep)
    except LdmError as error:
        return f'<p class="hint">{escape(str(error))}</p>'
    signal, noise = made.alpha**0.5, (1 - made.alpha) ** 0.5
    words = f"t = {timestep}: √ᾱ = {signal:.3f}, √(1−ᾱ) = {noise:.3f}, σ = {made.sigma:.3g}"
    return three(
        [(made.pixels, f"The picture. {words}"), (made.latent, f"Its latent, which the model works on. {words}")]
    )


def build(studio: Studio, history: History, tab: gr.Tab) -> None:
    """The screen, inside an open tab."""
    timesteps = studio.models.config(studio.models.first).noise_schedule.timesteps
    gr.Markdown(STEPS)
    number = gr.Slider(1, 2, 1, step=1, label="Step", elem_id="step-number")
    frames = gr.HTML(elem_id="step-frames")
    gr.Markdown(FORWARD)
    with gr.Row():
        timestep = gr.Slider(0, timesteps - 1, timesteps // 4, step=1, label="Timestep t", elem_id="timestep", scale=2)
        uploaded = gr.File(label="Another picture", file_types=[".png", ".jpg", ".jpeg", ".webp"], height=110, scale=1)
    poured = gr.HTML(elem_id="forward-frames")

    def step(value: int, request: gr.Request) -> str:
        return steps_of(studio, owner(request), fields.whole(value, 1))

    def pour(value: int, file: str | None) -> str:
        return forward_of(studio, history, file, fields.whole(value, 0))

    def enter(value: int, file: str | None, request: gr.Request) -> tuple[object, str, str]:
        name = owner(request)
        recording = studio.memory(name).recording
        count = len(recording.steps) if recording is not None else 1
        shown = max(1, count // 3)
        slider = gr.update(maximum=max(2, count), value=shown)
        return slider, steps_of(studio, name, shown), pour(value, file)

    number.change(step, number, frames, **LOOK)
    gr.on([timestep.change, uploaded.change], pour, [timestep, uploaded], poured, **LOOK)
    tab.select(enter, [timestep, uploaded], [number, frames, poured], **LOOK)
