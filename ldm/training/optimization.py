"""How long and how fast a stage learns, as pure functions of its config and the step."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ldm.config import Config
from ldm.errors import SettingError

FP16_SCALE = 2.0**16
FP16_GROWTH_STEPS = 2000


class OptimizationConfig(Config):
    """How long and how fast one stage learns (rate: linear warm-up, constant, linear decay to zero)."""

    steps: PositiveInt
    # Samples of one update, over all processes.
    batch_size: PositiveInt
    # The most that a process computes at once; gradients are accumulated until its share of the batch is through.
    micro_batch_size: PositiveInt | None = None
    learning_rate: PositiveFloat
    # adamw, or muon: fewer steps for the same loss and, where networks are small, a longer step; docs/training.md.
    optimizer: Literal["adamw", "muon"] = "adamw"
    warmup_steps: NonNegativeInt = 100
    # The last part of the run, as a fraction of its steps, over which the learning rate falls to zero.
    decay: float = Field(0.5, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0
    ema_decay: float = Field(0.999, ge=0, lt=1)
    # Averages of other lengths, kept in the checkpoints beside the one that is drawn with.
    more_ema_decays: tuple[float, ...] = ()
    # bf16 and fp16: autocast over fp32 weights.
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    # torch.compile: needs a C++ compiler on CPU and takes minutes once; scripts/benchmark_training.py --compile says
    # how much faster it then is.
    compile: bool = False
    # Activations are computed again on the way back: a third more time, a fraction of the memory.
    gradient_checkpointing: bool = False
    # Several processes: ddp holds everything in each; fsdp splits weights, gradients, optimiser state and averages.
    strategy: Literal["ddp", "fsdp"] = "ddp"
    # Share of the data's second set (`data.mix`) in this stage, instead of its own.
    mix_share: float | None = Field(None, ge=0, le=1)
    save_every: PositiveInt = 500
    keep: PositiveInt = 2
    # Also keep the checkpoint whose steps since the one before had the lowest mean loss.
    keep_best: bool = False

    @model_validator(mode="after")
    def _averages_differ(self) -> "OptimizationConfig":
        decays = (self.ema_decay, *self.more_ema_decays)
        if len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
            raise ValueError("ema_decay and more_ema_decays must be different numbers from 0 to below 1")
        return self

    @model_validator(mode="after")
    def _matrices_are_whole(self) -> "OptimizationConfig":
        if self.optimizer == "muon" and self.strategy == "fsdp":
            raise ValueError("muon needs whole matrices, and fsdp splits them: choose adamw, or the strategy ddp")
        return self


def learning_rate(step: int, config: OptimizationConfig) -> float:
    """The learning rate of update `step` (from 0): a pure function of the step, so that a resumed run agrees."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay_steps = max(1, round(config.decay * config.steps))
    return config.learning_rate * warm * min(1.0, (config.steps - step) / decay_steps)


def micro_batches(config: OptimizationConfig, world: int) -> list[slice]:
    """How a process goes through its share of a batch: equal parts of at most `micro_batch_size` samples.

    Raises SettingError where the batch cannot be divided so.
    """
    share, rest = divmod(config.batch_size, world)
    micro = min(config.micro_batch_size or share, share)
    if rest or share == 0 or share % micro:
        raise SettingError(
            f"batch_size: {config.batch_size} samples cannot be divided equally over {world} processes"
            f"{f' in parts of {micro}' if micro else ''}; use a batch_size that is a multiple of both"
        )
    return [slice(start, start + micro) for start in range(0, share, micro)]


class LossScale:
    """fp16's dynamic scale: small gradients survive; halved where they overflow, doubled after 2,000 good updates.

    Source: Micikevicius et al. 2018, Section 3.2. In other precisions it is 1 and stays.
    """

    def __init__(self, precision: str) -> None:
        self.moves = precision == "fp16"
        self.value = FP16_SCALE if self.moves else 1.0
        self.good = 0

    def update(self, finite: bool) -> None:
        """Learn whether the gradients of an update were finite."""
        if not self.moves:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good == FP16_GROWTH_STEPS:
            self.value, self.good = self.value * 2, 0
