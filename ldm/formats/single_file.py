"""A whole model in one safetensors file with CompVis's names: what it is, and its tensors under ours.

Files of Stable Diffusion 1.x and 2.x say nothing of themselves, so shapes and the names that are there decide. A file
that `scripts/convert.py` has written carries its config as JSON in the metadata, and that is believed after a check.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import ModelError
from ldm.formats import keys
from ldm.formats.evidence import (
    OPEN_CLIP_BLOCKS,
    SAMPLING,
    ZERO_SNR,
    Description,
    Layout,
    Prediction,
    architecture,
    family,
    square,
    usual_side,
)
from ldm.formats.tensors import Joined, StoredTensor, refuse_difference, total_bytes

if TYPE_CHECKING:
    from ldm.models.model_config import ModelConfig
    from ldm.models.text import ClipTextConfig

LAYOUT: Layout = "single file"
# The metadata of our own files: the model's config, as JSON.
CONFIG_KEY = "ldm.config"
# Some programs wrote the dictionary around the weights into the names.
WRAPPER = "state_dict."
CONV_IN = f"{keys.UNET}input_blocks.0.0.weight"
CROSS_ATTENTION = re.compile(r"\.attn2\.to_k\.weight$")
BLOCK = re.compile(r"(?:encoder\.layers|transformer\.resblocks)\.([0-9]{1,4})\.")
# What else people have as one safetensors file: a name that only such files have, and what they are.
OTHER_KINDS = {
    r"(^|[._])lora_|\.lora[._]|\.hada_|\.lokr_": "a LoRA, which changes a model; give the model itself",
    r"^control_model\.|^controlnet_|\.controlnet_": "a ControlNet, which guides a model; give the model itself",
    r"double_blocks\.|joint_blocks\.": "a Flux or SD3 file, expected Stable Diffusion 1.x or 2.x; use another model",
    r"^(encoder|decoder)\.(conv_in|mid)": "an autoencoder alone; give the file or folder of the whole model",
    r"^(down_blocks|up_blocks|mid_block)\.": "one part of a diffusers folder; give the folder",
    r"^(text_model|embeddings|encoder)\.|^tower\.": "a text encoder alone; give the file or folder of the whole model",
    r"^(emb_params|string_to_param|clip_[lg])": "a textual inversion; give the model it belongs to",
}
MODELSPEC: dict[str, Prediction] = {"epsilon": "eps", "v": "v"}
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
Parts = dict[str, dict[str, StoredTensor]]


def unwrapped(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors without the name of a dictionary around them."""
    return {name.removeprefix(WRAPPER): tensor for name, tensor in tensors.items()}


