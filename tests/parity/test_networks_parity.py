"""Our networks and those of diffusers take each other's weights and say the same."""

import pytest
import torch
from torch import nn

from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.models.text import open_clip_module
from ldm.models.unet import UNet, UNetConfig

pytestmark = pytest.mark.parity

open_clip_module()  # makes torchvision importable beside a CPU-only PyTorch; diffusers imports it too
diffusers = pytest.importorskip("diffusers")

SD1_LIKE = UNetConfig(
    channels=32, multipliers=(1, 2, 4), res_blocks=2, attention=(True, True, False), heads=4, context_width=24, groups=8
)
SD2_LIKE = UNetConfig(
    channels=32, multipliers=(1, 2), res_blocks=1, attention=(False, True), heads=None, head_width=16, context_width=24,
    linear_projection=True, groups=8,
)  # fmt: skip


def randomised(module: nn.Module) -> nn.Module:
    """A fresh UNet ends in zeros; weights from a seed make every layer count."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.08)
    return module.eval()


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("config", [SD1_LIKE, SD2_LIKE], ids=["SD1", "SD2"])
def test_unet(config: UNetConfig) -> None:
    kinds = ["CrossAttn" if attention else "" for attention in config.attention]
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=tuple(config.widths),
        layers_per_block=config.res_blocks,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        cross_attention_dim=config.context_width,
        # This argument of diffusers is the number of heads, in spite of its name.
        attention_head_dim=config.heads or [width // (config.head_width or 1) for width in config.widths],
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.groups,
    ).eval()
    ours = randomised(UNet(config))
    theirs.load_state_dict(ours.state_dict())
    x, t, text = torch.randn(2, 4, 16, 24), torch.tensor([3.0, 977.0]), torch.randn(2, 7, 24)
    with torch.inference_mode():
        assert relative_error(ours(x, t, text), theirs(x, t, text).sample) < 1e-5


@pytest.mark.parametrize("attention", [True, False])
def test_autoencoder(attention: bool) -> None:
    config = AutoencoderConfig(channels=32, multipliers=(1, 2, 2), res_blocks=2, mid_attention=attention, groups=8)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=attention,
    ).eval()
    ours = randomised(KLAutoencoder(config))
    theirs.load_state_dict(ours.state_dict())
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.inference_mode():
        known, found = theirs.encode(image).latent_dist, ours.encode(image)
        assert relative_error(found.mean, known.mean * 0.18215) < 1e-5
        assert relative_error(found.std, known.std * 0.18215) < 1e-5
        assert relative_error(ours.decode(found.mean), theirs.decode(known.mean).sample) < 1e-5
