"""CLIP's text transformer as open_clip has it: the same modules, names and start, without its seconds of imports.

Source: Radford et al. 2021, Section 2.4. `tests/test_models.py` holds it to open_clip's own.
"""

from collections import OrderedDict

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention


class QuickGELU(nn.Module):
    """x·sigmoid(1.702 x), with which OpenAI trained its CLIP (Hendrycks & Gimpel 2016, Section 2)."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Self-attention and a feed-forward network of four times the width, each behind a LayerNorm and a residual."""

    def __init__(self, width: int, heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers: dict[str, nn.Module] = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": activation,
            "c_proj": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Float[Tensor, "b l width"], causal: bool) -> Float[Tensor, "b l width"]:
        """With `causal` no token sees the ones behind it."""
        x = x + self._attend(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))

    def _attend(self, x: Float[Tensor, "b l width"], causal: bool) -> Float[Tensor, "b l width"]:
        """`attn` without its own forward, which computes the scores of all pairs one after the other."""
        attn = self.attn
        projected = linear(x, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = rearrange(projected, "b l (three h d) -> three b h l d", three=3, h=attn.num_heads)
        heads = scaled_dot_product_attention(q, k, v, is_causal=causal)
        attended: Tensor = attn.out_proj(rearrange(heads, "b h l d -> b l (h d)"))
        return attended


class Transformer(nn.Module):
    """The blocks, one behind the other."""

    def __init__(self, width: int, heads: int, layers: int, quick: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, QuickGELU() if quick else nn.GELU()) for _ in range(layers))


def embedding(count: int, width: int) -> nn.Embedding:
    """A vector for each of `count` numbers, standard normal; on the meta device of nothing.

    There PyTorch imports its compiler to draw normal numbers: that takes a second.
    """
    weight = torch.empty(count, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else nn.init.normal_(weight), freeze=False)


class TextTower(nn.Module):
    """Embeddings, blocks and the final norm; `ClipTextEncoder` asks them one after the other."""

    def __init__(self, context_length: int, vocabulary: int, width: int, heads: int, layers: int, quick: bool) -> None:
        super().__init__()
        self.token_embedding = embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(width, heads, layers, quick)
        self.ln_final = nn.LayerNorm(width)
        self._start(width, layers)

    def _start(self, width: int, layers: int) -> None:
        """Weights at random: what is added to the residual is the smaller, the more blocks there are."""
        if self.positional_embedding.is_meta:
            return  # as in `embedding`
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            assert isinstance(block, Block)
            assert block.attn.in_proj_weight is not None
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.get_parameter("c_fc.weight"), std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.get_parameter("c_proj.weight"), std=width**-0.5 * (2 * layers) ** -0.5)
