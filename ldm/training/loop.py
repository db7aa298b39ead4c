"""The one training loop, a generator: the caller's loop body is the visible list of side effects."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ldm.cli import warn
from ldm.config import Config
from ldm.errors import NotFiniteError
from ldm.training import checkpoint
from ldm.training.ema import EMA

MAX_BAD_STEPS = 5


class OptimizationConfig(Config):
    """How long and how fast one stage learns (AdamW; rate: linear warm-up, constant, linear decay to zero)."""

    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt = 100
    # The last part of the run, as a fraction of its steps, over which the learning rate falls to zero.
    decay: float = Field(0.5, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0
    ema_decay: float = Field(0.999, ge=0, lt=1)
    # bf16: autocast over fp32 weights.
    precision: Literal["no", "bf16"] = "bf16"
    # torch.compile: needs a C++ compiler on CPU, takes minutes once, and then runs up to 1.4× as fast.
    compile: bool = False
    save_every: PositiveInt = 500


@dataclass(frozen=True)
class Report:
    """What one training step did. `step` counts from 1 to `total`; `rate` is samples per second."""

    step: int
    total: int
    losses: dict[str, float]
    learning_rate: float
    grad_norm: float
    rate: float
    ema: EMA


Losses = dict[str, Tensor]
Batch = tuple[Any, ...]


def learning_rate(step: int, config: OptimizationConfig) -> float:
    """The learning rate of update `step` (from 0): a pure function of the step, so that a resumed run agrees."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay_steps = max(1, round(config.decay * config.steps))
    return config.learning_rate * warm * min(1.0, (config.steps - step) / decay_steps)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one training step, a function of (seed, step) alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def train(
    module: nn.Module,
    losses: Callable[[nn.Module, Batch, torch.Generator], Losses],
    batches: Callable[[int], Iterator[Batch]],
    config: OptimizationConfig,
    folder: Path,
    seed: int,
) -> Iterator[Report]:
    """Train `module` in place, from the newest checkpoint in `folder`; it ends with the averaged weights, on the CPU.

    `losses(module, batch, generator)` returns named scalars; the one named "loss" is minimised.
    `batches(step)` gives the batches from that step on. Yields a Report after every update.
    Raises NotFiniteError when MAX_BAD_STEPS updates in a row have to be skipped.
    """
    accelerator = Accelerator()
    device = accelerator.device
    module.to(device).train()
    ema = EMA(module, config.ema_decay)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    start = 0
    saved = checkpoint.newest(folder)
    if saved is not None:
        checkpoint.restore(saved, module, ema, optimizer)
        start = saved.step
    runnable = compiled(module) if config.compile else module
    bad = 0
    source = batches(start)
    for step in range(start, config.steps):
        began = time.perf_counter()
        batch = tuple(item.to(device) if isinstance(item, Tensor) else item for item in next(source))
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            values = losses(runnable, batch, step_generator(seed, step))
        accelerator.backward(values["loss"])
        norm = float(accelerator.clip_grad_norm_(module.parameters(), config.max_grad_norm))
        if math.isfinite(norm):
            optimizer.step()
            ema.update(module)
            bad = 0
        else:
            bad += 1
            warn(f"step {step + 1}: the gradient is not finite; this update is skipped")
        optimizer.zero_grad(set_to_none=True)
        if bad >= MAX_BAD_STEPS:
            raise NotFiniteError(
                f"step {step + 1}: {bad} updates in a row were not finite; lower the learning rate, "
                f"the checkpoint before them is kept in {folder}"
            )
        done = step + 1
        if bad == 0 and (done % config.save_every == 0 or done == config.steps):
            checkpoint.save(folder, checkpoint.capture(done, module, ema, optimizer))
        seconds = time.perf_counter() - began
        scalars = {name: float(value.detach()) for name, value in values.items()}
        yield Report(done, config.steps, scalars, rate, norm, config.batch_size / seconds, ema)
    ema.copy_to(module)
    module.to("cpu").eval()


def compiled(module: nn.Module) -> nn.Module:
    """`module` behind torch.compile, or itself, with a warning, on a machine without a compiler."""
    if not torch.cuda.is_available() and shutil.which("g++") is None:
        warn("compile: no C++ compiler (g++) found; training runs uncompiled, which takes longer")
        return module
    return torch.compile(module, dynamic=False)  # type: ignore[return-value]
