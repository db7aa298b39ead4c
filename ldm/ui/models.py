"""The models on offer, known by their headers alone, of which one at a time is in memory."""

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ldm import bundle
from ldm.bundle import Bundle
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import ModelError, SettingError
from ldm.formats.describe import BUNDLE_PARTS, layout
from ldm.formats.finding import bundled_names, find
from ldm.formats.pieces import weight_files
from ldm.formats.read import open_model
from ldm.models.model_config import ModelConfig
from ldm.pipeline import TextToImage
from ldm.request import one_of

WEIGHTS = (".safetensors", ".ckpt")
DISTILLED = {name for name, method in SAMPLERS.items() if method.distilled}


@dataclass(frozen=True)
class Offer:
    """One model that can be chosen: the name shown, where it lies, and its config, read without its weights."""

    name: str
    path: Path
    config: ModelConfig


def models_in(folder: Path) -> list[Path]:
    """What lies directly in a folder and may be a model: model folders, and files of weights."""
    found = []
    for path in sorted(folder.iterdir()):
        try:
            if path.is_dir() or path.suffix.lower() in WEIGHTS:
                layout(path)
                found.append(path)
        except ModelError:
            continue  # some other folder
    return found


def read_offer(name: str, path: Path) -> Offer:
    """A model by its headers. Raises ModelError for one that is torn, unsafe or not for this page."""
    opened = open_model(path)
    if opened.description.is_inpainting:
        raise ModelError(f"{path}: an inpainting model, which this page cannot use yet; choose another")
    return Offer(name, path, opened.config)


def offers(first: str, folders: list[Path]) -> tuple[dict[str, Offer], list[str]]:
    """The model `first`, the bundled ones and those in `folders`, by name; and a line for each unreadable one.

    Two models of one name are told apart by their folders. Raises ModelError where `first` itself is not readable.
    """
    candidates = [find(first), *map(find, bundled_names())]
    candidates += [path for folder in folders for path in models_in(folder)]
    made: dict[str, Offer] = {}
    problems = []
    for path in {path.resolve(): path for path in candidates}.values():
        name = path.name if path.name not in made else f"{path.parent.name}/{path.name}"
        try:
            made.setdefault(name, read_offer(name, path))
        except ModelError as error:
            if not made:
                raise
            problems.append(str(error))
    return made, problems


class Models:
    """Hands out the engine of a model by its name; loading one lets go of the one before.

    Only the worker's thread calls `engine`, so that no model changes under a picture that is being drawn.
    """

    def __init__(
        self, first: str, folders: list[Path], device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.offers, self.problems = offers(first, folders)
        self.first = next(iter(self.offers))
        self.device, self.dtype = device, dtype
        self._loaded: tuple[str, TextToImage] | None = None
        self._loading = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The names, the first model first."""
        return list(self.offers)

    @cached_property
    def digests(self) -> dict[str, str]:
        """The digest of every model folder of our own that is whole, with the model's name here."""
        found = {}
        for offer in self.offers.values():
            try:
                if layout(offer.path) == "bundle":
                    found[bundle.verify(offer.path)] = offer.name
            except ModelError:
                continue
        return found

    @cached_property
    def few_steps(self) -> dict[str, str]:
        """The models here that have a distilled one beside them, which shares networks with them, and its name."""
        names = {offer.path.resolve(): offer.name for offer in self.offers.values()}
        found: dict[str, str] = {}
        for path, name in names.items():
            if self.offers[name].config.sampling.sampler in DISTILLED and layout(path) == "bundle":
                folders = {weight_files(path, part)[0].parent.resolve() for part in BUNDLE_PARTS}
                found |= {names[folder]: name for folder in folders & names.keys() - {path}}
        return found

    @property
    def loaded(self) -> tuple[str, TextToImage] | None:
        """Name and engine of the model in memory, without waiting for one that is being loaded."""
        return self._loaded

    def config(self, name: str) -> ModelConfig:
        """The config of a model. Raises SettingError for a name that is not on offer."""
        try:
            return self.offers[one_of("model", self.names)(name)].config
        except ValueError as error:
            raise SettingError(f"model: {error}") from None

    def engine(self, name: str) -> TextToImage:
        """The engine of a model, loaded if it is not the one in memory. Raises ModelError for a damaged one."""
        self.config(name)
        with self._loading:
            if self._loaded is None or self._loaded[0] != name:
                self._loaded = None
                loaded = Bundle.load(str(self.offers[name].path), self.device, self.dtype)
                self._loaded = (name, TextToImage(loaded))
            return self._loaded[1]
