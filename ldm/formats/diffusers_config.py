"""The JSON files of a diffusers folder become values of our config; a setting that we lack is refused by name.

Defaults are those of the classes that read these files (UNet2DConditionModel, AutoencoderKL, CLIPTextConfig).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from ldm import config as configuration
from ldm.config import Config, ConfigType
from ldm.errors import ModelError, SettingError
from ldm.formats.evidence import ZERO_SNR, Prediction

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# Settings that our networks have in one way only. Any other key must be null or false.
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}
AUTOENCODER_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}
TEXT_FIXED: dict[str, tuple[Any, ...]] = {"layer_norm_eps": (1e-5,)}
SCHEDULER_FIXED: dict[str, tuple[Any, ...]] = {"beta_schedule": ("scaled_linear", "linear")}
# Settings that change no picture of ours, or only how exactly it is computed.
FREE = {
    "unet": {"addition_embed_type_num_heads", "dropout", "sample_size", "upcast_attention"},
    "vae": {"force_upcast", "sample_size"},
}
ATTENTION = {"CrossAttnDownBlock2D": True, "CrossAttnUpBlock2D": True, "DownBlock2D": False, "UpBlock2D": False}


class _UNetFile(Config):
    in_channels: PositiveInt = 4
    out_channels: PositiveInt = 4
    block_out_channels: tuple[PositiveInt, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    layers_per_block: PositiveInt | tuple[PositiveInt, ...] = 2
    transformer_layers_per_block: PositiveInt | tuple[PositiveInt, ...] = 1
    attention_head_dim: PositiveInt | tuple[PositiveInt, ...] = 8
    num_attention_heads: PositiveInt | tuple[PositiveInt, ...] | None = None
    cross_attention_dim: PositiveInt = 1280
    use_linear_projection: bool = False
    norm_num_groups: PositiveInt = 32


class _AutoencoderFile(Config):
    in_channels: PositiveInt = 3
    out_channels: PositiveInt = 3
    latent_channels: PositiveInt = 4
    block_out_channels: tuple[PositiveInt, ...] = (64,)
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    layers_per_block: PositiveInt = 1
    norm_num_groups: PositiveInt = 32
    mid_block_add_attention: bool = True
    scaling_factor: PositiveFloat = 0.18215
    shift_factor: float | None = None


class _TextFile(Config):
    hidden_size: PositiveInt = 512
    intermediate_size: PositiveInt = 2048
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 8
    max_position_embeddings: PositiveInt = 77
    vocab_size: PositiveInt = 49408
    hidden_act: str = "quick_gelu"
    use_attention_mask: bool = False


class _SchedulerFile(Config):
    beta_start: NonNegativeFloat = 0.0001
    beta_end: PositiveFloat = 0.02
    beta_schedule: str = "linear"
    num_train_timesteps: PositiveInt = 1000
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str = "leading"
    trained_betas: None = None


def unet(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Values of UNetConfig from `unet/config.json`."""
    _refuse_strange(values, UNET_FIXED, _UNetFile, FREE["unet"], where)
    read = _read(values, _UNetFile, where)
    down = _attention(read.down_block_types, where)
    if down != _attention(read.up_block_types, where)[::-1]:
        raise ModelError(f"{where}: up_block_types do not mirror down_block_types; such a UNet cannot be built here")
    # `attention_head_dim` is the number of heads in these files, in spite of its name.
    heads = read.num_attention_heads or read.attention_head_dim
    per_level = heads if isinstance(heads, tuple) else (heads,) * len(read.block_out_channels)
    head_widths = {width // count for width, count in zip(read.block_out_channels, per_level, strict=False)}
    if len(set(per_level)) > 1 and len(head_widths) > 1:
        raise ModelError(f"{where}: heads differ between levels in number and in width; use another model")
    same = len(set(per_level)) == 1
    return {
        "in_channels": read.in_channels,
        "out_channels": read.out_channels,
        **_levels(read.block_out_channels, where),
        "res_blocks": _one(read.layers_per_block, "layers_per_block", where),
        "attention": down,
        "transformer_depth": _one(read.transformer_layers_per_block, "transformer_layers_per_block", where),
        "heads": per_level[0] if same else None,
        "head_width": None if same else head_widths.pop(),
        "context_width": read.cross_attention_dim,
        "linear_projection": read.use_linear_projection,
        "groups": read.norm_num_groups,
    }


def autoencoder(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Values of AutoencoderConfig from `vae/config.json`."""
    _refuse_strange(values, AUTOENCODER_FIXED, _AutoencoderFile, FREE["vae"], where)
    read = _read(values, _AutoencoderFile, where)
    kinds = {*read.down_block_types, *read.up_block_types}
    if strange := kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise ModelError(f"{where}: has blocks of kind {sorted(strange)[0]}, unknown here; use another model")
    if read.in_channels != read.out_channels:
        raise ModelError(
            f"{where}: in_channels {read.in_channels} is not out_channels {read.out_channels}; use another model"
        )
    return {
        "kind": "kl",
        **_levels(read.block_out_channels, where),
        "res_blocks": read.layers_per_block,
        "mid_attention": read.mid_block_add_attention,
        "groups": read.norm_num_groups,
        "image_channels": read.in_channels,
        "latent_channels": read.latent_channels,
        "latent_mean": (read.shift_factor or 0.0,) * read.latent_channels,
        "latent_std": (1 / read.scaling_factor,) * read.latent_channels,
    }


def text(values: Mapping[str, Any], padding: str, where: Path) -> dict[str, Any]:
    """Values of ClipTextConfig from `text_encoder/config.json`; `padding` is what the tokenizer fills rows with."""
    for key, allowed in TEXT_FIXED.items():
        _refuse_value(values, key, allowed, where)
    known = {key: value for key, value in values.items() if key in _TextFile.model_fields}
    read = _read(known, _TextFile, where)
    if read.use_attention_mask:
        raise ModelError(f"{where}: use_attention_mask is on, which has no counterpart here; use another model")
    if read.intermediate_size != 4 * read.hidden_size:
        raise ModelError(
            f"{where}: intermediate_size {read.intermediate_size}, expected 4 · {read.hidden_size}; use another model"
        )
    return {
        "kind": "clip",
        "width": read.hidden_size,
        "layers": read.num_hidden_layers,
        "heads": read.num_attention_heads,
        "context_length": read.max_position_embeddings,
        "vocabulary": read.vocab_size,
        "activation": read.hidden_act,
        "hidden": "last",
        "padding": padding,
        "tokenizer": "hf",
    }


def scheduler(values: Mapping[str, Any], where: Path) -> tuple[dict[str, Any], Prediction, str]:
    """Values of NoiseScheduleConfig from `scheduler_config.json`, what the UNet predicts, and the spacing of steps."""
    for key, allowed in SCHEDULER_FIXED.items():
        _refuse_value(values, key, allowed, where)
    known = {key: value for key, value in values.items() if key in _SchedulerFile.model_fields}
    read = _read(known, _SchedulerFile, where)
    if read.prediction_type not in PREDICTIONS:
        raise ModelError(
            f"{where}: prediction_type is {read.prediction_type!r}, expected {' or '.join(PREDICTIONS)}; correct it"
        )
    schedule: dict[str, Any] = {
        "kind": read.beta_schedule,
        "beta_start": read.beta_start,
        "beta_end": read.beta_end,
        "timesteps": read.num_train_timesteps,
    }
    if read.rescale_betas_zero_snr:
        if read.beta_schedule != "scaled_linear":
            raise ModelError(f"{where}: rescale_betas_zero_snr with linear betas is unknown here; use another model")
        schedule["kind"] = ZERO_SNR
    return schedule, PREDICTIONS[read.prediction_type], read.timestep_spacing


def _levels(widths: tuple[int, ...], where: Path) -> dict[str, Any]:
    """Channels of the finest level, and how many times as wide each level is."""
    if not widths or any(width % widths[0] for width in widths):
        raise ModelError(f"{where}: block_out_channels {widths} are no multiples of the first; use another model")
    return {"channels": widths[0], "multipliers": tuple(width // widths[0] for width in widths)}


def _attention(kinds: tuple[str, ...], where: Path) -> tuple[bool, ...]:
    strange = [kind for kind in kinds if kind not in ATTENTION]
    if strange:
        raise ModelError(f"{where}: has blocks of kind {strange[0]}, unknown here; use another model")
    return tuple(ATTENTION[kind] for kind in kinds)


def _one(value: int | tuple[int, ...], key: str, where: Path) -> int:
    """The value that is the same on every level."""
    values = set(value) if isinstance(value, tuple) else {value}
    if len(values) != 1:
        raise ModelError(f"{where}: {key} differs between levels, which is not supported; use another model")
    return values.pop()


def _refuse_value(values: Mapping[str, Any], key: str, allowed: tuple[Any, ...], where: Path) -> None:
    if key in values and values[key] not in allowed:
        expected = " or ".join(repr(value) for value in allowed)
        raise ModelError(f"{where}: {key} is {values[key]!r}, expected {expected}; such a model cannot be built here")


def _refuse_strange(
    values: Mapping[str, Any], fixed: dict[str, tuple[Any, ...]], schema: type[Config], free: set[str], where: Path
) -> None:
    """Refuse a setting that we have in another way, and one that we do not have and that is switched on."""
    for key, value in values.items():
        if key in fixed:
            _refuse_value(values, key, fixed[key], where)
        elif key not in schema.model_fields and key not in free and not key.startswith("_") and value:
            raise ModelError(f"{where}: {key} is {value!r}, which has no counterpart here; use another model")


def _read(values: Mapping[str, Any], schema: type[ConfigType], where: Path) -> ConfigType:
    known = {key: value for key, value in values.items() if key in schema.model_fields}
    try:
        return configuration.validate(known, schema, str(where))
    except SettingError as error:
        raise ModelError(str(error)) from None
