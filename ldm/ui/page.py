"""One screen: type a prompt, watch the picture come out of the noise, keep it."""

import html
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from PIL import Image

from ldm.errors import LdmError
from ldm.images import save_png
from ldm.outputs import check_writable, reserved
from ldm.pipeline import TextToImage
from ldm.prompts import slug
from ldm.request import RANDOM_SEED, GenerationRequest

PREVIEW_EVERY_SECONDS = 0.15
EXAMPLES = (
    "a red circle to the left of a blue square",
    "a green triangle above a yellow circle",
    "three small purple hearts on a beige background",
)
Shown = tuple[Image.Image | str | None, str, int]


def draw(
    engine: TextToImage,
    outdir: Path,
    turn: threading.Lock,
    prompt: str,
    negative: str,
    steps: int,
    guidance: float,
    seed: int,
) -> Iterator[Shown]:
    """Pictures on the way, then the path of the saved PNG, each with a status line and the seed."""
    try:
        request = engine.ready(
            GenerationRequest(
                prompt=prompt, negative_prompt=negative, steps=steps, guidance_scale=guidance, seed=seed, batch_size=1
            )
        )
        yield None, "Waiting for the picture before this one", request.seed
        with turn:
            yield from _draw(engine, outdir, request)
    except LdmError as error:
        raise gr.Error(html.escape(str(error)), duration=10, print_exception=False) from None


def _draw(engine: TextToImage, outdir: Path, request: GenerationRequest) -> Iterator[Shown]:
    began = shown = time.monotonic()
    assert request.width and request.height
    for step in engine.stream(request):
        now = time.monotonic()
        if step.index == 0 or now - shown >= PREVIEW_EVERY_SECONDS:
            shown = now
            left = (now - began) / (step.index + 1) * (step.total - step.index - 1)
            preview = engine.preview(step).resize((request.width, request.height))
            yield preview, f"Step {step.index + 1} of {step.total} · about {left:.0f} s left", request.seed
    (picture,) = engine.images(request, step.x)
    with reserved(outdir, slug(request.prompt)) as path:
        save_png(picture.image, path, picture.settings)
    words = f"Done in {time.monotonic() - began:.1f} s · seed {request.seed} · saved {path}"
    # Gradio takes files from the temporary folder only; the copy is the same file, with its settings inside.
    with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        yield str(copy), words, request.seed


def page(engine: TextToImage, outdir: Path) -> gr.Blocks:
    """The page for one loaded model; pictures go to `outdir`. Raises MachineError where that is not writable."""
    check_writable(outdir)
    defaults = engine.bundle.config.sampling
    turn = threading.Lock()

    def generate(prompt: str, negative: str, steps: int, guidance: float, seed: int) -> Iterator[Shown]:
        yield from draw(engine, outdir, turn, prompt, negative, steps, guidance, seed)

    with gr.Blocks(title="ldm", analytics_enabled=False) as blocks, gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", lines=3, placeholder=EXAMPLES[0], autofocus=True, max_length=10_000)
            start = gr.Button("Generate", variant="primary", elem_id="generate")
            stop = gr.Button("Stop", elem_id="stop")
            negative = gr.Textbox(label="Negative prompt", info="What you do not want to see", max_length=10_000)
            steps = gr.Slider(1, 100, defaults.steps, step=1, label="Steps", info="More is slower and finer")
            with gr.Accordion("Advanced", open=False):
                guidance = gr.Slider(
                    0,
                    30,
                    defaults.guidance_scale,
                    step=0.5,
                    label="Guidance",
                    info="How closely the prompt is followed",
                )
                seed = gr.Number(
                    RANDOM_SEED, precision=0, label="Seed", info="The same seed gives the same picture; -1 is a new one"
                )
            gr.Examples([[text] for text in EXAMPLES], prompt)
        with gr.Column():
            result = gr.Image(label="Result", height=512, interactive=False)
            status = gr.Markdown(f"Model: {engine.bundle.name}", elem_id="status")
            used = gr.Number(label="Seed of this picture", precision=0, interactive=False)
        inputs, outputs = [prompt, negative, steps, guidance, seed], [result, status, used]
        running = gr.on(
            [start.click, prompt.submit], generate, inputs, outputs, api_name="txt2img", show_progress="hidden",
            concurrency_limit=None,
        )  # fmt: skip
        stop.click(None, cancels=[running])
    return blocks
