"""One update: gradients of a global batch, accumulated and averaged over processes, taken in or left out."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm.cli import warn
from ldm.errors import NotFiniteError
from ldm.training.batch import Batch, Draws
from ldm.training.optimization import OptimizationConfig
from ldm.training.parallel import without_exchange
from ldm.training.state import Trainee
from ldm.training.workers import Workers

MAX_BAD_STEPS = 5
LATELY = 1000
MAX_BAD_LATELY = 10
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Losses = dict[str, Tensor]
"""Named scalars; "loss" is minimised. With one number a sample: "error" and "timestep", to name what went wrong."""
Objective = Callable[[nn.Module, Batch, Draws], Losses]


@dataclass(frozen=True)
class Update:
    """What no step changes: who learns, what is called and minimised, and how a batch is divided."""

    learner: Trainee
    network: nn.Module
    objective: Objective
    config: OptimizationConfig
    parts: list[slice]
    groups: list[list[nn.Parameter]]
    me: Workers

    def gradients(self, batch: Batch, draws: Draws) -> list[Losses]:
        """Accumulate the gradient of this process's share of a batch; returns the losses of each micro-batch."""
        offset, values = self.me.rank * len(batch), []
        dtype = PRECISIONS[self.config.precision]
        for part in self.parts:
            rows = slice(offset + part.start, offset + part.stop)
            with without_exchange(self.network, last=part is self.parts[-1]):
                with torch.autocast(self.me.device.type, dtype, enabled=dtype != torch.float32):
                    value = self.objective(self.network, batch.part(part), draws.part(rows))
                (value["loss"] * (self.learner.scale.value / len(self.parts))).backward()
            values.append(value)
        return values

    def clip(self) -> float:
        """Clip each group's gradient; returns the norm of the first before that, or nan if one is not finite."""
        if self.learner.scale.value != 1.0:
            gradients = [p.grad for group in self.groups for p in group if p.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / self.learner.scale.value)
        found = [torch.nn.utils.clip_grad_norm_(group, self.config.max_grad_norm) for group in self.groups]
        norms = [float(norm.full_tensor() if isinstance(norm, DTensor) else norm) for norm in found]
        return norms[0] if all(math.isfinite(norm) for norm in norms) else math.nan

    def take(self, rate: float, loss: float) -> None:
        """Step with the gradients that are there."""
        for group in self.learner.optimizer.param_groups:
            group["lr"] = rate
        self.learner.optimizer.step()
        for average in self.learner.averages:
            average.update(self.learner.module)
        self.learner.scale.update(finite=True)
        self.learner.bad = 0
        self.learner.window = [self.learner.window[0] + loss, self.learner.window[1] + 1]

    def leave_out(self, step: int, buffers: list[Tensor], account: str) -> None:
        """Step over an update that is not finite, say so, and put back the buffers that its forward pass changed.

        Raises NotFiniteError where this can only go on: too many in a row or of the last thousand, or fp16's scale
        below 1. An overflow that lowers the scale is how fp16 finds it, and no fault. `step` counts from 1.
        """
        learner, words = self.learner, f"step {step}: {account}"
        for buffer, before in zip(learner.module.buffers(), buffers, strict=True):
            buffer.copy_(before)
        learner.scale.update(finite=False)
        learner.skipped += 1
        if not learner.scale.moves:
            learner.bad += 1
            learner.bad_lately = [bad for bad in learner.bad_lately if bad > step - LATELY] + [step]
        if self.me.main:
            warn(f"{words}; this update is skipped, the {learner.skipped}. of the run")
        if learner.bad >= MAX_BAD_STEPS:
            raise NotFiniteError(
                f"{words}: {learner.bad} updates in a row were not finite; lower the learning rate or look at these "
                "samples; the checkpoint before them is kept"
            )
        if len(learner.bad_lately) > MAX_BAD_LATELY:
            raise NotFiniteError(
                f"{words}: {len(learner.bad_lately)} of the last {LATELY} updates were not finite; lower the learning "
                "rate or look at these samples; the last checkpoint is kept"
            )
        if learner.scale.value < 1.0:
            raise NotFiniteError(f"{words}: fp16's loss scale fell below 1; use precision=bf16 or no")
