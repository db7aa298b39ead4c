"""The networks that judge pictures, from files: any feature extractor, or a CLIP that a training run has left."""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.config import parse_yaml, validate
from ldm.errors import ModelError
from ldm.evaluation.figures import Array
from ldm.files import sha256
from ldm.formats.fill import whole
from ldm.formats.tensors import read_header, refuse_difference
from ldm.models.clip import Clip, ClipConfig
from ldm.models.text import ClipTextConfig

RECIPE = "recipe.yaml"
PRODUCTS = ("evaluator.safetensors", "clip.safetensors")  # of a run's folder, the judge before the teacher
# Batch norms count their batches, which nothing reads.
COUNTER = "num_batches_tracked"
TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class Extractor:
    """Features of pictures: `embed` takes a batch (b 3 side side) in [−1, 1] and returns (b d)."""

    name: str
    sha256: str
    side: int
    embed: Callable[[Float[Tensor, "b 3 s s"]], Float[Tensor, "b d"]]


class Evaluator:
    """A CLIP as a judge: unit vectors of pictures and texts. `descendants`: text towers that went on from its own."""

    def __init__(self, name: str, digest: str, clip: Clip, descendants: Sequence[Path] = ()) -> None:
        self.name, self.sha256, self.clip, self.descendants = name, digest, clip, descendants
        self._known: dict[str, Array] = {}

    @property
    def extractor(self) -> Extractor:
        """The image tower."""
        return Extractor(self.name, self.sha256, self.clip.config.image_size, self._images)

    @torch.inference_mode()
    def _images(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b e"]:
        return F.normalize(self.clip.image(images.to(self._device)).float(), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Array:
        """Unit vectors (n e) of texts, each computed once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for first in range(0, len(new), TEXTS_AT_ONCE):
            chunk = new[first : first + TEXTS_AT_ONCE]
            _, pooled = self.clip.text(self.clip.text.tokenize(chunk).to(self._device))
            vectors = F.normalize(self.clip.text_projection(pooled).float(), dim=-1).double().cpu().numpy()
            self._known |= dict(zip(chunk, vectors, strict=True))
        return np.stack([self._known[text] for text in texts])

    @property
    def _device(self) -> torch.device:
        return self.clip.text_projection.weight.device

    def shares_text_tower(self, text: object) -> bool:
        """Whether a model reads with this text tower, or with one that went on from it: the weights, to half precision.

        Raises ModelError for descendants that cannot be read.
        """
        if not isinstance(text, nn.Module):
            return False
        theirs = {name: tensor.cpu().half() for name, tensor in text.state_dict().items()}
        towers: Iterator[Mapping[str, Tensor]] = chain([self.clip.text.state_dict()], map(_tensors, self.descendants))
        return any(
            {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in theirs.items()}
            and all(torch.equal(mine[name].cpu().half(), theirs[name]) for name in mine)
            for mine in towers
        )


def _tensors(path: Path) -> dict[str, Tensor]:
    return {name: whole(tensor, f"{path}: {name}") for name, tensor in read_header(path).tensors.items()}


def open_extractor(path: Path, side: int, device: str = "cpu") -> Extractor:
    """The feature extractor at `path`: TorchScript, or a CLIP as `open_evaluator` takes it.

    TorchScript gets (b 3 side side) RGB from 0 to 255 in fp32 and returns (b d) or (b d 1 1); where it has an argument
    `return_features`, as NVIDIA's Inception has, that is set. Such a file is a program: open only one you trust.
    Raises ModelError for what is neither.
    """
    if path.is_dir() or not _is_torchscript(path):
        return open_evaluator(path, device).extractor
    try:
        module = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        words = str(error).strip().splitlines()[0]
        raise ModelError(f"{path}: not TorchScript ({words}); name a TorchScript or safetensors file") from None
    options = {"return_features": True} if "return_features" in str(module.forward.schema) else {}

    @torch.inference_mode()
    def embed(images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        levels = ((images.to(device) + 1.0) * 127.5).round()
        return torch.as_tensor(module(levels, **options)).float().flatten(1)

    return Extractor(f"torchscript {path.name}", sha256(path), side, embed)


def _is_torchscript(path: Path) -> bool:
    """Whether a file is an archive with TorchScript's code in it; a checkpoint of pickles is one without."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def open_evaluator(path: Path, device: str = "cpu") -> Evaluator:
    """The CLIP in a safetensors file of a training run, or in the run's folder.

    Its shape is the file's metadata "clip" (JSON {"image": …, "text": …}), or stands in the recipe.yaml beside it as
    `clip` and `model.text`. Raises ModelError for a file without a shape, and for weights that do not fit it or are
    damaged.
    """
    if path.is_dir():
        path = next((path / name for name in PRODUCTS if (path / name).is_file()), path / PRODUCTS[-1])
    header = read_header(path)
    image, text = _shape(path, header.metadata)
    clip = Clip(image, text)
    wanted = {name: tuple(like.shape) for name, like in clip.state_dict().items() if not name.endswith(COUNTER)}
    stored = {name: tensor for name, tensor in header.tensors.items() if not name.endswith(COUNTER)}
    found = {name: tensor.shape for name, tensor in stored.items()}
    refuse_difference(str(path), wanted, found, "the CLIP that its recipe describes", "name the run's own file")
    clip.load_state_dict({name: whole(t, f"{path}: {name}").float() for name, t in stored.items()}, strict=False)
    name = f"ldm-clip {path.absolute().parent.name}/{path.stem}"
    # A run teaches the tower of its CLIP more, and the model then reads with what has become of it.
    grown = sorted(path.parent.glob("text*.safetensors")) if path.name == PRODUCTS[-1] else []
    return Evaluator(name, sha256(path), clip.to(device).eval().requires_grad_(False), grown)


def _shape(path: Path, metadata: dict[str, str]) -> tuple[ClipConfig, ClipTextConfig]:
    """The configs of both towers."""
    where = str(path)
    if "clip" in metadata:
        try:
            told = json.loads(metadata["clip"])
            image, text = told["image"], told["text"]
        except (ValueError, KeyError, TypeError):
            raise ModelError(f"{where}: its metadata describes no CLIP; save it with the run's own command") from None
    else:
        recipe = path.with_name(RECIPE)
        if not recipe.is_file():
            raise ModelError(f"{where}: neither metadata nor a {RECIPE} beside it tells its shape; name a run's file")
        where = str(recipe)
        told = parse_yaml(recipe.read_text(encoding="utf-8"), where)
        try:
            image, text = told["clip"], told["model"]["text"]
        except (KeyError, TypeError):
            words = "no section `clip` and `model.text` in it"
            raise ModelError(f"{where}: {words}; name a run that trained CLIP") from None
    return validate(image, ClipConfig, where), validate(text, ClipTextConfig, where)
