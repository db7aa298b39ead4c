"""Single files with CompVis's names, made from our own bundles, and headers of files of full size without numbers."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.bundle import Bundle
from ldm.formats import keys
from ldm.formats.single_file import CONFIG_KEY, file_names
from ldm.formats.tensors import SIZES
from ldm.models.model_config import ModelConfig, build

Shapes = dict[str, tuple[int, ...]]


def compvis(bundle: Bundle, text: str = keys.OPEN_CLIP_TEXT[0]) -> dict[str, Tensor]:
    """All weights of a bundle under the names of a single file whose text tower's names start with `text`."""
    state = {}
    for part, table in file_names(bundle.config, text).items():
        ours = getattr(bundle, part).state_dict()
        for name, theirs in table.items():
            state |= dict(zip(theirs, ours[name].chunk(len(theirs)), strict=True))
    return {name: tensor.clone() for name, tensor in state.items()}


def write(path: Path, state: Mapping[str, Tensor], config: ModelConfig) -> Path:
    """A single file that carries its config, as ours do."""
    save_file(dict(state), path, {CONFIG_KEY: json.dumps(config.model_dump(mode="json"))})
    return path


def full_size(config: ModelConfig, text: str) -> Shapes:
    """Names and shapes of a single file of that config, the autoencoder's attention as convolutions."""
    with torch.device("meta"):
        networks = dict(zip(("autoencoder", "text", "unet"), build(config), strict=True))
    shapes: Shapes = {}
    for part, table in file_names(config, text).items():
        ours = networks[part].state_dict()  # type: ignore[attr-defined]  # parts are modules
        for name, theirs in table.items():
            first, *rest = ours[name].shape
            convolution = (1, 1) if part == "autoencoder" and keys.is_convolution_in_compvis(name) else ()
            shapes |= dict.fromkeys(theirs, (first // len(theirs), *rest, *convolution))
    return shapes


def header(
    shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16", metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a safetensors file with these tensors."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> Path:
    """A file of full size that takes almost nothing on the disk: its numbers are one hole."""
    start = header(shapes, metadata=metadata)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + sum(prod(shape) * 2 for shape in shapes.values()))
    return path
