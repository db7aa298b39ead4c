"""Where a model lies that is meant by a name or a path; nothing is read, so that a wrong name is said at once."""

import os
from pathlib import Path

from ldm.cli import nearest
from ldm.errors import ModelError
from ldm.formats.describe import BUNDLE_CONFIG, layout

FOLDER = Path(__file__).parent.parent / "bundles"
SHAPES = "shapes-256"
"""The bundle whose pictures a program can read: figures that need that are measured with it."""
DEFAULT = "emoji-256"


def bundled_names() -> list[str]:
    """The names of the bundles that ship with this package."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{BUNDLE_CONFIG}"))


def find(name_or_path: str) -> Path:
    """The folder or file of a model, by name or path. Raises ModelError, with the nearest name, where there is none."""
    if name_or_path in bundled_names():
        return FOLDER / name_or_path
    path = Path(name_or_path).expanduser()
    if os.path.lexists(path):
        layout(path)  # says what is wrong with something that is there and no model
        return path
    known = [*bundled_names(), *(p.name for p in path.parent.glob("*"))] if path.parent.is_dir() else bundled_names()
    raise ModelError(
        f"{name_or_path}: no such model{nearest(path.name, known)}; "
        f"bundled models: {', '.join(bundled_names()) or 'none'}, or train one: make train-shapes"
    )
