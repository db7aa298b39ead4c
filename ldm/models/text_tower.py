"""CLIP's text transformer as open_clip has it: the same modules, names and start, without its seconds of imports.

Source: Radford et al. 2021, Section 2.4. `tests/test_models.py` holds it to open_clip's own.
"""

from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn


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

    def forward(
        self, x: Float[Tensor, "b l width"], attn_mask: Float[Tensor, "l l"] | None
    ) -> Float[Tensor, "b l width"]:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The blocks, one behind the other."""

    def __init__(self, width: int, heads: int, layers: int, quick: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, QuickGELU() if quick else nn.GELU()) for _ in range(layers))


def embedding(count: int, width: int) -> nn.Embedding:
    """A vector for each of `count` numbers, standard normal; on the meta device of nothing.

    There PyTorch imports its compiler to draw normal numbers, and to take half a matrix: that takes a second.
    """
    weight = torch.empty(count, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else nn.init.normal_(weight), freeze=False)


def causal_mask(length: int, device: torch.device | str | None = None) -> Float[Tensor, "l l"]:
    """What is added to the scores of attention, so that no token sees the ones behind it."""
    mask = torch.full((length, length), float("-inf"), device=device)
    return mask if mask.is_meta else mask.triu(1)  # as in `embedding`


class TextTower(nn.Module):
    """Embeddings, blocks and the final norm; `ClipTextEncoder` asks them one after the other."""

    attn_mask: Tensor

    def __init__(self, context_length: int, vocabulary: int, width: int, heads: int, layers: int, quick: bool) -> None:
        super().__init__()
        self.token_embedding = embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(width, heads, layers, quick)
        self.ln_final = nn.LayerNorm(width)
        self.register_buffer("attn_mask", causal_mask(context_length), persistent=False)
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
