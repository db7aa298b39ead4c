"""Muon: a matrix moves equally far in all directions that its gradients point to, however often they do.

Where AdamW scales every number by itself, Muon replaces a weight's momentum by the nearest orthogonal matrix, so that
what seldom shows in the gradients is learned as fast as what often does. What is no matrix is AdamW's, and so are the
fused projections in the attention of text towers, which are three matrices in one.
"""

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm.training.adamw import AdamW

MOMENTUM = 0.95
# Five rounds of this polynomial bring all but the smallest singular values to between 0.7 and 1.2 (Jordan et al. 2024).
ROUNDS = 5
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
# The update of a number is then about as large as AdamW's, and so are rates (Liu et al. 2025, 2502.16982, Section 2.2).
LIKE_ADAMW = 0.2
# Fewer channels are those of latents or colours, in the first and the last layer.
LEAST_CHANNELS = 16
TINY = 1e-7


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for groups marked `matrices`, with decoupled weight decay; AdamW for the others."""

    def _init_group(self, group: Any, *lists: list[Tensor]) -> Any:
        """What AdamW updates of a group: of matrices, nothing."""
        return False if group.get("matrices") else super()._init_group(group, *lists)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all weights that have a gradient."""
        result = super().step(closure)
        for group in self.param_groups:
            if group.get("matrices"):
                self._step_matrices(group)
        return result

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Matrices of one shape at a time, since one batched product is faster than many small ones."""
        alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                alike[as_matrix(weight).shape].append(weight)
        for shape, weights in alike.items():
            directions = orthogonal(torch.stack([self._direction(weight) for weight in weights]))
            rate = group["lr"] * LIKE_ADAMW * max(shape) ** 0.5
            for weight, direction in zip(weights, directions, strict=True):
                weight.mul_(1.0 - group["lr"] * group["weight_decay"])
                weight.sub_(like(direction, weight), alpha=rate)

    def _direction(self, weight: nn.Parameter) -> Float[Tensor, "o i"]:
        """Nesterov's momentum of a weight's gradients, as a matrix."""
        assert weight.grad is not None
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(weight.grad, 1.0 - MOMENTUM)
        return as_matrix(weight.grad.lerp(momentum, MOMENTUM))


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """What Muon is made for: weights that learn, of linear layers and convolutions of enough channels on both sides."""
    layers = (layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))
    learn = {layer.weight: None for layer in layers if layer.weight.requires_grad}  # in order, and those shared once
    return [w for w in learn if isinstance(w, nn.Parameter) and min(w.shape[:2]) >= LEAST_CHANNELS]


def parted(module: nn.Module) -> list[dict[str, Any]]:
    """What learns, as the optimizer's groups: first what is AdamW's, then the matrices."""
    of_muon = matrices(module)
    known = {id(weight) for weight in of_muon}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
    return [{"params": rest}, {"params": of_muon, "matrices": True}]


def as_matrix(weight: Float[Tensor, "o i *kernel"]) -> Float[Tensor, "o n"]:
    """A weight with everything that an output reads in one row; of convolutions in the order of channels last."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight


def like(matrix: Float[Tensor, "o n"], weight: Float[Tensor, "o i *kernel"]) -> Float[Tensor, "o i *kernel"]:
    """The inverse of `as_matrix`."""
    if weight.dim() < 4:
        return matrix
    return matrix.unflatten(1, (*weight.shape[2:], weight.shape[1])).permute(0, 3, 1, 2)


def orthogonal(found: Float[Tensor, "k o n"]) -> Float[Tensor, "k o n"]:
    """About U Vᵀ of matrices U S Vᵀ, by Newton-Schulz iterations in bf16, which they are made to bear."""
    tall = found.shape[1] > found.shape[2]
    x = found.mT if tall else found
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=TINY)).bfloat16()
    first, second, third = POLYNOMIAL
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return (x.mT if tall else x).to(found.dtype)
