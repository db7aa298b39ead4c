"""A recipe is one YAML file: the model, the data, and every stage from nothing to a bundle."""

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from ldm.config import Config
from ldm.models.clip import ClipConfig, TowersConfig
from ldm.models.model_config import ModelConfig
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.clip import ClipTraining
from ldm.training.consistency import ConsistencyTraining
from ldm.training.diffusion import UNetTraining
from ldm.training.inversion import InversionTraining
from ldm.training.lora import LoraTraining
from ldm.training.source import DataConfig
from ldm.training.thumbnail import ThumbnailTraining


class Recipe(Config):
    """Everything `scripts/train.py` needs. A stage that a model does not have is left out.

    Without a model the one that `--base` names is meant.
    """

    name: str
    seed: NonNegativeInt = 0
    data: DataConfig
    model: ModelConfig | None = None
    clip: ClipConfig | None = None
    autoencoder_training: AutoencoderTraining | None = None
    clip_training: ClipTraining | None = None
    # What CLIP does not teach the text tower: what is where.
    thumbnail_training: ThumbnailTraining | None = None
    # A second CLIP that judges the model; it is no part of it.
    evaluator: TowersConfig | None = None
    evaluator_training: ClipTraining | None = None
    unet_training: tuple[UNetTraining, ...] = ()
    # The UNet begins as that of `--base`, whose shape it has, instead of anew.
    fine_tune: bool = False
    lora_training: LoraTraining | None = None
    inversion_training: InversionTraining | None = None
    consistency_training: ConsistencyTraining | None = None
    sample_prompts: tuple[str, ...] = Field(min_length=1)
    sample_every: PositiveInt = 1000

    @model_validator(mode="after")
    def _something_learns(self) -> "Recipe":
        parts = (self.autoencoder_training, self.clip_training, self.thumbnail_training)
        adaptations = (self.lora_training, self.inversion_training, self.consistency_training)
        if not any((*parts, *adaptations, *self.unet_training)):
            raise ValueError("nothing is trained: give a section such as unet_training")
        if self.consistency_training is not None and self.unet_training:
            raise ValueError("consistency_training has a recipe of its own: its bundle would take the other's place")
        if (self.evaluator is None) != (self.evaluator_training is None):
            raise ValueError("evaluator and evaluator_training come together")
        if self.evaluator_training is not None and self.evaluator_training.from_base:
            raise ValueError("evaluator_training.from_base: a judge must not begin as what it judges; leave it out")
        if (self.clip is None) != (self.clip_training is None):
            raise ValueError("clip and clip_training come together")
        return self
