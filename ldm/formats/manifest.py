"""manifest.json of a bundle: the sha256 of its files, and which of its networks lie in the folder of another one."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ldm.errors import ModelError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a bundle is made of: sha256 by path from its folder, and network → the folder beside it that has it."""

    sha256: dict[str, str]
    shared: dict[str, str] = field(default_factory=dict)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle. Raises ModelError where there is none, or another file of that name."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        digests = {str(name): str(digest) for name, digest in values["sha256"].items()}
        shared = {str(part): str(beside) for part, beside in values.get("shared", {}).items()}
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; copy the whole model folder again") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path}: not a manifest; copy the whole model folder again") from None
    for beside in shared.values():
        if not is_name(beside):
            raise ModelError(f"{path}: shared: {beside[:40]!r} is not the name of a folder; copy the model again")
    return Manifest(digests, shared)


def is_name(text: str) -> bool:
    """Whether this names a folder beside another one, and nothing elsewhere."""
    return text not in ("", ".", "..") and not set(text) & set("/\\\0")
