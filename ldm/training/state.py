"""Everything that a training run is at one step, taken out as plain tensors and put back exactly.

Random numbers and the place in the data are no part of it: both are functions of (seed, step).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.errors import ModelError, SettingError
from ldm.training.adamw import AdamW
from ldm.training.checkpoint import Checkpoint
from ldm.training.ema import EMA
from ldm.training.muon import Muon, parted
from ldm.training.optimization import LossScale, OptimizationConfig

BYTES_A_NUMBER = 4


@dataclass
class Trainee:
    """What learns, and what it is learned with."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    averages: tuple[EMA, ...]
    scale: LossScale
    # Updates that were not finite and therefore left out: in a row, the steps of those lately, and in all.
    bad: int = 0
    bad_lately: list[int] = field(default_factory=list)
    skipped: int = 0
    # Losses since the last checkpoint, their sum and number, and the lowest mean of such a window.
    window: list[float] = field(default_factory=lambda: [0.0, 0.0])
    best: float = math.inf

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def kept(self) -> dict[str, Tensor]:
        """What of the module is saved: all that learns, and the buffers, which steps change too."""
        trained = self.trained
        frozen = {name for name, _ in self.module.named_parameters()} - trained.keys()
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in frozen}

    def size(self) -> int:
        """Bytes of one checkpoint: weights, averages and two moments."""
        return BYTES_A_NUMBER * (3 + len(self.averages)) * sum(p.numel() for p in self.trained.values())


def trainee(module: nn.Module, config: OptimizationConfig) -> Trainee:
    """A module with a fresh optimizer and fresh averages. Raises SettingError where nothing of it learns."""
    averages = tuple(EMA(module, decay) for decay in (config.ema_decay, *config.more_ema_decays))
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise SettingError("model: it has no parameter that learns; choose what is trained")
    kind, learning = (Muon, parted(module)) if config.optimizer == "muon" else (AdamW, trained)
    optimizer = kind(
        learning, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    return Trainee(module, optimizer, averages, LossScale(config.precision))


def average_name(index: int, average: EMA) -> str:
    """The file of an average in a checkpoint: the first is the one that is drawn with."""
    return "ema" if index == 0 else f"ema-{average.decay:g}"


def whole(tensor: Tensor, like: Tensor | None = None, take: bool = True) -> Tensor:
    """All of a tensor, on the CPU; every process must ask. `like` says how a local shard is part of a whole.

    A process that helps the others and does not `take` it gets nothing, and its host no copy.
    """
    if isinstance(like, DTensor):
        tensor = DTensor.from_local(
            tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu() if take else tensor.new_empty(0, device="cpu")


def averaged_weights(of: Trainee, index: int = 0, take: bool = True) -> dict[str, Tensor]:
    """The averaged parameters, whole, by name; every process must ask, and one that does not `take` gets no numbers."""
    trained = of.trained
    return {name: whole(shadow, trained[name], take) for name, shadow in of.averages[index].shadow.items()}


def capture(step: int, of: Trainee, world: int, take: bool = True) -> Checkpoint:
    """The state after `step` updates; every process must ask, and one that does not `take` gets no numbers."""
    moments = {
        f"{name}.{field_name}": whole(value, take=take)
        for name, parameter in of.trained.items()
        for field_name, value in of.optimizer.state.get(parameter, {}).items()
    }
    tensors = {"model": {name: whole(tensor, take=take) for name, tensor in of.kept().items()}, "optimizer": moments}
    for index, average in enumerate(of.averages):
        tensors[average_name(index, average)] = averaged_weights(of, index, take)
    numbers: dict[str, Any] = {
        "world": world,
        "ema_updates": of.averages[0].updates,
        "loss_scale": [of.scale.value, of.scale.good],
        "bad": of.bad,
        "bad_lately": list(of.bad_lately),
        "skipped": of.skipped,
        "window": list(of.window),
        "best": of.best,
    }
    return Checkpoint(step, tensors, numbers)


@torch.no_grad()
def restore(saved: Checkpoint, into: Trainee) -> None:
    """Put a captured state back, exactly. Raises ModelError where it is another model's."""
    kept, trained = into.kept(), into.trained
    _refuse_other("model", kept, saved.tensors["model"])
    for name, tensor in kept.items():
        _fill(tensor, saved.tensors["model"][name])
    for index, average in enumerate(into.averages):
        tensors = saved.tensors.get(average_name(index, average), {})
        _refuse_other(average_name(index, average), average.shadow, tensors)
        for name, shadow in average.shadow.items():
            shadow.copy_(_sharded_as(trained[name], tensors[name]))
        average.updates = saved.numbers["ema_updates"]
    for name, parameter in trained.items():
        prefix = f"{name}."
        moments = {k.removeprefix(prefix): v for k, v in saved.tensors["optimizer"].items() if k.startswith(prefix)}
        if moments:
            into.optimizer.state[parameter] = {key: _moment(parameter, value) for key, value in moments.items()}
    into.scale.value, into.scale.good = saved.numbers["loss_scale"]
    into.bad, into.skipped = saved.numbers["bad"], saved.numbers["skipped"]
    into.bad_lately = list(saved.numbers.get("bad_lately", []))
    into.window, into.best = list(saved.numbers["window"]), saved.numbers["best"]


def _refuse_other(what: str, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    different = sorted(wanted.keys() ^ found.keys())
    if different:
        raise ModelError(
            f"checkpoint: its {what} has {len(found)} tensors, expected {len(wanted)}, the first that differs is "
            f"{different[0]}; use the recipe that it was made with, or another --run-dir"
        )


def _fill(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor, sharded or not, its value."""
    target = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    target.copy_(_sharded_as(tensor, value))


def _sharded_as(like: Tensor, value: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of `like`."""
    if not isinstance(like, DTensor):
        return value
    # Every process read the same file: no source rank, so nothing is sent.
    part = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return part.to_local()


def _moment(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A tensor of the optimizer where, and sharded as, its parameter is; the step counter is one number.

    It also lies in memory as its parameter does: fused AdamW pairs them by place, not by index.
    """
    value = value.to(parameter.device)
    if value.shape != parameter.shape:
        return value
    if not isinstance(parameter, DTensor):
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def gradient_groups(of: Trainee, separate: tuple[str, ...]) -> list[list[nn.Parameter]]:
    """The parameters whose gradients are clipped together: first the rest, then those of each prefix in `separate`."""
    trained = of.trained
    groups = [[p for name, p in trained.items() if not name.startswith(separate)]]
    return groups + [[p for name, p in trained.items() if name.startswith(prefix)] for prefix in separate]
