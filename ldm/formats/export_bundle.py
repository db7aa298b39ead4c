"""A model as this program's own folder: config.yaml, weights in safetensors, and a manifest of sha256."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ldm import config as configuration
from ldm.errors import SettingError
from ldm.files import sha256
from ldm.formats.describe import BUNDLE_CONFIG, BUNDLE_PARTS
from ldm.formats.fill import whole
from ldm.formats.manifest import MANIFEST
from ldm.formats.pieces import names, own_files, pieces, read_weights
from ldm.formats.single_file import Parts
from ldm.formats.write import whole_or_absent, write_json, write_tensors, write_text, written_bytes
from ldm.models.model_config import ModelConfig

TEXT_BYTES = 2**20


def to_bundle(
    destination: Path,
    config: ModelConfig,
    parts: Parts,
    dtype: str | None = None,
    largest: int | None = None,
    sharing: str | None = None,
) -> None:
    """Write a folder that `Bundle.load` opens, files of weights no larger than `largest` bytes where that is given.

    Networks that the bundle in the folder `sharing` beside it has too are not written again. Raises as
    `whole_or_absent` and `write_tensors` do, and SettingError where there is no such network.
    """
    size = sum(written_bytes(tensors, dtype) + TEXT_BYTES for tensors in parts.values())
    with whole_or_absent(destination, size) as folder:
        write_text(folder / BUNDLE_CONFIG, configuration.dump(config))
        shared: dict[str, str] = {}
        for part in BUNDLE_PARTS:
            files = [parts[part]] if largest is None else pieces(parts[part], dtype, largest)
            for name, tensors in zip(names(part, len(files)), files, strict=True):
                write_tensors(folder / name, tensors, {}, dtype)
            if sharing is not None and same_weights(folder, destination.parent / sharing, part):
                shared[part] = sharing
                for path in own_files(folder, part):
                    path.unlink()
        if sharing is not None and not shared:
            raise SettingError(
                f"--sharing: no network of {sharing} is the same; leave it out, or give the same --dtype"
            )
        write_manifest(folder, shared)


def same_weights(folder: Path, other: Path, part: str) -> bool:
    """Whether a network is the same in two folders, number for number in the same format."""
    if not own_files(other, part)[0].is_file():
        return False
    ours, theirs = (read_weights(one, part) for one in (folder, other))
    return ours.keys() == theirs.keys() and all(
        (mine.dtype, mine.shape) == (theirs[name].dtype, theirs[name].shape)
        and torch.equal(whole(mine, name), whole(theirs[name], name))
        for name, mine in ours.items()
    )


def write_manifest(folder: Path, shared: Mapping[str, str] | None = None) -> None:
    """Write the sha256 of all files of one of our folders into it, and which networks (`shared`) lie beside it."""
    shared = shared or {}
    values: dict[str, object] = {"format": 1, **({"shared": dict(shared)} if shared else {})}
    files = [folder / BUNDLE_CONFIG]
    for part in BUNDLE_PARTS:
        files += own_files(folder / ".." / shared[part] if part in shared else folder, part)
    digests = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    write_json(folder / MANIFEST, values | {"sha256": digests})