def describe(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> Description:
    """What a file with these tensors is. Raises ModelError for all but Stable Diffusion 1.x and 2.x and our own."""
    refuse_other_kinds(path, tensors)
    prediction, reason = predicts(path, tensors, metadata)
    width, channels = cross_attention(path, tensors), tensors[CONV_IN].shape[1]
    own = own_values(path, metadata)
    prefix = text_prefix(path, tensors)
    writer = "open_clip" if prefix in keys.OPEN_CLIP_TEXT else "Hugging Face"
    name = "a model of this program" if own else family(width, path).name
    used = [tensor for name, tensor in tensors.items() if not keys.is_left_over(name)]
    return Description(
        path=path,
        layout=LAYOUT,
        architecture=architecture(name, channels),
        prediction=prediction,
        prediction_reason=reason,
        has_config=own is not None,
        input_channels=channels,
        cross_attention=width,
        text=f"CLIP, {blocks(tensors, prefix)} layers, {writer} names",
        has_ema=any(name.startswith(f"{keys.EMA}diffusion_model") for name in tensors),
        formats=total_bytes(used),
        tensors=len(used),
        left_over=len(tensors) - len(used),
    )


def refuse_other_kinds(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ModelError, which says what the file is, where it does not hold a UNet with CompVis's names."""
    if CONV_IN in tensors and len(tensors[CONV_IN].shape) == 4:
        if f"{keys.UNET}label_emb.0.0.weight" in tensors:
            family(cross_attention(path, tensors), path)
            raise ModelError(f"{path}: its UNet reads a label beside the text; use a Stable Diffusion 1.x or 2.x model")
        return
    for pattern, what in OTHER_KINDS.items():
        if any(re.search(pattern, name) for name in tensors):
            raise ModelError(f"{path}: this is {what}")
    raise ModelError(f"{path}: no Stable Diffusion model: it has no tensor {CONV_IN}; use another file")


def cross_attention(path: Path, tensors: Mapping[str, StoredTensor]) -> int:
    """The width of the text states that the UNet reads."""
    for name, tensor in tensors.items():
        if name.startswith(keys.UNET) and CROSS_ATTENTION.search(name) and len(tensor.shape) == 2:
            return tensor.shape[1]
    raise ModelError(f"{path}: its UNet has no cross-attention, so it reads no text; use a text-to-image model")


def text_prefix(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """What the names of the text tower start with. Raises ModelError where there is none, or no autoencoder."""
    marks = {f"{prefix}token_embedding.weight": prefix for prefix in keys.OPEN_CLIP_TEXT}
    marks |= {f"{prefix}embeddings.token_embedding.weight": prefix for prefix in (keys.HF_TEXT, keys.HF_TEXT_BARE)}
    found = [prefix for mark, prefix in marks.items() if mark in tensors and len(tensors[mark].shape) == 2]
    autoencoder = any(name.startswith(keys.AUTOENCODER) for name in tensors)
    lost = [word for word, there in (("text encoder", found), ("autoencoder", autoencoder)) if not there]
    if lost:
        raise ModelError(f"{path}: holds no {' and no '.join(lost)}; use the file of the whole model")
    return found[0]


def blocks(tensors: Iterable[str], prefix: str) -> int:
    """How many transformer blocks the text tower has."""
    rest = (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))
    return 1 + max((int(match[1]) for name in rest if (match := BLOCK.match(name))), default=-1)


def predicts(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> tuple[Prediction | None, str]:
    """What the UNet predicts and why we think so, from the strongest evidence to the weakest."""
    own = own_values(path, metadata)
    if own is not None:
        said = own.get("prediction")
        return (said if said in ("v", "x0") else "eps"), "the config in its metadata says so"
    for marker in ("v_pred", "ztsnr"):  # a noise schedule that ends in pure noise cannot be learned with ε
        if marker in tensors:
            return "v", f"the marker tensor {marker} is there"
    said = metadata.get("modelspec.prediction_type", "")
    if said in MODELSPEC:
        return MODELSPEC[said], f"its metadata says modelspec.prediction_type {said}"
    return None, "nothing in the file says it; the UNet is asked at t = 999 when it is loaded"


def own_values(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The config that our own files carry, still to be validated; None for other files."""
    if CONFIG_KEY not in metadata:
        return None
    try:
        values = json.loads(metadata[CONFIG_KEY])
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: {CONFIG_KEY} in its metadata is not a config; write the file again")
    return values


def config_values(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], description: Description
) -> dict[str, Any]:
    """The config of the model, still to be validated."""
    own = own_values(path, metadata)
    if own is not None:
        return own
    version = family(description.cross_attention, path)
    prefix = text_prefix(path, tensors)
    layers = blocks(tensors, prefix)
    narrow = [tensor for name, tensor in tensors.items() if name.endswith(".1.proj_in.weight")]
    embedding = "token_embedding.weight" if prefix in keys.OPEN_CLIP_TEXT else "embeddings.token_embedding.weight"
    return {
        "autoencoder": {"kind": "kl"},
        "text": {
            "kind": "clip",
            "width": tensors[prefix + embedding].shape[1],
            "layers": layers,
            "hidden": "penultimate" if layers == OPEN_CLIP_BLOCKS else "last",
            "tokenizer": "hf",
            **version.text,
        },
        "unet": {
            "in_channels": description.input_channels,
            "context_width": description.cross_attention,
            "linear_projection": bool(narrow) and len(narrow[0].shape) == 2,
            **version.unet,
        },
        "noise_schedule": {"kind": ZERO_SNR} if "ztsnr" in tensors else {},
        "prediction": description.prediction or "eps",
        "sampling": SAMPLING | square(usual_side(description.cross_attention, description.prediction)),
    }


def assemble(
    path: Path, tensors: Mapping[str, StoredTensor], config: "ModelConfig", shapes: Shapes, ema: bool, model: str
) -> Parts:
    """Our parts → our names → stored tensors. Raises ModelError unless every tensor of the file has its place.

    `shapes` are those of our networks; `ema` takes the averaged weights of the UNet.
    """
    names = file_names(config, text_prefix(path, tensors), ema)
    parts: Parts = {part: {} for part in names}
    wanted: dict[str, tuple[int, ...]] = {}
    for part, table in names.items():
        for ours, theirs in table.items():
            shape = shapes[part][ours]
            for name in theirs:
                wanted[name] = stored_shape(ours, shape, len(theirs), tensors.get(name))
    found = {name: tensor.shape for name, tensor in tensors.items() if name in wanted or not _ignored(name, ema)}
    refuse_difference(str(path), wanted, found, model, "use another file of this model")
    for part, table in names.items():
        for ours, theirs in table.items():
            parts[part][ours] = Joined(tuple(tensors[name] for name in theirs), shapes[part][ours])
    return parts


def _ignored(name: str, ema: bool) -> bool:
    return keys.is_left_over(name) or (ema and name.startswith(keys.UNET))


def stored_shape(ours: str, shape: tuple[int, ...], pieces: int, found: StoredTensor | None) -> tuple[int, ...]:
    """The shape that one of `pieces` tensors should have in the file where our tensor has `shape`."""
    if pieces > 1:
        return (shape[0] // pieces, *shape[1:])
    convolution = (*shape, 1, 1)
    if keys.is_convolution_in_compvis(ours) and len(shape) == 2 and found is not None and found.shape == convolution:
        return convolution
    return shape


def file_names(config: "ModelConfig", text: str, ema: bool = False) -> dict[str, dict[str, tuple[str, ...]]]:
    """Our parts → our names → the names in a file whose text tower's names start with `text`."""
    unet = keys.unet_to_compvis(config.unet)
    autoencoder = keys.autoencoder_to_compvis(config.autoencoder)  # type: ignore[arg-type]  # this layout has KL and CLIP
    return {
        "autoencoder": {ours: (keys.AUTOENCODER + theirs,) for ours, theirs in autoencoder.items()},
        "text": text_names(config.text, text),  # type: ignore[arg-type]  # this layout has KL and CLIP
        "unet": {ours: (keys.ema_name(theirs) if ema else keys.UNET + theirs,) for ours, theirs in unet.items()},
    }


def text_names(config: "ClipTextConfig", prefix: str) -> dict[str, tuple[str, ...]]:
    """Our names of the text tower → those behind `prefix`."""
    if prefix in keys.OPEN_CLIP_TEXT:
        return {ours: (prefix + theirs,) for ours, theirs in keys.text_to_open_clip(config).items()}
    return {ours: tuple(prefix + name for name in theirs) for ours, theirs in keys.text_to_hf(config).items()}
