"""Our networks and those of diffusers take each other's weights and say the same."""

from typing import Any

import pytest
import torch
from torch import nn

from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.models.text import open_clip_module
from ldm.models.unet import UNet, UNetConfig
from ldm.nn import attention, cpu, packing
from ldm.nn.layers import channels_last

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


@pytest.fixture
def everything_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks go the ways that a CPU takes for large ones: in blocks and bands, packed and folded."""
    for name, value in {"LARGE": 1, "MANY_PIXELS": 1, "BAND": 4096, "SCORES": 4096}.items():
        monkeypatch.setattr(cpu, name, value)
    monkeypatch.setattr(attention, "MANY_KEYS", 1)
    monkeypatch.setattr(packing, "MANY_WEIGHTS", 1)
    monkeypatch.setattr(packing, "FEW_PIXELS", 2**20)


def is_as_near(ours: torch.Tensor, theirs: torch.Tensor, known: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether we are about as far from fp32 as diffusers is in the same number format."""
    far, allowed = (float((found.float() - known).norm() / known.norm()) for found in (ours, theirs))
    return far < (1e-5 if dtype == torch.float32 else 1.25 * allowed) and allowed < 0.05


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def their_unet(config: UNetConfig) -> Any:
    kinds = ["CrossAttn" if attention else "" for attention in config.attention]
    return diffusers.UNet2DConditionModel(
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


@pytest.mark.parametrize("config", [SD1_LIKE, SD2_LIKE], ids=["SD1", "SD2"])
def test_unet(config: UNetConfig) -> None:
    ours, theirs = randomised(UNet(config)), their_unet(config)
    theirs.load_state_dict(ours.state_dict())
    x, t, text = torch.randn(2, 4, 16, 24), torch.tensor([3.0, 977.0]), torch.randn(2, 7, 24)
    with torch.inference_mode():
        assert relative_error(ours(x, t, text), theirs(x, t, text).sample) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [SD1_LIKE, SD2_LIKE], ids=["SD1", "SD2"])
def test_a_unet_on_a_cpu_in_every_number_format(
    config: UNetConfig, dtype: torch.dtype, everything_otherwise: None
) -> None:
    ours, theirs = randomised(UNet(config)).requires_grad_(False), their_unet(config)
    theirs.load_state_dict(ours.state_dict())
    x, t, text = torch.randn(2, 4, 16, 24), torch.tensor([3.0, 977.0]), torch.randn(2, 7, 24)
    with torch.inference_mode():
        known = theirs(x, t, text).sample
        channels_last(ours.to(dtype))
        given = x.to(dtype), t, text.to(dtype)
        assert is_as_near(ours(*given), theirs.to(dtype)(*given).sample, known, dtype)
    packed = [module for module in ours.modules() if isinstance(module, packing.Conv2d) and module._packed is not None]
    assert packed or not packing.works(dtype)


def autoencoder_config(attends: bool) -> AutoencoderConfig:
    return AutoencoderConfig(channels=32, multipliers=(1, 2, 2), res_blocks=2, mid_attention=attends, groups=8)


def their_autoencoder(attends: bool) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=attends,
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_autoencoder_on_a_cpu_in_every_number_format(dtype: torch.dtype, everything_otherwise: None) -> None:
    ours = randomised(KLAutoencoder(autoencoder_config(attends=True))).requires_grad_(False)
    theirs = their_autoencoder(attends=True)
    theirs.load_state_dict(ours.state_dict())
    image, latent = torch.rand(1, 3, 32, 48) * 2 - 1, torch.randn(1, 4, 8, 12)
    with torch.inference_mode():
        mean, picture = theirs.encode(image).latent_dist.mean * 0.18215, theirs.decode(latent / 0.18215).sample
        channels_last(ours.to(dtype))
        theirs.to(dtype)
        their_mean = theirs.encode(image.to(dtype)).latent_dist.mean * 0.18215
        assert is_as_near(ours.encode(image).mean, their_mean, mean, dtype)
        assert is_as_near(ours.decode(latent), theirs.decode((latent / 0.18215).to(dtype)).sample, picture, dtype)


@pytest.mark.parametrize("attends", [True, False])
def test_autoencoder(attends: bool) -> None:
    ours, theirs = randomised(KLAutoencoder(autoencoder_config(attends))), their_autoencoder(attends)
    theirs.load_state_dict(ours.state_dict())
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.inference_mode():
        known, found = theirs.encode(image).latent_dist, ours.encode(image)
        assert relative_error(found.mean, known.mean * 0.18215) < 1e-5
        assert relative_error(found.std, known.std * 0.18215) < 1e-5
        assert relative_error(ours.decode(found.mean), theirs.decode(known.mean).sample) < 1e-5
