"""The one training loop, a generator: the caller's loop body is the visible list of side effects.

A run is a function of (config, seed, step): interrupted and resumed it ends bit for bit as one that was not, and the
number of processes changes nothing but rounding.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.cli import warn
from ldm.diffusion.noise import key
from ldm.errors import SettingError
from ldm.training import checkpoint
from ldm.training.batch import Batch, Draws
from ldm.training.fault import told
from ldm.training.optimization import OptimizationConfig, learning_rate, micro_batches
from ldm.training.parallel import keep_activations, placed, runnable
from ldm.training.signals import Stopped, StopRequest
from ldm.training.state import Trainee, averaged_weights, capture, gradient_groups, restore, trainee, whole
from ldm.training.update import Losses, Objective, Update
from ldm.training.workers import Workers, workers

Batches = Callable[[int], Iterator[Batch]]
"""This process's parts of the global batches, from a step on."""


@dataclass(frozen=True)
class Report:
    """What one training step did. `step` counts from 1 to `total`; `rate` is samples per second.

    `averages()` gives the main process the averaged weights of this moment, by name, on the CPU; every process must
    ask. Where it is `stopping`, a signal has asked all processes to stop, the state is saved, and the end must not wait
    for anything.
    """

    step: int
    total: int
    losses: dict[str, float]
    learning_rate: float
    grad_norm: float
    rate: float
    skipped: int
    averages: Callable[[], dict[str, Tensor]]
    stopping: bool = False


@dataclass(frozen=True)
class Conduct:
    """How a run may be stopped and resumed."""

    stop: StopRequest | None = None
    # On another number of processes the same batches follow, and sums are rounded differently.
    allow_world_size_change: bool = False


def train(
    module: nn.Module,
    objective: Objective,
    batches: Batches,
    config: OptimizationConfig,
    folder: Path,
    seed: int,
    conduct: Conduct = Conduct(),
    clip_apart: tuple[str, ...] = (),
) -> Iterator[Report]:
    """Train `module` in place, from the newest checkpoint in `folder`; it ends with the averaged weights, on the CPU.

    The gradients of parameters whose names begin with one of `clip_apart` are clipped by themselves. Yields a Report
    after every update. Raises NotFiniteError when too many updates have to be left out, and Stopped, after the state is
    saved, when a signal asked for it.
    """
    me = workers()
    parts = micro_batches(config, me.world)
    learner = trainee(placed(module, config, me), config)
    start = resume(learner, folder, me, conduct)
    if start < config.steps:
        checkpoint.check_space(folder, config.keep, learner.size())
        network, groups = runnable(learner.module, config, me), gradient_groups(learner, clip_apart)
        update, source = Update(learner, network, objective, config, parts, groups, me), batches(start)
    for step in range(start, config.steps):
        began = time.perf_counter()
        batch = next(source).to(me.device)
        # For what draws by itself: dropout. Behind the data, since its first batch draws a seed for its workers.
        torch.manual_seed(key(seed, step, f"rank {me.rank}"))
        buffers = [buffer.clone() for buffer in learner.module.buffers()]
        values = update.gradients(batch, Draws(seed, step, config.batch_size, me.device))
        norm, rate = update.clip(), learning_rate(step, config)
        scalars, signal = heard(values, me, conduct)
        late = learner.bad  # updates that were left out just before, one at which to save perhaps among them
        if math.isfinite(norm) and math.isfinite(scalars["loss"]):
            update.take(rate, scalars["loss"])
        else:
            update.leave_out(step + 1, buffers, told(me, batch, values))
        learner.optimizer.zero_grad(set_to_none=True)
        done = step + 1
        reached = done // config.save_every > (step - late) // config.save_every
        due = learner.bad == 0 and (reached or done == config.steps)
        if due or signal:
            save(done, learner, folder, config, me, due)
        speed, stopping = config.batch_size / (time.perf_counter() - began), bool(signal) and done < config.steps
        averages = partial(averaged_weights, learner, take=me.main)
        yield Report(done, config.steps, scalars, rate, norm, speed, learner.skipped, averages, stopping)
        if stopping:
            me.wait()  # a launcher kills the others soon after the first has left: none does before all is written
            raise Stopped(signal)
    finish(module, learner)


def heard(values: list[Losses], me: Workers, conduct: Conduct) -> tuple[dict[str, float], int]:
    """The mean of every scalar loss and the signal that asks to stop, if any: the same in all processes."""
    scalars = (name for name, value in values[0].items() if value.dim() == 0)
    names = sorted(scalars, key=lambda name: (name != "loss", name))
    means = [sum(float(value[name].detach()) for value in values) / len(values) for name in names]
    own = conduct.stop.number if conduct.stop else 0
    *means, any_signal = me.mean([*means, float(own)])
    return dict(zip(names, means, strict=True)), max(me.gathered(own)) if any_signal else 0


def resume(learner: Trainee, folder: Path, me: Workers, conduct: Conduct) -> int:
    """Restore the newest checkpoint in `folder`, which the main process chooses; returns how many steps are done."""
    found = me.agreed(checkpoint.newest(folder) if me.main else None)
    if found is None:
        return 0
    saved = checkpoint.read(found)
    before = saved.numbers["world"]
    if before != me.world and not conduct.allow_world_size_change:
        raise SettingError(
            f"{found}: saved by {before} processes, now there are {me.world}; start as many, or add "
            "--allow-world-size-change: the same batches follow, sums are rounded differently"
        )
    if before != me.world and me.main:
        warn(f"{found}: saved by {before} processes, now {me.world} go on: the same batches, sums rounded differently")
    restore(saved, learner)
    return saved.step


def save(done: int, learner: Trainee, folder: Path, config: OptimizationConfig, me: Workers, due: bool) -> None:
    """Write the state after `done` steps; where it is `due`, the window of losses ends here and may be the best."""
    best = False
    if due:
        total, count = learner.window
        mean = total / count if count else math.inf
        best = config.keep_best and mean < learner.best
        learner.best, learner.window = min(mean, learner.best), [0.0, 0.0]
    state = capture(done, learner, me.world, take=me.main)
    if me.main:
        checkpoint.save(folder, state, config.keep, best)


def finish(module: nn.Module, learner: Trainee) -> None:
    """Leave the averaged weights in the caller's module, which is whole, on the CPU and in evaluation mode."""
    averages = averaged_weights(learner)
    if learner.module is not module:
        state = learner.kept()
        module.load_state_dict({name: whole(state[name]) for name in state}, strict=False)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in averages:
                parameter.copy_(averages[name])
    keep_activations(module)
    module.to("cpu").eval()
