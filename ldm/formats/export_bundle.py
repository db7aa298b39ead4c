"""A model as this program's own folder: config.yaml, weights in safetensors, and a manifest of sha256."""

from pathlib import Path

from ldm import config as configuration
from ldm.files import sha256
from ldm.formats.describe import BUNDLE_CONFIG, BUNDLE_PARTS
from ldm.formats.pieces import names, pieces, weight_files
from ldm.formats.single_file import Parts
from ldm.formats.write import whole_or_absent, write_json, write_tensors, write_text, written_bytes
from ldm.models.model_config import ModelConfig

MANIFEST = "manifest.json"
TEXT_BYTES = 2**20


def to_bundle(
    destination: Path, config: ModelConfig, parts: Parts, dtype: str | None = None, largest: int | None = None
) -> None:
    """Write a folder that `Bundle.load` opens, files of weights no larger than `largest` bytes where that is given.

    Raises as `whole_or_absent` and `write_tensors` do.
    """
    size = sum(written_bytes(tensors, dtype) + TEXT_BYTES for tensors in parts.values())
    with whole_or_absent(destination, size) as folder:
        write_text(folder / BUNDLE_CONFIG, configuration.dump(config))
        for part in BUNDLE_PARTS:
            files = [parts[part]] if largest is None else pieces(parts[part], dtype, largest)
            for name, tensors in zip(names(part, len(files)), files, strict=True):
                write_tensors(folder / name, tensors, {}, dtype)
        write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """Write the sha256 of the files of one of our folders beside them."""
    files = [folder / BUNDLE_CONFIG, *(path for part in BUNDLE_PARTS for path in weight_files(folder, part))]
    write_json(folder / MANIFEST, {"format": 1, "sha256": {path.name: sha256(path) for path in files}})
