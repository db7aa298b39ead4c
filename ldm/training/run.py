"""A whole training run: its recipe, its folder, and what its stages leave there for one another."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.bundle import Bundle
from ldm.config import parse_yaml, validate
from ldm.data.latents import weights_digest
from ldm.data.tally import Tally
from ldm.errors import SettingError
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.model_config import ModelConfig, build
from ldm.nn.layers import channels_last
from ldm.training import source
from ldm.training.checkpoint import load_tensors
from ldm.training.loop import Conduct
from ldm.training.recipe import Recipe
from ldm.training.source import Pictures
from ldm.training.workers import workers


@dataclass(frozen=True)
class Run:
    """A recipe, the folder its products go to, and what its parts are taken from where they are not trained here."""

    recipe: Recipe
    folder: Path
    base: Bundle | None = None
    conduct: Conduct = field(default_factory=Conduct)
    tallies: list[Tally] = field(default_factory=list)

    @property
    def model(self) -> ModelConfig:
        """The recipe's model, or the base's. Raises SettingError where there is neither."""
        if self.recipe.model is not None:
            return self.recipe.model
        if self.base is None:
            raise SettingError("--base: this recipe has no model of its own; name the model that is trained on")
        return self.base.config

    def mixing(self, share: float | None) -> "Run":
        """The same run, in which the data's second set has this share; with None its own."""
        mix = self.recipe.data.mix
        if mix is None or share is None:
            return self
        data = self.recipe.data.model_copy(update={"mix": mix.model_copy(update={"share": share})})
        return replace(self, recipe=self.recipe.model_copy(update={"data": data}))

    def square(self) -> "Run":
        """The same run without buckets: for networks that learn from pictures of one size."""
        data = self.recipe.data.model_copy(update={"buckets": None})
        return replace(self, recipe=self.recipe.model_copy(update={"data": data}))

    def resident(self) -> "Run":
        """The same run with its pictures kept in memory at the size at which they are read."""
        data = self.recipe.data.model_copy(update={"resident": True})
        return replace(self, recipe=self.recipe.model_copy(update={"data": data}))

    def product(self, name: str) -> Path:
        """Where a finished stage leaves its tensors."""
        return self.folder / f"{name}.safetensors"

    @property
    def text(self) -> Path:
        """The newest text tower: of the last UNet stage that trained it, of the thumbnails, or of CLIP."""
        stages = reversed(range(len(self.recipe.unet_training)))
        later = [self.product(name) for name in (*(f"text-{index}" for index in stages), "text-thumbnail")]
        return next((path for path in later if path.is_file()), self.product("text"))

    def has(self, name: str) -> bool:
        """Is this product there? All processes get the same answer."""
        return workers().agreed(self.product(name).is_file())

    def checkpoints(self, stage: str) -> Path:
        """Where the states of a stage are saved."""
        return self.folder / "checkpoints" / stage

    def pictures(self, batch_size: int, side: int, seed: int, alone: bool = False, draws: int = 1) -> Pictures:
        """Batches of the recipe's pictures, by position; whole ones for a process that is `alone` in what it does.

        Each picture has `draws` captions.
        """
        return source.pictures(self.recipe.data, batch_size, side, seed, alone, self.tallies, draws)

    def bad_samples(self) -> dict[str, int]:
        """How many samples this process has left out so far, by reason."""
        return dict(sum((tally.counts for tally in self.tallies), Counter()).most_common())


def digest(value: object) -> str:
    """A short name for what a product was made from."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def network_digest(bundle: Bundle, part: Literal["autoencoder", "text", "unet"]) -> str:
    """A name for one network of a model: the same for the same weights and config, wherever they were read from."""
    module = getattr(bundle, part)
    return weights_digest(module.state_dict(), getattr(bundle.config, part).model_dump_json())


def model_so_far(run: Run) -> Bundle:
    """The model with what there is: parts of the base, what earlier stages have left, and a fresh UNet."""
    model = run.model
    about = run.product("autoencoder").with_suffix(".json")
    if about.is_file():
        fitted = validate(parse_yaml(about.read_text(), str(about))["config"], AutoencoderConfig, str(about))
        model = model.model_copy(update={"autoencoder": fitted})
    elif run.base is not None:
        model = model.model_copy(update={"autoencoder": run.base.config.autoencoder})
    if run.base is not None and not run.text.is_file():
        model = model.model_copy(update={"text": run.base.config.text})
    torch.manual_seed(run.recipe.seed)
    autoencoder, text, unet = build(ModelConfig.model_validate(model.model_dump()))
    for name, module, path in (("autoencoder", autoencoder, run.product("autoencoder")), ("text", text, run.text)):
        assert isinstance(module, nn.Module)
        if path.is_file():
            module.load_state_dict(load_tensors(path))
        elif run.base is not None:
            module.load_state_dict(getattr(run.base, name).state_dict())
        channels_last(module).eval().requires_grad_(False)
    recipe = run.recipe
    adapts = recipe.lora_training or recipe.inversion_training or recipe.consistency_training
    if run.base is not None and (recipe.fine_tune or adapts):
        if run.base.config.unet != model.unet:
            raise SettingError("model.unet: its shape differs from that of --base; leave `model` out to train that on")
        unet.load_state_dict(run.base.unet.state_dict())
    return Bundle(run.recipe.name, model, autoencoder, text, channels_last(unet))


@torch.no_grad()
def give_weights(bundle: Bundle, weights: dict[str, Tensor]) -> None:
    """Give the UNet of a bundle weights by name; where the text tower learned too, both, as `unet.…` and `text.…`."""
    parameters: dict[str, Tensor] = {}
    for part in ("text", "unet"):
        module: nn.Module = getattr(bundle, part)
        parameters |= {f"{part}.{name}": parameter for name, parameter in module.named_parameters()}
    for name, weight in weights.items():
        parameters[name if name in parameters else f"unet.{name}"].copy_(weight)
