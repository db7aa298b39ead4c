"""An update whose numbers are not finite, told in one line: which process, which timesteps, which samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.training.batch import Batch
from ldm.training.workers import Workers

NAMED = 8


@dataclass(frozen=True)
class Account:
    """What one process saw in one update: its loss, and the timestep and name of each sample that may be to blame."""

    rank: int
    loss: float
    timesteps: tuple[int, ...]
    keys: tuple[str, ...]

    def words(self) -> str:
        """The account as part of a line."""
        parts = [f"loss {self.loss:g} on rank {self.rank}"]
        if self.timesteps:
            parts.append(f"timesteps {', '.join(map(str, self.timesteps[:NAMED]))}")
        if self.keys:
            more = f" and {len(self.keys) - NAMED} more" if len(self.keys) > NAMED else ""
            parts.append(f"samples {', '.join(self.keys[:NAMED])}{more}")
        return ", ".join(parts)


def account(rank: int, batch: Batch, values: list[dict[str, Tensor]]) -> Account:
    """What a process saw: `values` are those of its micro-batches, in order.

    Where the losses of single samples are known ("error"), only those that are not finite are named.
    """
    loss = sum(float(value["loss"].detach()) for value in values) / len(values)
    errors, timesteps = (
        torch.cat([value[name].detach().cpu() for value in values]) if name in values[0] else None
        for name in ("error", "timestep")
    )
    blamed = list(range(len(batch)))
    if errors is not None and not torch.isfinite(errors).all():
        blamed = torch.nonzero(~torch.isfinite(errors))[:, 0].tolist()
    times = tuple(int(timesteps[i]) for i in blamed) if timesteps is not None else ()
    return Account(rank, loss, times, tuple(batch.keys[i] for i in blamed) if batch.keys else ())


def told(me: Workers, batch: Batch, values: list[dict[str, Tensor]]) -> str:
    """The accounts of the processes whose loss was not finite, or of all where only the gradient was not."""
    accounts = me.gathered(account(me.rank, batch, values))
    guilty = [a for a in accounts if not torch.isfinite(torch.tensor(a.loss))]
    if guilty:
        return "; ".join(a.words() for a in guilty)
    return "the loss was finite, its gradient was not: " + "; ".join(a.words() for a in accounts)
