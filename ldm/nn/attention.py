"""The one door to attention kernels, and the attention layer that the networks share."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


def attention(
    query: Float[Tensor, "b heads n d"], key: Float[Tensor, "b heads m d"], value: Float[Tensor, "b heads m d"]
) -> Float[Tensor, "b heads n d"]:
    """softmax(q kᵀ / √d) v per head (Vaswani et al. 2017, Equation 1)."""
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Multi-head attention from `width` channels to `context_width` channels; without a context, to itself.

    Parameters carry the names of the diffusers library (`to_q`, `to_k`, `to_v`, `to_out.0`).
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, qkv_bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        context_width = context_width or width
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_v = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self, x: Float[Tensor, "b n width"], context: Float[Tensor, "b m context"] | None = None
    ) -> Float[Tensor, "b n width"]:
        context = x if context is None else context
        query, key, value = (
            rearrange(projected, "b n (heads d) -> b heads n d", heads=self.heads)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](rearrange(attention(query, key, value), "b heads n d -> b n (heads d)"))
