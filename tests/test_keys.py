"""The names of a single file: every tensor has one, and they are those of the files that people have."""

import pytest
import torch
from torch import nn

from ldm.formats import keys
from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.models.text import ClipTextConfig, ClipTextEncoder
from ldm.models.unet import UNet, UNetConfig

SD1, AUTOENCODER, CLIP_L = UNetConfig(), AutoencoderConfig(), ClipTextConfig()
SD2 = UNetConfig(heads=None, head_width=64, context_width=1024, linear_projection=True)
CLIP_H = ClipTextConfig(width=1024, layers=24, heads=16, activation="gelu", hidden="penultimate", padding="zero")
# Narrower on the way down, two transformer blocks each, levels without attention: what the two versions never have.
ODD = UNetConfig(
    channels=64, multipliers=(2, 1, 3), attention=(False, True, False), res_blocks=1, transformer_depth=2, groups=8
)
ODD_AUTOENCODER = AutoencoderConfig(
    channels=32, multipliers=(2, 1, 1, 4), res_blocks=1, mid_attention=False, groups=8
)  # fmt: skip

# Names and shapes of v1-5-pruned-emaonly.safetensors, from every kind of place in it.
FILE_OF_SD1 = {
    "time_embed.0.weight": (1280, 320),
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
    "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "input_blocks.8.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
    "input_blocks.11.0.in_layers.2.weight": (1280, 1280, 3, 3),
    "middle_block.1.transformer_blocks.0.attn1.to_out.0.bias": (1280,),
    "middle_block.2.emb_layers.1.weight": (1280, 1280),
    "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.8.0.skip_connection.weight": (640, 960, 1, 1),
    "output_blocks.11.0.out_layers.3.weight": (320, 320, 3, 3),
    "output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
    "out.0.weight": (320,),
    "out.2.weight": (4, 320, 3, 3),
}
FILE_OF_THE_AUTOENCODER = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
    "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "encoder.mid.attn_1.norm.weight": (512,),
    "encoder.norm_out.bias": (512,),
    "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "decoder.mid.block_2.conv1.weight": (512, 512, 3, 3),
    "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "decoder.up.3.block.2.conv2.weight": (512, 512, 3, 3),
    "decoder.up.3.upsample.conv.bias": (512,),
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.weight": (4, 4, 1, 1),
}
FILE_OF_CLIP_L = {
    "embeddings.token_embedding.weight": (49408, 768),
    "embeddings.position_embedding.weight": (77, 768),
    "encoder.layers.0.self_attn.q_proj.weight": (768, 768),
    "encoder.layers.11.self_attn.out_proj.bias": (768,),
    "encoder.layers.11.mlp.fc1.weight": (3072, 768),
    "encoder.layers.11.layer_norm2.weight": (768,),
    "final_layer_norm.weight": (768,),
}
FILE_OF_CLIP_H = {
    "token_embedding.weight": (49408, 1024),
    "positional_embedding": (77, 1024),
    "transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
    "transformer.resblocks.23.attn.out_proj.weight": (1024, 1024),
    "transformer.resblocks.23.mlp.c_proj.weight": (1024, 4096),
    "transformer.resblocks.23.ln_1.bias": (1024,),
    "ln_final.bias": (1024,),
}


def shapes(network: type[nn.Module], config: object) -> dict[str, tuple[int, ...]]:
    """Our names and shapes; no memory is used."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in network(config).state_dict().items()}


def in_file(ours: dict[str, tuple[int, ...]], names: dict[str, tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as they are in a file."""
    made = {}
    for name, theirs in names.items():
        shape = (ours[name][0] // len(theirs), *ours[name][1:])
        made |= {each: shape + (1, 1) * keys.is_convolution_in_compvis(name) for each in theirs}
    return made


def single(names: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {ours: (theirs,) for ours, theirs in names.items()}


@pytest.mark.parametrize("config", [SD1, SD2, ODD], ids=["SD1", "SD2", "odd"])
def test_every_tensor_of_the_unet_has_a_name_of_its_own(config: UNetConfig) -> None:
    names = keys.unet_to_compvis(config)
    assert names.keys() == shapes(UNet, config).keys()
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("config", [AUTOENCODER, ODD_AUTOENCODER], ids=["SD", "odd"])
def test_every_tensor_of_the_autoencoder_has_a_name_of_its_own(config: AutoencoderConfig) -> None:
    names = keys.autoencoder_to_compvis(config)
    assert names.keys() == shapes(KLAutoencoder, config).keys()
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("config", [CLIP_L, CLIP_H], ids=["SD1", "SD2"])
def test_every_tensor_of_the_text_tower_has_names_of_its_own(config: ClipTextConfig) -> None:
    ours = shapes(ClipTextEncoder, config)
    for names in (keys.text_to_hf(config), single(keys.text_to_open_clip(config))):
        assert names.keys() == ours.keys()
        assert len({each for theirs in names.values() for each in theirs}) == sum(map(len, names.values()))


def test_a_file_of_stable_diffusion_1_has_the_tensors_it_is_known_for() -> None:
    unet = in_file(shapes(UNet, SD1), single(keys.unet_to_compvis(SD1)))
    autoencoder = in_file(shapes(KLAutoencoder, AUTOENCODER), single(keys.autoencoder_to_compvis(AUTOENCODER)))
    text = in_file(shapes(ClipTextEncoder, CLIP_L), keys.text_to_hf(CLIP_L))
    assert unet | FILE_OF_SD1 == unet
    assert autoencoder | FILE_OF_THE_AUTOENCODER == autoencoder
    assert text | FILE_OF_CLIP_L == text
    # With the token positions, which are no weights, the 1,131 of v1-5-pruned-emaonly.
    assert (len(unet), len(autoencoder), len(text) + 1) == (686, 248, 197)


def test_a_file_of_stable_diffusion_2_has_the_tensors_it_is_known_for() -> None:
    unet = in_file(shapes(UNet, SD2), single(keys.unet_to_compvis(SD2)))
    text = in_file(shapes(ClipTextEncoder, CLIP_H), single(keys.text_to_open_clip(CLIP_H)))
    assert unet["input_blocks.1.1.proj_in.weight"] == (320, 320)
    assert unet["input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"] == (320, 1024)
    assert text | FILE_OF_CLIP_H == text


def test_averaged_weights_have_names_without_dots() -> None:
    assert keys.ema_name("input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"
    names = keys.unet_to_compvis(SD1).values()
    assert len({keys.ema_name(name) for name in names}) == len(names)  # 1.11 and 11.1 must not meet


def test_what_training_left_is_told_from_weights() -> None:
    left = ["betas", "model_ema.decay", keys.ema_name("out.2.bias"), "first_stage_model.loss.logvar"]
    left += [f"{keys.HF_TEXT}embeddings.position_ids", "cond_stage_model.model.logit_scale"]
    assert all(map(keys.is_left_over, left))
    weights = [keys.UNET + name for name in keys.unet_to_compvis(SD1).values()]
    weights += [keys.AUTOENCODER + name for name in keys.autoencoder_to_compvis(AUTOENCODER).values()]
    weights += [keys.OPEN_CLIP_TEXT[0] + name for name in keys.text_to_open_clip(CLIP_H).values()]
    weights += [keys.HF_TEXT + each for names in keys.text_to_hf(CLIP_L).values() for each in names]
    assert not any(map(keys.is_left_over, weights))
