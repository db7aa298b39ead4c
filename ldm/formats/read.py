"""A model that lies on the disk in any layout: its config, and its tensors under our names, read when asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldm import config as configuration
from ldm.errors import ModelError, SettingError
from ldm.formats import diffusers_folder, single_file
from ldm.formats.describe import BUNDLE_CONFIG, BUNDLE_PARTS, describe, layout
from ldm.formats.evidence import Description, Prediction, square, usual_side
from ldm.formats.pieces import read_weights, weight_files
from ldm.formats.single_file import Parts, Shapes
from ldm.formats.tensors import StoredTensor, read_header, refuse_difference
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.model_config import ModelConfig, build
from ldm.models.text import ClipTextConfig, vocabulary_words

# No width or number of blocks of a network that somebody trained is larger.
LARGEST = 65_536


@dataclass(frozen=True)
class OpenModel:
    """A model on the disk: what it is, its config, and part → name → stored tensor, all with our names.

    Where `description.prediction` is None, `config.prediction` is a guess: `ldm.formats.probe` asks the UNet.
    """

    description: Description
    config: ModelConfig
    parts: Parts

    def predicting(self, prediction: Prediction, reason: str) -> "OpenModel":
        """This model with what its UNet predicts, and the size of pictures that goes with it."""
        said = replace(self.description, prediction=prediction, prediction_reason=reason)
        update: dict[str, Any] = {"prediction": prediction}
        if not said.has_config:
            side = usual_side(said.cross_attention, prediction)
            update["sampling"] = self.config.sampling.model_copy(update=square(side))
        values = self.config.model_copy(update=update).model_dump()
        return replace(self, description=said, config=validated(values, said.path))


def open_model(path: Path, prediction: Prediction | None = None, ema: bool = False) -> OpenModel:
    """The model at `path`, one of our folders, a diffusers folder or a single file; reads no weights.

    `prediction` is the user's word against all evidence; `ema` takes the averaged weights of a single file's UNet.
    Raises ModelError for what is torn, is another kind of model, or has a tensor too few or too many.
    """
    kind = layout(path)
    if kind == single_file.LAYOUT:
        file = read_header(path)
        opened = open_tensors(path, file.tensors, file.metadata, ema)
    elif ema:
        raise ModelError(f"{path}: has no averaged weights beside the others (EMA); leave out --ema")
    elif kind == diffusers_folder.LAYOUT:
        opened = _open_folder(path)
    else:
        opened = _open_bundle(path)
    return opened.predicting(prediction, "you say so") if prediction else opened


def open_tensors(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], ema: bool = False
) -> OpenModel:
    """The model that tensors with the names of a single file make up. Raises ModelError as `open_model` does."""
    tensors = single_file.unwrapped(tensors)
    said = single_file.describe(path, tensors, metadata)
    if ema and not said.has_ema:
        raise ModelError(f"{path}: has no averaged weights beside the others (EMA); leave out --ema")
    config = validated(single_file.config_values(path, tensors, metadata, said), path)
    if not isinstance(config.text, ClipTextConfig) or not isinstance(config.autoencoder, AutoencoderConfig):
        raise ModelError(f"{path}: a single file holds only a CLIP text tower and a KL autoencoder; write it again")
    shapes = _shapes(path, config, len(tensors))
    return OpenModel(said, config, single_file.assemble(path, tensors, config, shapes, ema, said.architecture))


def _open_folder(folder: Path) -> OpenModel:
    said = diffusers_folder.describe(folder)
    config = validated(diffusers_folder.config_values(folder), folder)
    _refuse_other_words(folder, config)
    shapes = _shapes(folder, config, said.tensors)
    return OpenModel(said, config, diffusers_folder.assemble(folder, config, shapes))


def _open_bundle(folder: Path) -> OpenModel:
    said = describe(folder)
    config = read_bundle_config(folder)
    shapes = _shapes(folder, config, said.tensors)
    parts: dict[str, dict[str, StoredTensor]] = {}
    for part in BUNDLE_PARTS:
        tensors = read_weights(folder, part)
        found = {name: tensor.shape for name, tensor in tensors.items()}
        where = str(weight_files(folder, part)[0])
        refuse_difference(where, shapes[part], found, BUNDLE_CONFIG, "use the files of one model")
        parts[part] = dict(tensors)
    return OpenModel(said, config, parts)


def read_bundle_config(folder: Path) -> ModelConfig:
    """The config of one of our folders. Raises ModelError for one that is not valid."""
    try:
        return configuration.load(folder / BUNDLE_CONFIG, ModelConfig)
    except SettingError as error:
        raise ModelError(str(error)) from None


def validated(values: dict[str, Any], where: Path) -> ModelConfig:
    """The config with these values. Raises ModelError where they do not fit one another."""
    try:
        return configuration.validate(values, ModelConfig, str(where))
    except SettingError as error:
        raise ModelError(str(error)) from None


def _shapes(path: Path, config: ModelConfig, tensors: int) -> Shapes:
    """Part → name → shape of the networks of a config, which a file with so many tensors can hold.

    Raises ModelError for a config that nobody trained, before it costs time to find the shapes of its networks.
    """
    unet, autoencoder, text = config.unet, config.autoencoder, config.text
    blocks = len(unet.multipliers) * unet.res_blocks * unet.transformer_depth
    widths = [*unet.widths, unet.context_width, unet.in_channels, text.width]
    if isinstance(autoencoder, AutoencoderConfig):
        blocks += len(autoencoder.multipliers) * autoencoder.res_blocks
        widths += [autoencoder.channels * multiplier for multiplier in autoencoder.multipliers]
    if isinstance(text, ClipTextConfig):
        blocks, widths = blocks + text.layers, [*widths, text.context_length]
    if blocks > tensors or max(widths) > LARGEST:
        raise ModelError(f"{path}: its config asks for {blocks} blocks, {tensors} tensors are there; copy it again")
    with torch.device("meta"):
        networks = dict(zip(BUNDLE_PARTS, build(config), strict=True))
    return {
        part: {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}  # type: ignore[attr-defined]  # build makes modules
        for part, network in networks.items()
    }


def _refuse_other_words(folder: Path, config: ModelConfig) -> None:
    """Raise ModelError where a folder's tokenizer does not have CLIP's vocabulary: its ids would mean other words."""
    assert isinstance(config.text, ClipTextConfig)
    path, words, merges = diffusers_folder.vocabulary(folder)
    known, known_merges = vocabulary_words(config.text.vocabulary)
    # The two special tokens are last, under other names.
    same = all(words.get(word) == number for number, word in enumerate(known[:-2]))
    if not same or len(words) != len(known) or merges != known_merges:
        raise ModelError(f"{path}: not CLIP's vocabulary of {len(known)} words; use a model with CLIP's own tokenizer")
