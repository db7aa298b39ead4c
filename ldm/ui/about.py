"""About: which model is loaded and what it can do, the machine, the keys, and how a program asks for pictures."""

import html
import importlib.metadata
import platform
import resource

import gradio as gr
import torch

from ldm.ui import markup
from ldm.ui.create import LOOK
from ldm.ui.studio import Studio

KEYS = {
    "Ctrl+Enter or ⌘+Enter": "Generate, or start a comparison",
    "Esc": "Stop, and keep what there is",
    "Alt+Enter": "Skip to the next image",
    "?": "This list",
}
CLIENT = """from gradio_client import Client

client = Client("http://127.0.0.1:7860")
(picture,) = client.predict(prompt="a red circle", steps=20, seed=1, api_name="/txt2img")
print(picture["file"], picture["settings"])"""
PRIVACY = "Nothing leaves this computer: the page asks no other server for anything, and no use is counted."
MODEL_CARD = "README.md"


def card(studio: Studio) -> str:
    """The model card that lies beside the loaded model, or a word that there is none."""
    loaded = studio.models.loaded
    if loaded is None:
        return "A model is being loaded."
    path = studio.models.offers[loaded[0]].path / MODEL_CARD
    return path.read_text(encoding="utf-8") if path.is_file() else f"The model {loaded[0]} brings no card."


def facts(studio: Studio) -> str:
    """Model, machine, versions and folders."""
    loaded = studio.models.loaded
    rows: dict[str, object] = {"output folder": studio.outdir.resolve()}
    if loaded is not None:
        bundle = loaded[1].bundle
        networks = (bundle.autoencoder, bundle.text, bundle.unet)
        # networks are modules
        parameters = sum(weight.numel() for network in networks for weight in network.parameters())  # type: ignore[union-attr, misc]
        rows |= {
            "model": bundle.name,
            "sha256": bundle.sha256 or "not from files",
            "parameters": f"{parameters / 1e6:.1f} million",
            "computes on": f"{bundle.device}, {next(bundle.unet.parameters()).dtype}".replace("torch.", ""),
        }
        if bundle.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(bundle.device)
            rows["memory of the device"] = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    # Linux gives KiB, macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    rows["peak memory of this server"] = f"{peak / 2**30:.2f} GiB"
    rows["models on offer"] = ", ".join(studio.models.names)
    programs = {name: _version(name) for name in ("ldm", "torch", "gradio")}
    rows["Python"] = platform.python_version()
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in programs.items())
    return markup.table(rows.items(), "Facts")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def keys() -> str:
    """The keys as a table."""
    body = "".join(f"<tr><th scope=row><kbd>{key}</kbd></th><td>{what}</td></tr>" for key, what in KEYS.items())
    return f'<table class="facts"><caption>Keys</caption><tbody>{body}</tbody></table>'


def key_sheet() -> str:
    """The keys as a dialog, which `?` opens on every screen."""
    return f'<dialog id="keys" aria-label="Keys">{keys()}<button type="button" class="button">Close</button></dialog>'


def build(studio: Studio, tab: gr.Tab) -> None:
    """The screen, inside an open tab."""
    gr.Markdown(PRIVACY)
    with gr.Row(elem_classes="screen"):
        with gr.Column(scale=5, min_width=300):
            shown = gr.HTML()
            gr.HTML(keys())
            gr.HTML(f'<h3>Use from code</h3><pre class="raw" tabindex="0">{html.escape(CLIENT)}</pre>')
        with gr.Column(scale=6, min_width=300):
            model = gr.Markdown(elem_id="card")
    tab.select(lambda: (facts(studio), card(studio)), None, [shown, model], **LOOK)
