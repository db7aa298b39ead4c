"""What a file or folder is, from its names, shapes and configs alone: no weight is read, no network is built."""

from pathlib import Path

from ldm.config import parse_yaml
from ldm.errors import ModelError, SettingError
from ldm.formats import diffusers_folder, single_file
from ldm.formats.evidence import Description, Layout, Prediction
from ldm.formats.pieces import read_weights
from ldm.formats.tensors import read_header, refuse_special, total_bytes

BUNDLE_CONFIG = "config.yaml"
BUNDLE_PARTS = ("autoencoder", "text", "unet")
PREDICTIONS: dict[object, Prediction] = {"eps": "eps", "v": "v", "x0": "x0"}


def layout(path: Path) -> Layout:
    """How a model lies there, by the files that are there. Raises ModelError where there is none that we know."""
    if not path.is_dir():
        refuse_special(path)
        return single_file.LAYOUT
    if (path / BUNDLE_CONFIG).is_file():
        return "bundle"
    if (path / diffusers_folder.INDEX).is_file():
        return diffusers_folder.LAYOUT
    raise ModelError(
        f"{path}: not a model folder, it has no {BUNDLE_CONFIG} and no {diffusers_folder.INDEX}; "
        "give a model's name, file or folder"
    )


def describe(path: Path) -> Description:
    """What the model at `path` is. Raises ModelError for what is torn, or nothing that we can draw with."""
    kind = layout(path)
    if kind == "bundle":
        return describe_bundle(path)
    if kind == diffusers_folder.LAYOUT:
        return diffusers_folder.describe(path)
    file = read_header(path)
    return single_file.describe(path, single_file.unwrapped(file.tensors), file.metadata)


def describe_bundle(folder: Path) -> Description:
    """What one of our own folders is."""
    path = folder / BUNDLE_CONFIG
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        unet, text = values["unet"], values["text"]
        width, channels = int(unet.get("context_width", 768)), int(unet.get("in_channels", 4))
        layers = f"CLIP, {int(text.get('layers', 12))} layers" if text.get("kind", "clip") == "clip" else "labels"
        prediction = PREDICTIONS[values.get("prediction", "eps")]
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
    except SettingError as error:
        raise ModelError(str(error)) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(f"{path}: not the config of a model; copy the whole model folder again") from None
    tensors = [t for part in BUNDLE_PARTS for t in read_weights(folder, part).values()]
    return Description(
        path=folder,
        layout="bundle",
        architecture="a model of this program",
        prediction=prediction,
        prediction_reason=f"{BUNDLE_CONFIG} says so",
        has_config=True,
        input_channels=channels,
        cross_attention=width,
        text=layers,
        has_ema=False,
        formats=total_bytes(tensors),
        tensors=len(tensors),
    )
