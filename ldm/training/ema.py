"""The exponential moving average of weights that samples are drawn from."""

import torch
from torch import Tensor, nn


class EMA:
    """fp32 shadow of a module's parameters: shadow ← d·shadow + (1−d)·weights, d = min(decay, (1+n)/(10+n)).

    The ramp is that of the reference implementation of latent diffusion, so that early averages forget the start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the module's present weights into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(module.named_parameters())
        shadows = list(self.shadow.values())
        torch._foreach_lerp_(shadows, [parameters[name].float() for name in self.shadow], 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averaged weights into `module`."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])

    def state(self) -> dict[str, Tensor]:
        """The average as tensors by parameter name."""
        return self.shadow

    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Go on from a saved average."""
        self.updates = updates
        for name, shadow in self.shadow.items():
            shadow.copy_(tensors[name])
