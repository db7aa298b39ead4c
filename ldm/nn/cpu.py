"""What layers compute when they draw on a CPU: the numbers of training, up to rounding, from less work and memory."""

from collections.abc import Sequence
from itertools import pairwise, product
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ldm.machine import single_threads

# Scores of attention in a block, and numbers in a band of rows: so many that they stay in the caches. From so many
# blocks on for each thread, threads do not share them.
SCORES = 2**21
MANY_BLOCKS = 32
BAND = 3 * 2**20
# From so many keys on two products and a softmax are faster than PyTorch's fused kernel.
MANY_KEYS = 128
# In training, where that kernel's way back is slow in bf16, up to so many.
FEW_KEYS = 256
# Vector registers hold 16 numbers of fp32: products whose results are a multiple of 16 wide leave none of them empty.
LANES = 16
# From so many numbers of an image on its state is convolved in bands, and from so many pixels on weights are folded.
# Not of a batch: an image does not depend on those beside it.
LARGE = 2**23
MANY_PIXELS = 256
FOLDED_TOGETHER = 64  # output channels


class TwoEnds:
    """Memory for large states each of which is computed from the one before: by turns they lie at its two ends.

    So no more is needed than for the largest pair, and there are no holes between them.
    """

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype) -> None:
        self._memory = torch.empty(max(a + b for a, b in pairwise((0, *sizes))), dtype=dtype, device="cpu")
        self._low = False

    def next(self, shape: Sequence[int]) -> Float[Tensor, "b c h w"]:
        """Room for the next state, laid out channels_last; the state before the last one is gone."""
        batch, channels, height, width = shape
        size, self._low = prod(shape), not self._low
        start = 0 if self._low else len(self._memory) - size
        return self._memory[start : start + size].view(batch, height, width, channels).permute(0, 3, 1, 2)


def draws_on_cpu(x: Tensor) -> bool:
    """Whether only the result counts: the device is a CPU, and nobody asks for gradients."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def large(shape: Sequence[int]) -> bool:
    """Whether states of that shape, image by image, are so large that they are computed in bands."""
    return prod(shape[1:]) >= LARGE


def learns_on_cpu(x: Tensor) -> bool:
    """Whether the device is a CPU, and somebody asks for gradients."""
    return x.device.type == "cpu" and torch.is_grad_enabled()


def attention_as_products(
    query: Float[Tensor, "b heads n d"], key: Float[Tensor, "b heads m d"], value: Float[Tensor, "b heads m d"]
) -> Float[Tensor, "b heads n d"]:
    """Attention as two products and a softmax, with gradients; all scores are in memory, rounded to their dtype."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return scores.softmax(dim=-1) @ value


