"""The import picture of docs/design.md, one door for each third-party library, and sizes that fit a head.

Data flows one way: nothing below knows who is above. A new file in `ldm/` gets a line in ALLOWED.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("ldm/**/*.py", "scripts/**/*.py", "app.py")
FILES = sorted(path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern))

LEAVES = {"errors", "cli", "config", "files", "images", "machine", "outputs", "prompts"}
BELOW_PIPELINE = LEAVES | {"nn", "models", "diffusion", "formats", "bundle", "request"}
BELOW_TRAINING = BELOW_PIPELINE | {"pipeline", "data"}
# What the files of a layer may import of ldm, beside their own layer.
ALLOWED = {
    **dict.fromkeys(LEAVES, LEAVES),
    "nn": LEAVES,
    "models": LEAVES | {"nn"},
    "diffusion": LEAVES,
    "data": LEAVES,
    "formats": LEAVES | {"models"},
    "request": LEAVES | {"models", "diffusion"},
    "bundle": LEAVES | {"nn", "models", "diffusion", "formats"},
    "pipeline": BELOW_PIPELINE,
    "training": BELOW_TRAINING,
    "evaluation": BELOW_TRAINING,
    "ui": BELOW_TRAINING | {"evaluation"},
    "public": BELOW_PIPELINE | {"pipeline"},  # ldm/__init__.py
}
ALLOWED["scripts"] = set(ALLOWED) - {"ui"}
ALLOWED["app"] = set(ALLOWED)

WEIGHTS = ("ldm/bundle.py", "ldm/training/checkpoint.py", "ldm/formats/")
DOORS = {
    "xformers": ("ldm/nn/attention.py",),
    "open_clip": ("ldm/models/text.py", "ldm/models/clip.py"),
    "webdataset": ("ldm/data/", "scripts/benchmark_data.py"),  # the script compares with it
    "pyarrow": ("ldm/data/records.py",),
    "accelerate": ("ldm/training/", "scripts/train.py"),
    "gradio": ("ldm/ui/", "app.py"),
    "safetensors": WEIGHTS,
    "torch.load": WEIGHTS,
}
# What a command needs before it has said no to a bad setting; importing torch takes seconds.
WITHOUT_TORCH = [
    *("ldm", "ldm.errors", "ldm.cli", "ldm.config", "ldm.files", "ldm.machine", "ldm.outputs", "ldm.prompts"),
    *("ldm.diffusion.samplers", "ldm.diffusion.schedule", "ldm.diffusion.conventions", "ldm.request"),
    *("ldm.formats.describe", "ldm.formats.finding"),
]
LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60
SAYS_NOTHING = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}


def layer(path: str) -> str:
    """The layer of a file: the name behind `ldm/`."""
    parts = path.removesuffix(".py").split("/")
    return parts[0] if parts[0] != "ldm" else parts[1].replace("__init__", "public")


def used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that is imported, at any depth, and of `torch.load`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            yield node.lineno, "torch.load"


def import_faults(path: str, source: str) -> list[str]:
    """What breaks the import picture in one file."""
    own, found = layer(path), []
    if own not in ALLOWED:
        return [f"{path}: no layer {own!r} in the import picture"]
    for line, name in used(ast.parse(source)):
        if name.startswith("."):
            found.append(f"{path}:{line}: {name} is a relative import")
        if name.split(".")[0] == "ldm":
            target = f"{name}.".split(".")[1]
            target = target if target in ALLOWED else "public"
            if target != own and target not in ALLOWED[own]:
                found.append(f"{path}:{line}: {own} may not import {name}")
        for library, doors in DOORS.items():
            if f"{name}.".startswith(f"{library}.") and not path.startswith(doors):
                found.append(f"{path}:{line}: {library} is only for {', '.join(doors)}")
    return found


def size_faults(path: str, source: str) -> list[str]:
    """What is too long or has a name that says nothing in one file."""
    found = []
    if (lines := len(source.splitlines())) > LINES_OF_A_FILE:
        found.append(f"{path}: {lines} lines, at most {LINES_OF_A_FILE}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LINES_OF_A_FUNCTION:
                found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {LINES_OF_A_FUNCTION}")
    found += [
        f"{path}: the name {part!r} says nothing" for part in Path(path).with_suffix("").parts if part in SAYS_NOTHING
    ]
    return found


def first_that_needs_torch(modules: list[str]) -> str:
    """Import modules one after another in a fresh interpreter; the first after which torch is there, or nothing."""
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += "    if 'torch' in sys.modules:\n        sys.exit(print(name))"
    command = [sys.executable, "-c", code, *modules]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_imports_follow_the_picture() -> None:
    assert "ldm/cli.py" in FILES
    assert [fault for path in FILES for fault in import_faults(path, (ROOT / path).read_text(encoding="utf-8"))] == []


def test_files_and_functions_fit_a_head() -> None:
    assert [fault for path in FILES for fault in size_faults(path, (ROOT / path).read_text(encoding="utf-8"))] == []


def test_settings_are_checked_without_torch() -> None:
    assert first_that_needs_torch(WITHOUT_TORCH) == ""


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ldm/nn/layers.py", "from ldm.models.unet import UNet"),
        ("ldm/nn/layers.py", "from ldm import models"),
        ("ldm/nn/layers.py", "from ldm import TextToImage"),
        ("ldm/config.py", "import ldm.pipeline"),
        ("ldm/config.py", "import ldm"),
        ("ldm/diffusion/samplers/heun.py", "def f():\n    from ldm.models.unet import UNet"),
        ("ldm/models/unet.py", "from ldm.diffusion.schedule import NoiseSchedule"),
        ("ldm/models/unet.py", "from ..nn import layers"),
        ("ldm/bundle.py", "from ldm.pipeline import TextToImage"),
        ("ldm/training/loop.py", "from ldm.evaluation.shapes_oracle import read"),
        ("ldm/evaluation/scores.py", "from ldm.training.loop import train"),
        ("scripts/txt2img.py", "import ldm.ui.page"),
        ("ldm/strange.py", ""),
        ("ldm/pipeline.py", "import gradio as gr"),
        ("ldm/pipeline.py", "from safetensors.torch import load_file"),
        ("ldm/pipeline.py", "from torch import load"),
        ("ldm/models/unet.py", "import torch\nx = torch.load('x.ckpt')"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str) -> None:
    assert len(import_faults(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ldm/models/text.py", "import open_clip.transformer\nfrom ldm import config as configuration"),
        ("ldm/formats/single_file.py", "import torch\nx = torch.load\nfrom ldm.models.model_config import ModelConfig"),
        ("ldm/evaluation/scores.py", "from ldm.pipeline import TextToImage\nfrom ldm.data.shapes import Scene"),
        ("ldm/nn/attention.py", "import xformers.ops\nimport webdatasets"),
        ("scripts/train.py", "import accelerate\nfrom ldm.training.loop import train\nfrom ldm import TextToImage"),
        ("app.py", "import gradio\nfrom ldm.ui.page import page"),
    ],
)
def test_an_allowed_import_is_not(path: str, source: str) -> None:
    assert import_faults(path, source) == []


def test_what_is_too_long_or_needs_torch_is_found() -> None:
    long_function = "def f():\n" + "    pass\n" * LINES_OF_A_FUNCTION
    assert len(size_faults("ldm/cli.py", long_function)) == 1
    assert len(size_faults("ldm/utils/cli.py", "\n" * (LINES_OF_A_FILE + 1))) == 2
    assert size_faults("ldm/cli.py", long_function.removesuffix("    pass\n")) == []
    assert first_that_needs_torch(["ldm.cli", "ldm.images"]) == "ldm.images"
