"""Tiny Stable Diffusion models made by diffusers and transformers from a seed, as their folders and as single files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.bundle import read_config
from ldm.formats import keys
from ldm.formats.single_file import CONFIG_KEY
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.model_config import ModelConfig
from ldm.models.text import ClipTextConfig, open_clip_module, vocabulary_words

open_clip_module()  # makes torchvision importable beside a CPU-only PyTorch; diffusers imports it too
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# What the versions differ in; everything else is as small as it can be.
VERSIONS: dict[str, dict[str, Any]] = {
    "SD1": {"act": "quick_gelu", "heads": 2, "linear": False, "pad": "<|endoftext|>", "prediction": "epsilon"},
    "SD2": {"act": "gelu", "heads": [2, 4], "linear": True, "pad": "!", "prediction": "epsilon"},
    "SD2-v": {"act": "gelu", "heads": [2, 4], "linear": True, "pad": "!", "prediction": "v_prediction"},
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def write_vocabulary(folder: Path) -> None:
    """CLIP's vocabulary and merges as the files that Hugging Face's tokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    words, merges = vocabulary_words(49408)
    words[-2:] = ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def tokenizer(folder: Path, padding: str) -> Any:
    """Hugging Face's fast CLIPTokenizer with CLIP's vocabulary."""
    write_vocabulary(folder)
    return transformers.CLIPTokenizer.from_pretrained(str(folder), pad_token=padding, model_max_length=77)


def shaken(module: nn.Module) -> nn.Module:
    """Weights from a seed that make every layer count; norms and biases too are not left at one and zero."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=0.3 if "embedding" in name else fan_in**-0.5)
        else:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return module.eval()


def pipeline(version: str, folder: Path, channels: int = 4) -> Any:
    """diffusers' StableDiffusionPipeline of one version, with random weights; `folder` is for the vocabulary."""
    chosen = VERSIONS[version]
    shape = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**shape, hidden_act=chosen["act"], bos_token_id=49406, eos_token_id=49407)
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=chosen["heads"],
        use_linear_projection=chosen["linear"],
        norm_num_groups=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
    )
    made = diffusers.StableDiffusionPipeline(
        vae=shaken(vae),
        text_encoder=shaken(text),
        tokenizer=tokenizer(folder, chosen["pad"]),
        unet=shaken(unet),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER, prediction_type=chosen["prediction"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def write_single_file(path: Path, folder: Path, pipe: Any, open_clip: bool = False, **changes: Any) -> Path:
    """The pipeline as one file with CompVis's names and our config; `folder` is the pipeline's own.

    With `open_clip`, the text tower has open_clip's names and one block more than is used, as in SD 2.x.
    """
    config = read_config(folder)
    state = compvis(config, pipe)
    assert isinstance(config.text, ClipTextConfig)
    text: dict[str, Tensor] = pipe.text_encoder.state_dict()
    if open_clip:
        longer = config.text.model_copy(update={"layers": config.text.layers + 1, "hidden": "penultimate"})
        state |= {f"{keys.OPEN_CLIP_TEXT[0]}{name}": tensor for name, tensor in open_clip_text(longer, text).items()}
        config = config.model_copy(update={"text": longer})
    else:
        state |= {f"{keys.HF_TEXT}{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}
    state = {changes.get("prefix", "") + name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state | changes.get("extra", {}), path, {CONFIG_KEY: json.dumps(config.model_dump(mode="json"))})
    return path


def compvis(config: ModelConfig, pipe: Any) -> dict[str, Tensor]:
    """UNet and autoencoder under CompVis's names; the attention in the autoencoder's middle as convolutions."""
    unet, autoencoder = pipe.unet.state_dict(), pipe.vae.state_dict()
    state = {f"{keys.UNET}{theirs}": unet[ours] for ours, theirs in keys.unet_to_compvis(config.unet).items()}
    assert isinstance(config.autoencoder, AutoencoderConfig)
    for ours, theirs in keys.autoencoder_to_compvis(config.autoencoder).items():
        tensor = autoencoder[ours]
        convolution = keys.is_convolution_in_compvis(ours)
        state[f"{keys.AUTOENCODER}{theirs}"] = tensor[..., None, None] if convolution else tensor
    return state


def open_clip_text(config: ClipTextConfig, hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's text tower under open_clip's names, with one more block of noise behind it."""
    hf = {name.removeprefix("text_model."): tensor for name, tensor in hf.items()}
    known = keys.text_to_hf(config.model_copy(update={"layers": config.layers - 1}))
    state = {ours.removeprefix("tower."): torch.cat([hf[name] for name in names]) for ours, names in known.items()}
    for name, tensor in list(state.items()):
        if ".resblocks.0." in name:
            state[name.replace(".0.", f".{config.layers - 1}.", 1)] = torch.randn_like(tensor)
    return state
