"""Attention among fewer tokens: those that are alike ask and answer as one.

Source: Token Merging for Fast Stable Diffusion (Bolya & Hoffman 2023). The result changes with what is merged.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor


def among_fewer(
    attend: Callable[[Tensor], Tensor], x: Float[Tensor, "b n c"], width: int, share: float
) -> Float[Tensor, "b n c"]:
    """`attend` of the pixels of a state `width` wide, row by row, of which a `share` of 0 to 0.75 goes into others.

    The first pixel of every window of 2×2 stays (Section 4.1; there it is one at random). Of the others, those go that
    are most like one that stays, by the cosine: what stays becomes the mean of all that it stands for, and they get
    its answer.
    """
    if share == 0.0:
        return attend(x)
    stay, rest = partition(x.shape[1], width, x.device)
    stays, others = x[:, stay], x[:, rest]
    nearness, nearest = (F.normalize(others, dim=-1) @ F.normalize(stays, dim=-1).mT).max(dim=-1)
    order = nearness.argsort(dim=-1, descending=True, stable=True)
    count = min(round(share * x.shape[1]), len(rest))
    gone, left = order[:, :count], order[:, count:]
    into = nearest.gather(1, gone)
    means = stays.scatter_reduce(1, per_channel(into, x), picked(others, gone), "mean")
    answers = attend(torch.cat([means, picked(others, left)], dim=1))
    of_stays, of_left = answers.split([len(stay), len(rest) - count], dim=1)
    of_others = torch.empty_like(others).scatter(1, per_channel(left, x), of_left)
    of_others = of_others.scatter(1, per_channel(gone, x), picked(of_stays, into))
    # Back in the order of the pixels.
    place = torch.cat([stay, rest]).argsort()
    return torch.cat([of_stays, of_others], dim=1)[:, place]


def partition(count: int, width: int, device: torch.device) -> tuple[Int[Tensor, " s"], Int[Tensor, " r"]]:
    """The pixels that stay, the first of every window of 2×2, and the rest."""
    grid = rearrange(torch.arange(count, device=device), "(h w) -> h w", w=width)
    flat = "h w -> (h w)"
    rest = [rearrange(part, flat) for part in (grid[::2, 1::2], grid[1::2])]
    return rearrange(grid[::2, ::2], flat), torch.cat(rest)


def per_channel(index: Int[Tensor, "b k"], like: Float[Tensor, "b n c"]) -> Int[Tensor, "b k c"]:
    """The same index for every channel."""
    return repeat(index, "b k -> b k c", c=like.shape[-1])


def picked(of: Float[Tensor, "b n c"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    """The tokens of every image that its index names."""
    return of.gather(1, per_channel(index, of))