def attention_in_blocks(
    query: Float[Tensor, "b heads n d"], key: Float[Tensor, "b heads m d"], value: Float[Tensor, "b heads m d"]
) -> Float[Tensor, "b heads n d"]:
    """Attention for some heads and rows of queries at a time, as two products and a softmax.

    In bf16 a CPU multiplies matrices at twice the speed of fp32, which PyTorch's fused kernel does not reach. The
    price: the scores are rounded to bf16 too. Of many blocks each is the work of one thread: threads that share a block
    wait for one another at each of its operations, and that is long where other programs need the cores. Not of few:
    PyTorch's threads turn in circles for 3 ms behind their last work, and hold a core.
    """
    batch, heads, rows, width = query.shape
    columns, mode = key.shape[2], torch.is_inference_mode_enabled()
    # Each head's rows behind one another: products copy what lies otherwise, for every block again.
    query, key = (query * width**-0.5).contiguous(), key.contiguous()
    value = F.pad(value, (0, -width % LANES)).contiguous()
    # Laid out as the projection behind it reads it.
    out = query.new_empty(batch, rows, heads, width).transpose(1, 2)
    together = min(heads, max(1, SCORES // (rows * columns)))
    height = min(rows, max(1, SCORES // (together * columns)))

    def block(place: tuple[int, int, int]) -> None:
        image, head, row = place
        some, part = slice(head, head + together), slice(row, row + height)
        with torch.inference_mode(mode), torch.no_grad():
            scores = torch.bmm(query[image, some, part], key[image, some].mT)
            torch.softmax(scores, dim=-1, out=scores)
            out[image, some, part] = torch.bmm(scores, value[image, some])[..., :width]

    blocks = list(product(range(batch), range(0, heads, together), range(0, rows, height)))
    threads = torch.get_num_threads()
    list(single_threads(threads).map(block, blocks) if len(blocks) >= MANY_BLOCKS * threads else map(block, blocks))
    return out


def gated(x: Float[Tensor, "... i"], proj: nn.Linear) -> Float[Tensor, "... o"]:
    """GEGLU with a product for each half: GELU is several times as fast on numbers that lie behind one another."""
    value, gate = proj.weight.chunk(2)
    value_bias, gate_bias = proj.bias.chunk(2)
    activated = F.gelu(F.linear(x, gate, gate_bias))
    return F.linear(x, value, value_bias).mul_(activated)


def folded(weight: Float[Tensor, "o i 3 3"], down: int, right: int) -> Float[Tensor, "o i 2 2"]:
    """The weights for the upper or lower, left or right of the four pixels that one pixel becomes.

    Added in fp32, some at a time: all of them would be several times what is left of them.
    """
    parts = []
    for part in weight.split(FOLDED_TOGETHER):
        made = part.permute(0, 2, 3, 1).float()
        for axis, second in ((1, down), (2, right)):
            before, here, after = made.unbind(axis)
            made = torch.stack((before + here, after) if second else (before, here + after), axis)
        parts.append(made.to(weight.dtype).permute(0, 3, 1, 2))
    return torch.cat(parts)


def convolved(
    norm: nn.GroupNorm, conv: nn.Conv2d, x: Float[Tensor, "b c h w"], out: Float[Tensor, "b o h w"]
) -> Float[Tensor, "b o h w"]:
    """conv(SiLU(norm(x))) of a 3×3 convolution, a band of rows at a time, written into `out`, which may be `x`."""
    weight, bias, height = norm.weight.float(), norm.bias.float(), x.shape[2]
    for image, result in zip(x.split(1), out.split(1), strict=True):
        mean, variance = statistics(norm, image)
        # Before everything that comes and goes, so that it does not lie in its way.
        late = torch.empty_like(result[:, :, :1])
        for top, bottom in bands(image):
            first, last = max(top - 1, 0), min(bottom + 1, height)
            band = F.batch_norm(image[:, :, first:last], mean, variance, weight, bias, eps=norm.eps)
            # `image` may be `result`: a band's last row is written when the next band has read what was there.
            if top:
                result[:, :, top - 1 : top] = late
            band = F.silu(band, inplace=True)
            if first == top or last == bottom:
                band = F.pad(band, (0, 0, int(first == top), int(last == bottom)))
            made = F.conv2d(band, conv.weight, conv.bias, padding=(0, 1))
            result[:, :, top : bottom - 1] = made[:, :, :-1]
            late.copy_(made[:, :, -1:])
            del band, made  # before there is the next
        result[:, :, height - 1 :] = late
    return out


def bands(x: Float[Tensor, "b c h w"]) -> list[tuple[int, int]]:
    """First row and the one behind the last of every band."""
    height = x.shape[2]
    rows = max(1, BAND // (x.shape[1] * x.shape[3]))
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


def statistics(norm: nn.GroupNorm, image: Float[Tensor, "1 c h w"]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Mean and variance of every channel's group, in fp32: those of the channels, and how the means lie apart."""
    if image.is_meta:  # for which there is no such operation; the result is as small
        return image.new_empty(image.shape[1]), image.new_empty(image.shape[1])
    if image.device.type in ("cpu", "cuda"):
        unused = torch.zeros(image.shape[1], device=image.device)
        mean, variance = torch.batch_norm_update_stats(image, unused, unused.clone(), 0.0)
    else:
        variance, mean = torch.var_mean(image.float(), dim=(0, 2, 3), correction=0)
    means, variances = (rearrange(found, "(group c) -> group c", group=norm.num_groups) for found in (mean, variance))
    spread = variances.mean(dim=1) + means.var(dim=1, correction=0)
    size = image.shape[1] // norm.num_groups
    return means.mean(dim=1).repeat_interleave(size), spread.repeat_interleave(size)
