"""A model as this program's own folder: config.yaml, weights in safetensors, and a manifest of sha256."""

import hashlib
from pathlib import Path

from ldm import config as configuration
from ldm.formats.describe import BUNDLE_CONFIG, BUNDLE_PARTS
from ldm.formats.single_file import Parts
from ldm.formats.write import whole_or_absent, write_json, write_tensors, write_text, written_bytes
from ldm.models.model_config import ModelConfig

MANIFEST = "manifest.json"
TEXT_BYTES = 2**20


def to_bundle(destination: Path, config: ModelConfig, parts: Parts, dtype: str | None = None) -> None:
    """Write a folder that `Bundle.load` opens. Raises as `whole_or_absent` and `write_tensors` do."""
    size = sum(written_bytes(tensors, dtype) + TEXT_BYTES for tensors in parts.values())
    with whole_or_absent(destination, size) as folder:
        write_text(folder / BUNDLE_CONFIG, configuration.dump(config))
        for part in BUNDLE_PARTS:
            write_tensors(folder / f"{part}.safetensors", parts[part], {}, dtype)
        write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """Write the sha256 of the files of one of our folders beside them."""
    names = [BUNDLE_CONFIG, *(f"{part}.safetensors" for part in BUNDLE_PARTS)]
    write_json(folder / MANIFEST, {"format": 1, "sha256": {name: sha256(folder / name) for name in names}})


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
