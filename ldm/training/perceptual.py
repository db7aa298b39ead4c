"""LPIPS: the distance of two images in the features of VGG-16, from weights that the user brings.

Source: Zhang et al. 2018, Equation 1. One safetensors file holds torchvision's VGG-16 ("features.N.weight" and
"features.N.bias") and the linear weights that were fitted to human judgements ("linK.model.1.weight", K from 0 to 4).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.errors import ModelError
from ldm.training.checkpoint import load_tensors

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG-16's convolutions between its poolings; the features after each group are compared."""

# ImageNet's mean and deviation, for images in [−1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
TINY = 1e-10


class Lpips(nn.Module):
    """The perceptual distance, fixed; `weights` are the tensors of the file."""

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.groups = nn.ModuleList()
        index, before = 0, 3
        for widths in WIDTHS:
            group: list[nn.Module] = [] if before == 3 else [nn.MaxPool2d(2)]
            for width in widths:
                convolution = nn.Conv2d(before, width, 3, padding=1)
                convolution.weight.data.copy_(weights[f"features.{index}.weight"])
                convolution.bias.data.copy_(weights[f"features.{index}.bias"])  # type: ignore[union-attr]  # made with a bias
                group += [convolution, nn.ReLU()]
                index, before = index + 2, width
            index += 1
            self.groups.append(nn.Sequential(*group))
        self.linear = nn.ParameterList(weights[f"lin{k}.model.1.weight"].clone() for k in range(len(WIDTHS)))
        self.register_buffer("shift", torch.tensor(SHIFT)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[None, :, None, None])
        self.requires_grad_(False)

    @classmethod
    def load(cls, path: str) -> "Lpips":
        """From a safetensors file. Raises ModelError where it is missing or other tensors are in it."""
        if not Path(path).is_file():
            raise ModelError(f"{path}: no such file; docs/training.md says how LPIPS' weights become one")
        try:
            return cls(load_tensors(Path(path)))
        except (KeyError, RuntimeError) as error:
            raise ModelError(f"{path}: not VGG-16 and LPIPS ({error}); docs/training.md says how it is made") from None

    def features(self, image: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Features after each group, of unit length at every pixel."""
        found, x = [], (image - self.shift) / self.scale
        for group in self.groups:
            x = group(x)
            found.append(x / (x.square().sum(dim=1, keepdim=True) + TINY**2).sqrt())  # inside: √ has no slope at 0
        return found

    def forward(self, a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """The distance of each pair of images in [−1, 1]."""
        total = a.new_zeros(len(a))
        for x, y, weight in zip(self.features(a), self.features(b), self.linear, strict=True):
            total = total + F.conv2d((x - y).square(), weight).mean(dim=(1, 2, 3))
        return total
