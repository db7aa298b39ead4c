"""The one door to attention kernels, and the attention layer that the networks share."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ldm.cli import warn
from ldm.nn.cpu import (
    FEW_KEYS,
    MANY_KEYS,
    attention_as_products,
    attention_in_blocks,
    draws_on_cpu,
    learns_on_cpu,
)

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(
    query: Float[Tensor, "b heads n d"], key: Float[Tensor, "b heads m d"], value: Float[Tensor, "b heads m d"]
) -> Float[Tensor, "b heads n d"]:
    """softmax(q kᵀ / √d) v per head (Vaswani et al. 2017, Equation 1).

    PyTorch's kernels, of which it compiles; on CUDA in half precision those of xformers, where it is installed and
    passes its test; on CPUs in bf16 plain products where those are faster: in training of few keys, otherwise of many,
    in blocks.
    """
    # The compiler would follow the search for xformers, and break there.
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not torch.compiler.is_compiling():
        kernel = xformers_kernel()
        if kernel is not None:
            return kernel(query, key, value)
    if query.dtype == torch.bfloat16 and draws_on_cpu(query) and key.shape[2] >= MANY_KEYS:
        return attention_in_blocks(query, key, value)
    if query.dtype == torch.bfloat16 and learns_on_cpu(query) and key.shape[2] <= FEW_KEYS:
        return attention_as_products(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def backend(device: torch.device, dtype: torch.dtype) -> str:
    """Whose attention is used on a GPU, in words."""
    half = dtype in (torch.float16, torch.bfloat16)
    return "xformers" if device.type == "cuda" and half and xformers_kernel() is not None else "PyTorch"


@cache
def xformers_kernel() -> Kernel | None:
    """The kernel of xformers, or None where it is not installed or, with a warning, where it is not right."""
    try:
        from xformers.ops import memory_efficient_attention
    except (ImportError, OSError):
        return None

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = (rearrange(tensor, "b heads n d -> b n heads d") for tensor in (query, key, value))
        return rearrange(memory_efficient_attention(*rows), "b n heads d -> b heads n d")

    if agrees(kernel, torch.device("cuda"), torch.float16):
        return kernel
    warn("xformers: its attention does not run or not agree with PyTorch's on this GPU; PyTorch's is used")
    return None


def agrees(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel gives PyTorch's result and gradients, on small inputs, to the precision of its dtype."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            known, tried = (_trial(compute, device, dtype) for compute in (F.scaled_dot_product_attention, kernel))
        except (RuntimeError, NotImplementedError):
            return False
    tolerance = 8 * torch.finfo(dtype).eps
    return all(
        a is not None and b is not None and bool(((a - b).abs().max() <= tolerance * a.abs().max()).item())
        for a, b in zip(known, tried, strict=True)
    )


def _trial(compute: Kernel, device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
    """Output and gradients of a kernel on fixed small inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 4, n, 64, generator=generator).to(device, dtype).requires_grad_() for n in (64, 80, 80)]
    output = compute(*inputs)
    output.square().sum().backward()
    return [output, *(tensor.grad for tensor in inputs)]


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
