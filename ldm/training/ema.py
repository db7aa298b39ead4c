"""The exponential moving average of weights that samples are drawn from."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA:
    """fp32 shadow of a module's trained parameters: shadow ← d·shadow + (1−d)·weights, d = min(decay, (1+n)/(10+n)).

    The ramp is that of the reference implementation of latent diffusion, so that early averages forget the start.
    Of sharded parameters each process averages its own shard.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
        self.shadow = {name: local(p.detach()).float().clone() for name, p in trained}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the module's present weights into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(module.named_parameters())
        shadows = list(self.shadow.values())
        torch._foreach_lerp_(shadows, [local(parameters[name]).float() for name in self.shadow], 1.0 - decay)
