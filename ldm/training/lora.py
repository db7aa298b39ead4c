"""Low-rank adaptation: a frozen network learns by small additions to its linear layers, which are a file of their own.

Source: Hu et al. 2022: y = W x + (α/r) B A x, with A (r × in) random and B (out × r) zero at the start.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ldm.errors import SettingError
from ldm.training.checkpoint import save_tensors
from ldm.training.diffusion import DiffusionTraining

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class LoraTraining(DiffusionTraining):
    """The stage that adapts the UNet of `--base`."""

    rank: PositiveInt = 8
    # α: the addition is scaled by α/rank, so that its strength stays when the rank is changed.
    alpha: PositiveFloat = 8.0
    # The attention's projections, or all linear layers of the transformer blocks.
    layers: Literal["attention", "linear"] = "attention"
    # Names in the file: kohya's (which keeps α) or PEFT's (which has none: α/rank is multiplied in).
    format: Literal["kohya", "peft"] = "kohya"


class LoraLinear(nn.Linear):
    """A linear layer, frozen, and its low-rank addition; the layer's own parameters keep their names."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.alpha = alpha
        self.scale = alpha / rank
        self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        return super().forward(x) + self.scale * self.lora_up(self.lora_down(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same: W + (α/r) B A."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        addition = self.scale * self.lora_up.weight.double() @ self.lora_down.weight.double()
        weight = (self.weight.double() + addition).to(self.weight.dtype)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return plain


def adapt(network: nn.Module, config: LoraTraining) -> None:
    """Freeze a network and give its layers their additions, at random from the present seed; it computes as before.

    Raises SettingError where it has no such layer.
    """
    network.requires_grad_(False)
    chosen = [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
        and (name.endswith(ATTENTION) if config.layers == "attention" else "transformer_blocks" in name)
    ]
    if not chosen:
        raise SettingError(f"lora_training.layers: the network has no {config.layers} layer; choose others")
    for name, layer in chosen:
        network.set_submodule(name, LoraLinear(layer, config.rank, config.alpha))


def adapted(network: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The layers that have additions, by name."""
    yield from ((name, layer) for name, layer in network.named_modules() if isinstance(layer, LoraLinear))


def merge(network: nn.Module) -> None:
    """Add every low-rank addition to its layer's weight; the network is a plain one then, and computes the same."""
    for name, layer in list(adapted(network)):
        network.set_submodule(name, layer.merged())


def exported(network: nn.Module, names: Literal["kohya", "peft"]) -> dict[str, Tensor]:
    """The additions as other programs read them; the UNet's modules have diffusers' names already."""
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted(network):
        down, up = layer.lora_down.weight.detach().cpu(), layer.lora_up.weight.detach().cpu()
        if names == "peft":
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": layer.scale * up}
        else:
            prefix = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
            tensors[f"{prefix}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def save_lora(path: Path, network: nn.Module, config: LoraTraining, base: str) -> None:
    """Write the additions, with rank, α and what they were trained on as metadata."""
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(config.alpha),
        "ss_sd_model_name": base,
    }
    save_tensors(path, exported(network, config.format), about)
