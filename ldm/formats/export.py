"""A model in the layouts of other programs: one file with CompVis's names, or a diffusers folder.

Weights are copied number for number. One thing is computed: a latent normalised per channel, which no other program
knows, becomes the one factor of Stable Diffusion's, folded into the two 1×1 convolutions that surround it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import SettingError
from ldm.formats import keys
from ldm.formats.fill import whole
from ldm.formats.single_file import CONFIG_KEY, MODELSPEC, Parts, file_names
from ldm.formats.tensors import MemoryTensor, StoredTensor
from ldm.formats.write import Reshaped, Rows, whole_or_absent, write_tensors, written_bytes
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.model_config import ModelConfig
from ldm.models.text import ClipTextConfig

SD_FACTOR = 0.18215
# Tensors that latent statistics are folded into.
FOLDED = ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias")
HEADER_BYTES = 2**20


@dataclass(frozen=True)
class Exported:
    """A model that other programs can take: both configs narrowed, latents scaled by one number."""

    config: ModelConfig
    autoencoder: AutoencoderConfig
    text: ClipTextConfig
    parts: Parts


@dataclass(frozen=True)
class _InFloat32:
    """A stored tensor to be written in fp32."""

    stored: StoredTensor
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def chunks(self) -> Iterator[Tensor]:
        return self.stored.chunks()


def exported(config: ModelConfig, parts: Parts, where: Path) -> Exported:
    """The model as other programs can hold it. Raises SettingError, by name, for what has no counterpart there."""
    autoencoder, text = config.autoencoder, config.text
    if not isinstance(autoencoder, AutoencoderConfig):
        raise SettingError(f"{where}: diffusion in pixel space has no counterpart in other programs; use --to bundle")
    if not isinstance(text, ClipTextConfig):
        raise SettingError(f"{where}: labels in place of text have no counterpart in other programs; use --to bundle")
    if not text.causal:
        raise SettingError(
            f"{where}: a text tower that reads both ways has no counterpart in other programs; use --to bundle"
        )
    if not any(autoencoder.latent_mean) and len(set(autoencoder.latent_std)) == 1:
        return Exported(config, autoencoder, text, parts)
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (autoencoder.latent_mean, autoencoder.latent_std))
    folded = fold({name: whole(parts["autoencoder"][name], name) for name in FOLDED}, mean, std)
    channels = autoencoder.latent_channels
    autoencoder = autoencoder.model_copy(
        update={"latent_mean": (0.0,) * channels, "latent_std": (1 / SD_FACTOR,) * channels}
    )
    # In half precision the product would be rounded once more, so the whole autoencoder goes to fp32, which is exact.
    stored: dict[str, StoredTensor] = {name: _InFloat32(tensor) for name, tensor in parts["autoencoder"].items()}
    stored |= {name: MemoryTensor(tensor.float()) for name, tensor in folded.items()}
    config = config.model_copy(update={"autoencoder": autoencoder})
    return Exported(config, autoencoder, text, {**parts, "autoencoder": stored})


def fold(numbers: Mapping[str, Tensor], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """The two 1×1 convolutions around a latent, for raw latents z / 0.18215 in place of z · std + mean; in fp64.

    With s = std · 0.18215: the encoder's mean m becomes (m − mean) / s and its log-variance falls by 2 log s; the
    decoder multiplies what it reads by s and adds mean.
    """
    weight, bias, post_weight, post_bias = (numbers[name].double() for name in FOLDED)
    scale = std * SD_FACTOR
    rows = torch.cat([1 / scale, torch.ones_like(scale)])
    shift = torch.cat([-mean / scale, -2 * scale.log()])
    folded = (
        weight * rows[:, None, None, None],
        bias * rows + shift,
        post_weight * scale[None, :, None, None],
        post_bias + post_weight[:, :, 0, 0] @ mean,
    )
    return dict(zip(FOLDED, folded, strict=True))


def split(stored: StoredTensor, names: tuple[str, ...]) -> dict[str, StoredTensor]:
    """One of our tensors under its names in a file: query, key and value apart where there are three."""
    if len(names) == 1:
        return {names[0]: stored}
    rows = stored.shape[0] // len(names)
    return {name: Rows(stored, index * rows, rows) for index, name in enumerate(names)}


def to_single_file(destination: Path, model: Exported, dtype: str | None = None) -> None:
    """Write one file with CompVis's names and the config as JSON in its metadata.

    The text tower gets open_clip's names where its activation is Stable Diffusion 2's, Hugging Face's where it is 1's.
    Raises as `whole_or_absent` and `write_tensors` do.
    """
    tensors = compvis_tensors(model)
    metadata = {CONFIG_KEY: json.dumps(model.config.model_dump(mode="json"))}
    said = {ours: theirs for theirs, ours in MODELSPEC.items()}
    if model.config.prediction in said:
        metadata["modelspec.prediction_type"] = said[model.config.prediction]
    with whole_or_absent(destination, written_bytes(tensors, dtype) + HEADER_BYTES) as path:
        write_tensors(path, tensors, metadata, dtype)


def compvis_tensors(model: Exported) -> dict[str, StoredTensor]:
    """All tensors of a model by their names in a single file."""
    prefix = keys.HF_TEXT if model.text.activation == "quick_gelu" else keys.OPEN_CLIP_TEXT[0]
    tensors: dict[str, StoredTensor] = {}
    for part, table in file_names(model.config, prefix).items():
        for ours, names in table.items():
            stored = model.parts[part][ours]
            if part == "autoencoder" and keys.is_convolution_in_compvis(ours):
                stored = Reshaped(stored, (*stored.shape, 1, 1))
            tensors |= split(stored, names)
    return tensors
