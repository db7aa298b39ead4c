"""The processes of one run: who this one is, and what they say to one another (gloo on CPUs, NCCL on GPUs).

`accelerate launch`, `torchrun` and a plain call all end here; one process talks to nobody.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor

from ldm.errors import SettingError

T = TypeVar("T")
PATIENCE = 600.0


@dataclass(frozen=True)
class Workers:
    """This process among `world`, and the device it computes on."""

    rank: int
    world: int
    device: torch.device
    # Seconds for which a process that says nothing is waited for.
    patience: float = PATIENCE

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """The samples of a global batch that are this process's. Raises SettingError where they are not equal."""
        if batch_size % self.world:
            raise SettingError(
                f"batch_size: {batch_size} samples cannot be divided over {self.world} processes; use a multiple"
            )
        size = batch_size // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def mean(self, values: list[float]) -> list[float]:
        """The mean of each number over all processes; not finite in all of them where it is not in one."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64 if self.device.type == "cpu" else torch.float32)
        total = total.to(self.device)
        torch.distributed.all_reduce(total)
        means: list[float] = (total / self.world).tolist()
        return means

    def mean_tensor(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes; no gradient flows."""
        if self.world > 1:
            value = value.detach().clone()
            torch.distributed.all_reduce(value)
            value /= self.world
        return value

    def agreed(self, value: T) -> T:
        """What the main process says."""
        if self.world == 1:
            return value
        said: list[Any] = [value]
        torch.distributed.broadcast_object_list(said, src=0)
        return said[0]

    def gathered(self, value: T) -> list[T]:
        """What each process says, by rank."""
        if self.world == 1:
            return [value]
        said: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(said, value)
        return said

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            torch.distributed.barrier()


def workers(timeout_seconds: float | None = None) -> Workers:
    """Join the other processes, at the first call; afterwards only say who this one is.

    A process that hears nothing from the others for `timeout_seconds`, 600 unless said, ends.
    """
    waits = timedelta(seconds=timeout_seconds or PATIENCE)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=waits)
    if timeout_seconds is not None:
        state.patience = timeout_seconds  # of all its instances, as whatever it has
    return Workers(state.process_index, state.num_processes, state.device, getattr(state, "patience", PATIENCE))


class _Sum(torch.autograd.Function):
    """The sum over all processes, and in the other direction the sum of their gradients."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, through which gradients flow to all of them."""
    return _Sum.apply(value) if workers().world > 1 else value


def rows_of_all(rows: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
    """The rows of all processes in order of rank, also where their numbers differ; gradients flow to all of them."""
    me = workers()
    if me.world == 1:
        return rows
    counts = me.gathered(len(rows))
    before = sum(counts[: me.rank])
    padded = torch.nn.functional.pad(rows, (0, 0, before, sum(counts) - before - len(rows)))
    return summed(padded)
