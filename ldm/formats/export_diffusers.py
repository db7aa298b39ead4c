"""A model as a diffusers folder: the JSON configs of its parts, tokenizer files, and weights with diffusers' names."""

from pathlib import Path
from typing import Any

from ldm.formats import diffusers_folder, keys
from ldm.formats.diffusers_config import PREDICTIONS
from ldm.formats.export import HEADER_BYTES, Exported, split
from ldm.formats.tensors import StoredTensor
from ldm.formats.write import whole_or_absent, write_json, write_tensors, write_text, written_bytes
from ldm.models.text import ClipTextConfig, vocabulary_words

VERSION = "0.42.0"
ZERO_SNR = "_zero_snr"
START, END = "<|startoftext|>", "<|endoftext|>"
PADDING = {said: token for token, said in diffusers_folder.PADDING.items()}


def to_diffusers(destination: Path, model: Exported, dtype: str | None = None) -> None:
    """Write a folder that `StableDiffusionPipeline.from_pretrained` opens.

    Where the UNet reads the states before the last block, the last block is left out, as diffusers does.
    Raises as `whole_or_absent` and `write_tensors` do.
    """
    parts = diffusers_tensors(model)
    size = sum(written_bytes(tensors, dtype) + HEADER_BYTES for tensors in parts.values())
    with whole_or_absent(destination, size) as folder:
        for part, tensors in parts.items():
            place = folder / diffusers_folder.FOLDERS[part]
            place.mkdir(parents=True)
            write_tensors(place / f"{diffusers_folder.WEIGHTS[part]}.safetensors", tensors, {}, dtype)
        for name, values in configs(model).items():
            write_json(folder / name, values)
        write_tokenizer(folder / "tokenizer", model.text)


def diffusers_tensors(model: Exported) -> dict[str, dict[str, StoredTensor]]:
    """Our parts → the names in their files → tensors."""
    text: dict[str, StoredTensor] = {}
    for ours, names in keys.text_to_hf(narrowed(model.text)).items():
        text |= split(model.parts["text"][ours], tuple(f"text_model.{name}" for name in names))
    return {"autoencoder": model.parts["autoencoder"], "text": text, "unet": model.parts["unet"]}


def narrowed(text: ClipTextConfig) -> ClipTextConfig:
    """The text tower whose last states are those the UNet reads."""
    if text.hidden == "last":
        return text
    return text.model_copy(update={"layers": text.layers - 1, "hidden": "last"})


def configs(model: Exported) -> dict[str, dict[str, Any]]:
    """The JSON files of the folder by their names."""
    return {
        "model_index.json": index(model),
        "unet/config.json": unet(model),
        "vae/config.json": autoencoder(model),
        "text_encoder/config.json": text_encoder(model),
        "scheduler/scheduler_config.json": scheduler(model),
    }


def index(model: Exported) -> dict[str, Any]:
    """Which class reads which sub-folder."""
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if model.config.is_inpainting else "StableDiffusionPipeline",
        "_diffusers_version": VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def unet(model: Exported) -> dict[str, Any]:
    """Settings of UNet2DConditionModel, in whose files `attention_head_dim` is the number of heads."""
    config, sampling = model.config.unet, model.config.sampling
    factor = model.autoencoder.factor
    height, width = sampling.height // factor, sampling.width // factor
    kinds = ["CrossAttn" if attention else "" for attention in config.attention]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "attention_head_dim": config.heads or [level // (config.head_width or 1) for level in config.widths],
        "block_out_channels": config.widths,
        "center_input_sample": False,
        "cross_attention_dim": config.context_width,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "downsample_padding": 1,
        "dropout": config.dropout,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.res_blocks,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "sample_size": height if height == width else [height, width],
        "transformer_layers_per_block": config.transformer_depth,
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "use_linear_projection": config.linear_projection,
    }


def autoencoder(model: Exported) -> dict[str, Any]:
    """Settings of AutoencoderKL."""
    config = model.autoencoder
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": [config.channels * multiplier for multiplier in config.multipliers],
        "down_block_types": ["DownEncoderBlock2D"] * len(config.multipliers),
        "in_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.res_blocks,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.groups,
        "out_channels": config.image_channels,
        "sample_size": max(model.config.sampling.width, model.config.sampling.height),
        "scaling_factor": round(1 / config.latent_std[0], 12),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.multipliers),
    }


def text_encoder(model: Exported) -> dict[str, Any]:
    """Settings of CLIPTextModel."""
    config = narrowed(model.text)
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": config.vocabulary - 2,
        "dropout": 0.0,
        "eos_token_id": config.vocabulary - 1,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": config.context_length,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": 0 if config.padding == "zero" else config.vocabulary - 1,
        "projection_dim": config.width,
        # Opened without a word on precision, this part would take the file's and the others fp32.
        "torch_dtype": "float32",
        "vocab_size": config.vocabulary,
    }


def scheduler(model: Exported) -> dict[str, Any]:
    """Settings of DDIMScheduler, from which diffusers makes its other schedulers too.

    A model that is drawn exactly ends at σ = 0; Stable Diffusion's own convention ends at the noise of timestep 0.
    """
    config, schedule = model.config, model.config.noise_schedule
    spacing = config.sampling.schedule
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.kind.removesuffix(ZERO_SNR),
        "beta_start": schedule.beta_start,
        "clip_sample": False,
        "num_train_timesteps": schedule.timesteps,
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[config.prediction],
        "rescale_betas_zero_snr": schedule.kind.endswith(ZERO_SNR),
        "set_alpha_to_one": config.sampling.convention == "exact",
        "steps_offset": 1,
        "timestep_spacing": spacing if spacing in diffusers_folder.SPACINGS else "leading",
        "trained_betas": None,
    }


def write_tokenizer(folder: Path, text: ClipTextConfig) -> None:
    """Write the byte-pair vocabulary as CLIPTokenizer reads it.

    Where rows are padded with id 0, the padding token is `!`, as in Stable Diffusion 2: a typed `!` reads as padding.
    """
    known, pairs = vocabulary_words(text.vocabulary)
    words = {word: number for number, word in enumerate([*known[:-2], START, END])}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": PADDING[text.padding]}
    write_json(folder / "vocab.json", words)
    write_text(folder / "merges.txt", "\n".join(merges) + "\n")
    write_json(folder / "special_tokens_map.json", tokens)
    settings = {"model_max_length": text.context_length, "tokenizer_class": "CLIPTokenizer"}
    extra = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    write_json(folder / "tokenizer_config.json", {**tokens, **settings, **extra})
