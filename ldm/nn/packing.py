"""Convolutions whose weights lie as oneDNN reads them on a CPU: laid out at the first call, not again at every one.

Of few pixels, that takes a fifth of the time and more (`benchmark.py --only layers`). The numbers are the same up to
rounding.
"""

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.nn.cpu import bands, draws_on_cpu, folded

# Where it pays: so many weights, for no more pixels than that.
MANY_WEIGHTS = 2**20
FEW_PIXELS = 64 * 64
# Of a multiple of 48 channels oneDNN wants weights in blocks of 48 or of another width, by the size of the picture. If
# packed for one, they are turned round at every call for the other: 28 ns a weight, ten times the convolution and more.
TWO_LAYOUTS = 48


class Conv2d(nn.Conv2d):
    """PyTorch's. Where only the picture counts its weights are packed, and an empty tensor stands in their place.

    Whoever copies, moves, saves or loads the network, or calls `train`, gets them as they were; before other work on
    weights, call `unpack`.
    """

    # Whether it may pack at all: not where a compiler has followed this network, which would follow it anew.
    packs = True
    _packed: Tensor | None = None
    _folded: tuple[tuple[int, ...], list[Tensor]] | None = None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        """The convolution of `x`."""
        if self._packed is None and not self._pays(x):
            return super().forward(x)
        if not self._fits(x):
            self.unpack()
            return super().forward(x)
        packed = self._pack(x) if self._packed is None else self._packed
        return convolve(x, packed, self.bias, self._padding, self.stride)

    def doubled(
        self, x: Float[Tensor, "b c h w"], out: Float[Tensor, "b o h2 w2"] | None = None
    ) -> Float[Tensor, "b o h2 w2"]:
        """The convolution, 3×3, of `x` enlarged twice by nearest neighbour, from four 2×2 convolutions of `x` itself.

        The 3×3 window sees only 2×2 different pixels of `x`; weights that meet the same one are added beforehand. That
        leaves 4/9 of the products, and the enlarged `x` is never in memory. The result is written into `out`, if given.
        """
        batch, _, height, width = x.shape
        shape = (batch, self.out_channels, 2 * height, 2 * width)
        if out is None:
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        # Compiled, every band would be code of its own.
        rows = [(0, height)] if torch.compiler.is_compiling() else bands(out[:, :, ::2, ::2])
        fits, parts = self._fits(x), list(product((0, 1), repeat=2))
        if fits:
            weights = self._folds((1, self.in_channels, rows[0][1] + 1, width))
        else:
            weights = [folded(self.weight, *part) for part in parts]
        each = list(zip(parts, weights, strict=True))
        for image, result in zip(x.split(1), out.split(1), strict=True):
            for (top, bottom), ((down, right), weight) in product(rows, each):
                first, last = top + down - 1, bottom + down
                band = image[:, :, max(first, 0) : min(last, height)]
                if first < 0 or last > height:
                    band = F.pad(band, (0, 0, int(first < 0), int(last > height)))
                if fits:
                    made = convolve(band, weight, self.bias, (0, 1), (1, 1))
                else:
                    made = F.conv2d(band, weight, self.bias, padding=(0, 1))
                result[:, :, 2 * top + down : 2 * bottom : 2, right::2] = made[..., right : right + width]
                del band, made  # before there is the next
        return out

    def unpack(self) -> None:
        """Have the weights as PyTorch has them again."""
        self._folded = None
        if self._packed is None:
            return
        with torch.inference_mode(False):
            weight = self._packed.to_dense().contiguous(memory_format=torch.channels_last)
            self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self._packed = None

    def _fits(self, x: Tensor) -> bool:
        """Whether packed weights can be used: nobody trains them, and `x` is as they are."""
        free = draws_on_cpu(x) and not self.weight.requires_grad and not torch.compiler.is_compiling()
        return free and x.dtype == self.weight.dtype and works(x.dtype)

    def _pays(self, x: Tensor) -> bool:
        many = self.weight.numel() >= MANY_WEIGHTS and x.shape[2] * x.shape[3] <= FEW_PIXELS
        usual = self.groups == 1 and self.dilation == (1, 1) and self.out_channels % TWO_LAYOUTS != 0
        return many and usual and self.packs and self._fits(x)

    @property
    def _padding(self) -> tuple[int, ...]:
        assert not isinstance(self.padding, str)
        return self.padding

    def _pack(self, x: Tensor) -> Tensor:
        """Pack the weights for inputs like `x`; what stays in their place has a size and no numbers."""
        self._packed = pack(self.weight, x.shape, self._padding, self.stride)
        with torch.inference_mode(False):
            self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)
        return self._packed

    def _folds(self, shape: tuple[int, ...]) -> list[Tensor]:
        """The packed weights of the four 2×2 convolutions, which have 16/9 of the numbers; made once for a size."""
        if self._folded is None or self._folded[0] != shape:
            self.unpack()  # and lets go of those for another size
            parts = product((0, 1), repeat=2)
            self._folded = shape, [pack(folded(self.weight, *part), shape, (0, 1), (1, 1)) for part in parts]
        return self._folded[1]

    def __getstate__(self) -> dict[str, Any]:
        """What copies are made of."""
        self.unpack()
        return dict(self.__dict__)

    def train(self, mode: bool = True) -> "Conv2d":
        """As PyTorch's; what trains has its weights."""
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> "Conv2d":
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args)


def unpack(network: nn.Module) -> None:
    """Have all weights of a network as PyTorch has them."""
    for module in network.modules():
        if isinstance(module, Conv2d):
            module.unpack()


def pack(weight: Tensor, shape: Sequence[int], padding: Sequence[int], stride: Sequence[int]) -> Tensor:
    """The weights of a convolution in the layout that oneDNN chooses for inputs of this shape."""
    found: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, (1, 1), 1, shape)
    return found


def convolve(x: Tensor, packed: Tensor, bias: Tensor | None, padding: Sequence[int], stride: Sequence[int]) -> Tensor:
    """The convolution of `x` with packed weights."""
    made: Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, padding, stride, (1, 1), 1, "none", [], "")
    return made


@cache
def works(dtype: torch.dtype) -> bool:
    """Whether this PyTorch packs, on this machine and in this number format: tried on a small convolution.

    The operators are those that torch.compile uses, and no public interface.
    """
    x, weight = (
        torch.linspace(-1, 1, 2 * 16 * 9).reshape(shape).to(dtype) for shape in ((2, 16, 3, 3), (18, 16, 1, 1))
    )
    x = x.contiguous(memory_format=torch.channels_last)
    try:
        made = convolve(x, pack(weight, x.shape, (0, 0), (1, 1)), None, (0, 0), (1, 1))
        return torch.equal(made, F.conv2d(x, weight)) and torch.equal(
            pack(weight, x.shape, (0, 0), (1, 1)).to_dense(), weight
        )
    except (RuntimeError, AttributeError, TypeError):  # not built in, renamed, or called otherwise: the plain path runs
        return False
