"""Stable Diffusion 1.5 with random numbers for weights: speed and memory do not depend on what they are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import validate
from ldm.formats import keys
from ldm.formats.export import Exported, to_single_file
from ldm.formats.export_diffusers import to_diffusers
from ldm.formats.tensors import MemoryTensor, StoredTensor
from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.models.model_config import ModelConfig, build
from ldm.models.text import ClipTextConfig, ClipTextEncoder
from ldm.models.unet import UNet
from ldm.nn.layers import channels_last

VALUES = {
    "autoencoder": {"kind": "kl"},
    "text": {"kind": "clip", "tokenizer": "hf"},
    "unet": {},
    "sampling": {"width": 512, "height": 512, "schedule": "leading", "convention": "diffusers", "steps": 50},
}
# So small that no network overflows, so large that nothing is zero.
SCALE = 0.02


@dataclass(frozen=True)
class StandIn:
    """Its three networks, as this program has them."""

    config: ModelConfig
    autoencoder: KLAutoencoder
    text: ClipTextEncoder
    unet: UNet


def config() -> ModelConfig:
    """Stable Diffusion 1.5's config."""
    return validate(VALUES, ModelConfig, "SD 1.5")


def shapes() -> StandIn:
    """The networks on the meta device: their shapes, for what computes nothing."""
    made = config()
    with torch.device("meta"):
        autoencoder, text, unet = build(made)
    assert isinstance(autoencoder, KLAutoencoder) and isinstance(text, ClipTextEncoder)
    return StandIn(made, autoencoder.eval(), text.eval(), unet.eval())


def ours(dtype: torch.dtype, device: torch.device) -> StandIn:
    """The networks with weights from a seed, laid out as `Bundle.load` does; the text encoder in fp32."""
    made, generator = shapes(), torch.Generator(device).manual_seed(0)
    for network, number_format in ((made.autoencoder, dtype), (made.text, torch.float32), (made.unet, dtype)):
        network.to_empty(device=device).to(number_format).requires_grad_(False)
        for parameter in network.parameters():
            parameter.normal_(0.0, SCALE, generator=generator)
        channels_last(network)
    return made


@dataclass(frozen=True)
class Theirs:
    """The same networks in diffusers and transformers."""

    autoencoder: Any
    text: Any
    unet: Any


def theirs(stand_in: StandIn, dtype: torch.dtype, nchw: bool) -> Theirs:
    """The same numbers in the classes of diffusers and transformers; with `nchw` in PyTorch's usual layout.

    What has the right dtype and layout is not copied.
    """
    import diffusers
    import transformers

    unet, text = stand_in.config.unet, stand_in.config.text
    assert isinstance(text, ClipTextConfig)
    kinds = ["CrossAttn" if attends else "" for attends in unet.attention]
    with torch.device("meta"):
        networks: tuple[Any, Any] = (
            their_autoencoder(),
            diffusers.UNet2DConditionModel(
                block_out_channels=tuple(unet.widths),
                down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
                up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
                layers_per_block=unet.res_blocks,
                cross_attention_dim=unet.context_width,
                attention_head_dim=unet.heads,
                norm_num_groups=unet.groups,
            ),
        )
    for network, known in zip(networks, (stand_in.autoencoder, stand_in.unet), strict=True):
        layout = torch.contiguous_format if nchw else torch.preserve_format
        state = {name: value.to(dtype, memory_format=layout) for name, value in known.state_dict().items()}
        network.load_state_dict(state, assign=True)
        network.eval().requires_grad_(False)
    shape: dict[str, Any] = {
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
    }
    words: dict[str, Any] = {
        "vocab_size": text.vocabulary,
        "max_position_embeddings": text.context_length,
        "eos_token_id": text.vocabulary - 1,
    }
    tower: Any = transformers.CLIPTextModel(transformers.CLIPTextConfig(**shape, **words))
    prefix = "text_model." if "text_model.final_layer_norm.weight" in tower.state_dict() else ""  # transformers 4
    tower.load_state_dict({f"{prefix}{name}": tensor for name, tensor in hf_text(stand_in.text).items()})
    device = next(stand_in.unet.parameters()).device
    return Theirs(networks[0], tower.to(device, dtype).eval().requires_grad_(False), networks[1])


def their_autoencoder() -> Any:
    """The autoencoder in diffusers' class, with weights as that makes them."""
    import diffusers

    shape = config().autoencoder
    assert isinstance(shape, AutoencoderConfig)
    levels = len(shape.multipliers)
    return diffusers.AutoencoderKL(
        block_out_channels=tuple(shape.channels * multiplier for multiplier in shape.multipliers),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=shape.res_blocks,
        norm_num_groups=shape.groups,
    )


def hf_text(text: ClipTextEncoder) -> dict[str, Tensor]:
    """The text tower's weights with Hugging Face's names, which hold query, key and value apart."""
    state, made = text.state_dict(), dict[str, Tensor]()
    for ours, names in keys.text_to_hf(text.config).items():
        parts = zip(names, state[ours].chunk(len(names)), strict=True)
        made |= dict(parts)
    return made


def write(folder: Path) -> tuple[Path, Path]:
    """A single file in fp16, 2.1 GB, and the same model as the folder that diffusers reads, as large again."""
    made = shapes()
    assert isinstance(made.config.autoencoder, AutoencoderConfig) and isinstance(made.config.text, ClipTextConfig)
    pool = torch.randn(2**26, generator=torch.Generator().manual_seed(0)).mul_(SCALE).half()
    parts: dict[str, dict[str, StoredTensor]] = {}
    networks: dict[str, nn.Module] = {"autoencoder": made.autoencoder, "text": made.text, "unet": made.unet}
    for part, network in networks.items():
        state = network.state_dict()
        # Views of the same random numbers: the file is 2 GB, this process is not.
        parts[part] = {name: MemoryTensor(pool[: like.numel()].view(like.shape)) for name, like in state.items()}
    model = Exported(made.config, made.config.autoencoder, made.config.text, parts)
    to_single_file(folder / "sd15.safetensors", model)
    to_diffusers(folder / "sd15", model)
    return folder / "sd15.safetensors", folder / "sd15"
