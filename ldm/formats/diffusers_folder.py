"""A model as a diffusers folder: one JSON config and one set of safetensors files for each part.

The weights of a part are one file or several with an index, and may come in variants (`fp16` in the name).
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import ModelError
from ldm.formats import diffusers_config, keys
from ldm.formats.evidence import FAMILIES, SAMPLING, Description, Layout, Prediction, architecture, square, usual_side
from ldm.formats.single_file import Parts, Shapes
from ldm.formats.tensors import Joined, StoredTensor, TensorFile, read_header, refuse_difference, total_bytes

if TYPE_CHECKING:
    from ldm.models.model_config import ModelConfig

LAYOUT: Layout = "diffusers folder"
INDEX = "model_index.json"
# Where each of our parts is, and what its weights are called.
FOLDERS = {"autoencoder": "vae", "text": "text_encoder", "unet": "unet"}
WEIGHTS = {"autoencoder": "diffusion_pytorch_model", "text": "model", "unet": "diffusion_pytorch_model"}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionImg2ImgPipeline")
SPACINGS = ("leading", "trailing", "linspace")
# A tokenizer's vocabulary has 49,408 words; nothing else in these folders is nearly as long.
MAX_JSON = 32 * 2**20
LARGEST_SIDE = 2048
SHARD = re.compile(r"[\w.-]+\.safetensors")
NOT_WEIGHTS = re.compile(r"(^|\.)(position_ids|text_projection\.weight|logit_scale)$")
PADDING = {"!": "zero", "<|endoftext|>": "end"}
ADVICE = "use the files of one model"


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ModelError where there is none."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ModelError(f"{path}: too large for a config; copy or download it again")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); copy the whole model folder again") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: not JSON; copy or download it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds no settings; copy or download it again")
    return values


def describe(folder: Path) -> Description:
    """What a diffusers folder is. Raises ModelError for anything but Stable Diffusion 1.x, 2.x and our own shapes."""
    refuse_other_pipelines(folder)
    unet = read_json(folder / "unet/config.json")
    where = folder / "scheduler/scheduler_config.json"
    scheduler = read_json(where)
    _, prediction, _ = diffusers_config.scheduler(scheduler, where)
    said = f"prediction_type is {scheduler['prediction_type']}" if "prediction_type" in scheduler else "it says nothing"
    values = diffusers_config.unet(unet, folder / "unet/config.json")
    text = read_json(folder / "text_encoder/config.json")
    stored = [named for part in FOLDERS for named in weights(folder, part).items()]
    used = [tensor for name, tensor in stored if not NOT_WEIGHTS.search(name)]
    width, channels = values["context_width"], values["in_channels"]
    name = FAMILIES[width].name if width in FAMILIES else "a model of Stable Diffusion's kind"
    return Description(
        path=folder,
        layout=LAYOUT,
        architecture=architecture(name, channels),
        prediction=prediction,
        prediction_reason=f"{where.name}: {said}",
        has_config=True,
        input_channels=channels,
        cross_attention=width,
        text=f"CLIP, {text.get('num_hidden_layers', 12)} layers, Hugging Face names",
        has_ema=False,
        formats=total_bytes(used),
        tensors=len(used),
        left_over=len(stored) - len(used),
    )


def refuse_other_pipelines(folder: Path) -> None:
    """Raise ModelError for a folder of another kind of model, by its name, and for one that is not whole."""
    name = read_json(folder / INDEX).get("_class_name")
    if name not in PIPELINES:
        what = "an SDXL folder" if "XL" in str(name) else f"a folder of {name}"
        raise ModelError(f"{folder}: this is {what}, expected Stable Diffusion 1.x or 2.x; use another model")
    for part in FOLDERS.values():
        if not (folder / part).is_dir():
            raise ModelError(f"{folder}: has no folder {part}; copy the whole model folder again")


def weights(folder: Path, part: str) -> dict[str, StoredTensor]:
    """The stored tensors of one of our parts, by the names in its files."""
    return {name: tensor for file in weight_files(folder, part) for name, tensor in file.tensors.items()}


def weight_files(folder: Path, part: str) -> list[TensorFile]:
    """The weights of one part: without a variant where they are there, else the variant that is there.

    Raises ModelError where there are none, or several variants, or where an index names a file that it may not.
    """
    place, stem = folder / FOLDERS[part], WEIGHTS[part]
    singles = [place / f"{stem}.safetensors", *sorted(place.glob(f"{stem}.*.safetensors"))]
    indices = [place / f"{stem}.safetensors.index.json", *sorted(place.glob(f"{stem}.safetensors.index.*.json"))]
    found = [path for path in (singles[0], indices[0]) if path.is_file()] or [
        path for path in (*singles[1:], *indices[1:]) if path.is_file() and "-of-" not in path.name
    ]
    if not found:
        pickled = any(path.suffix in (".bin", ".ckpt", ".pt") for path in place.iterdir())
        why = "only pickle files, which are never run" if pickled else f"no {stem}.safetensors"
        raise ModelError(f"{place}: {why}; use a folder with safetensors files")
    if len(found) > 1 and found[0].name not in (singles[0].name, indices[0].name):
        names = ", ".join(path.name for path in found[:3])
        raise ModelError(f"{place}: several variants and none without a variant ({names}); leave one of them there")
    chosen = found[0]
    return [read_header(chosen)] if chosen.suffix == ".safetensors" else shards(chosen)


def shards(index: Path) -> list[TensorFile]:
    """The files that an index names, each of which must hold exactly what the index says."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{index}: has no weight_map; copy the whole model folder again")
    files = []
    for name in sorted(set(table.values())):
        if not SHARD.fullmatch(name):
            raise ModelError(f"{index}: names the file {name!r}, expected one beside it; copy the model folder again")
        file = read_header(index.parent / name)
        if file.tensors.keys() != {key for key, place in table.items() if place == name}:
            raise ModelError(f"{file.path}: holds other tensors than {index.name} says; copy the model folder again")
        files.append(file)
    return files


