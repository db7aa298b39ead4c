"""A recipe is one YAML file: the model, the data, and every stage from nothing to a bundle."""

from pydantic import Field, PositiveInt, model_validator

from ldm.config import Config
from ldm.models.clip import ClipConfig
from ldm.models.model_config import ModelConfig
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.clip import ClipTraining
from ldm.training.diffusion import DiffusionTraining


class DataConfig(Config):
    """Where captioned pictures come from: WebDataset shards (a glob), or the digits of `ldm.data.digits`."""

    shards: str | None = None
    # A folder with MNIST's IDX files; without them, scikit-learn's own small digits.
    digits: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if (self.shards is None) == (self.digits is None):
            raise ValueError("give either shards or digits")
        return self


class Recipe(Config):
    """Everything `scripts/train.py` needs. A stage that a model does not have is left out."""

    name: str
    seed: int = 0
    data: DataConfig
    model: ModelConfig
    clip: ClipConfig | None = None
    autoencoder_training: AutoencoderTraining | None = None
    clip_training: ClipTraining | None = None
    unet_training: tuple[DiffusionTraining, ...] = Field(min_length=1)
    sample_prompts: tuple[str, ...] = Field(min_length=1)
    sample_every: PositiveInt = 1000