def config_values(folder: Path) -> dict[str, Any]:
    """The config of the model, still to be validated."""
    unet = diffusers_config.unet(read_json(folder / "unet/config.json"), folder / "unet/config.json")
    autoencoder = diffusers_config.autoencoder(read_json(folder / "vae/config.json"), folder / "vae/config.json")
    where = folder / "text_encoder/config.json"
    text = diffusers_config.text(read_json(where), padding(folder), where)
    where = folder / "scheduler/scheduler_config.json"
    schedule, prediction, spacing = diffusers_config.scheduler(read_json(where), where)
    sampling = SAMPLING | size(folder, unet, autoencoder, prediction)
    if spacing in SPACINGS:
        sampling["schedule"] = spacing
    if read_json(where).get("set_alpha_to_one") is True:  # then its last step ends at σ = 0, as our own models' does
        sampling["convention"] = "exact"
    return {
        "autoencoder": autoencoder,
        "text": text,
        "unet": unet,
        "noise_schedule": schedule,
        "prediction": prediction,
        "sampling": sampling,
    }


def size(folder: Path, unet: dict[str, Any], autoencoder: dict[str, Any], prediction: Prediction) -> dict[str, int]:
    """The size of the pictures that the UNet was trained on, as settings; its config has that of their latents."""
    said = read_json(folder / "unet/config.json").get("sample_size")
    sides = said if isinstance(said, list) and len(said) == 2 else [said, said]
    factor = 2 ** (len(autoencoder["multipliers"]) - 1)
    if all(isinstance(side, int) and 0 < side * factor <= LARGEST_SIDE for side in sides):
        return {"height": sides[0] * factor, "width": sides[1] * factor}
    return square(usual_side(unet["context_width"], prediction))


def padding(folder: Path) -> str:
    """What the tokenizer fills a row with behind the prompt. Raises ModelError for a token other than the usual two."""
    token: Any = "<|endoftext|>"
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / "tokenizer" / name
        if path.is_file():
            token = read_json(path).get("pad_token", token)
    token = token.get("content") if isinstance(token, dict) else token
    if token not in PADDING:
        raise ModelError(f"{folder / 'tokenizer'}: pads with {token!r}, expected '!' or '<|endoftext|>'; not supported")
    return PADDING[token]


def vocabulary(folder: Path) -> tuple[Path, dict[str, int], list[tuple[str, str]]]:
    """File, words with ids, and merges of the folder's tokenizer. Raises ModelError where there is none."""
    place = folder / "tokenizer"
    path = place / "tokenizer.json"
    if (place / "vocab.json").is_file() and (place / "merges.txt").is_file():
        path = place / "vocab.json"
        words: Any = read_json(path)
        lines = (place / "merges.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        merges: Any = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    else:
        model = read_json(path).get("model", {})
        words, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
        merges = [merge.split() if isinstance(merge, str) else merge for merge in merges or []]
    if not isinstance(words, dict) or not all(isinstance(merge, list) and len(merge) == 2 for merge in merges):
        raise ModelError(f"{path}: not the vocabulary of a tokenizer; copy the model folder again")
    return path, words, [(str(first), str(second)) for first, second in merges]


def assemble(folder: Path, config: "ModelConfig", shapes: Shapes) -> Parts:
    """Our parts → our names → stored tensors. Raises ModelError unless every tensor of the files has its place."""
    parts: Parts = {}
    for part, place in FOLDERS.items():
        tensors = {name: tensor for name, tensor in weights(folder, part).items() if not NOT_WEIGHTS.search(name)}
        names: dict[str, tuple[str, ...]] = {ours: (ours,) for ours in shapes[part]}
        if part == "text":
            prefix = "text_model." if any(name.startswith("text_model.") for name in tensors) else ""
            hf = keys.text_to_hf(config.text)  # type: ignore[arg-type]  # this layout has CLIP
            names = {ours: tuple(prefix + name for name in theirs) for ours, theirs in hf.items()}
        elif part == "autoencoder":
            names = {ours: (_name_of_its_time(ours, tensors),) for ours in shapes[part]}
        wanted = {
            name: _shape(ours, shapes[part][ours], len(theirs), tensors.get(name))
            for ours, theirs in names.items()
            for name in theirs
        }
        found = {name: tensor.shape for name, tensor in tensors.items()}
        refuse_difference(str(folder / place), wanted, found, "config.json", ADVICE)
        parts[part] = {
            ours: Joined(tuple(tensors[name] for name in theirs), shapes[part][ours]) for ours, theirs in names.items()
        }
    return parts


def _name_of_its_time(ours: str, tensors: Mapping[str, StoredTensor]) -> str:
    """The name of an autoencoder's tensor, which in the middle's attention was another before 2023."""
    module, _, kind = ours.rpartition(".")
    for new, old in keys.OLD_DIFFUSERS_ATTENTION.items():
        if ".attentions." in ours and module.endswith(f".{new}"):
            before = f"{module.removesuffix(new)}{old}.{kind}"
            return before if before in tensors else ours
    return ours


def _shape(ours: str, shape: tuple[int, ...], pieces: int, found: StoredTensor | None) -> tuple[int, ...]:
    """The shape of one of `pieces` tensors; in an attention, `found` may have axes of length 1 behind ours."""
    if pieces > 1:
        return (shape[0] // pieces, *shape[1:])
    same = found is not None and found.shape[: len(shape)] == shape and math.prod(found.shape) == math.prod(shape)
    return found.shape if found is not None and same and ".attentions." in ours else shape
