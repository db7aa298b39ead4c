"""One weight, four names: ours (which are diffusers'), CompVis's, Hugging Face CLIP's and open_clip's.

Every table here is made from a config, so it lists exactly the tensors that a file of that model holds. Names come from
the public files of Stable Diffusion 1 and 2 and from the modules that wrote them (CompVis/latent-diffusion:
`openaimodel.py`, `diffusionmodules/model.py`, `ema.py`).
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.models.autoencoder import AutoencoderConfig
    from ldm.models.text import ClipTextConfig
    from ldm.models.unet import UNetConfig

# Where the parts are in a single file.
UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
EMA = "model_ema."
# The text tower: Hugging Face's names in SD 1.x (files of NovelAI's descent lack `text_model.`), open_clip's in SD 2.x.
HF_TEXT = "cond_stage_model.transformer.text_model."
HF_TEXT_BARE = "cond_stage_model.transformer."
OPEN_CLIP_TEXT = ("cond_stage_model.model.", "conditioner.embedders.0.model.")

# What training left in real files and no picture needs: the noise schedule, which a config says in four numbers, CLIP's
# way to its image tower, token positions (a range, which merges of files have been known to damage), losses, markers.
LEFT_OVER_NAMES = frozenset(
    {
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        *("lvlb_weights", "logvar", "scale_factor", "denoiser.sigmas", "v_pred", "ztsnr"),
        *(f"{prefix}embeddings.position_ids" for prefix in (HF_TEXT, HF_TEXT_BARE)),
        *(f"{HF_TEXT_BARE}{name}" for name in ("text_projection.weight", "logit_scale")),
        *(f"{prefix}{name}" for prefix in OPEN_CLIP_TEXT for name in ("text_projection", "logit_scale", "attn_mask")),
    }
)
LEFT_OVER_PREFIXES = (EMA, f"{AUTOENCODER}loss.", "embedding_manager.")

# Inside a residual block and in the attention of the autoencoder's middle: ours, theirs.
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
AUTOENCODER_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# What diffusers called these four before 2023; files with the old names are still about.
OLD_DIFFUSERS_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

Modules = Iterable[tuple[str, str]]


def is_left_over(name: str) -> bool:
    """Whether a tensor of a single file is none of the model's weights, and known to be none."""
    return name in LEFT_OVER_NAMES or name.startswith(LEFT_OVER_PREFIXES)


def ema_name(compvis: str) -> str:
    """The averaged twin of a UNet weight, named without `model.diffusion_model.`: all dots are gone (`LitEma`)."""
    return EMA + f"diffusion_model.{compvis}".replace(".", "")


def _parameters(modules: Modules, without_bias: tuple[str, ...] = ()) -> dict[str, str]:
    """The weight and bias of modules; none of ours whose name ends in one of `without_bias` has the latter."""
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in modules
        for kind in ("weight", "bias")
        if kind == "weight" or not ours.endswith(without_bias or ("\0",))
    }


def unet_to_compvis(config: "UNetConfig") -> dict[str, str]:
    """Our name of every UNet tensor → its name behind `model.diffusion_model.`."""
    return _parameters(_unet(config), without_bias=(".to_q", ".to_k", ".to_v"))


def _unet(config: "UNetConfig") -> Iterator[tuple[str, str]]:
    yield from (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"))
    yield from (("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"))
    yield from _unet_down(config)
    yield from _unet_resnet("mid_block.resnets.0", "middle_block.0", shortcut=False)
    yield from _transformer("mid_block.attentions.0", "middle_block.1", config.transformer_depth)
    yield from _unet_resnet("mid_block.resnets.1", "middle_block.2", shortcut=False)
    yield from _unet_up(config)


def _unet_down(config: "UNetConfig") -> Iterator[tuple[str, str]]:
    """The way down: one numbered input block for each residual block (with its transformer) and each downsampler."""
    number, previous = 1, config.widths[0]
    for level, width in enumerate(config.widths):
        ours = f"down_blocks.{level}"
        for index in range(config.res_blocks):
            yield from _unet_resnet(f"{ours}.resnets.{index}", f"input_blocks.{number}.0", previous != width)
            if config.attention[level]:
                theirs = f"input_blocks.{number}.1"
                yield from _transformer(f"{ours}.attentions.{index}", theirs, config.transformer_depth)
            number, previous = number + 1, width
        if level < len(config.widths) - 1:
            yield f"{ours}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1


def _unet_up(config: "UNetConfig") -> Iterator[tuple[str, str]]:
    """The way up: one numbered output block for each residual block, the last of a level with the upsampler."""
    widths = config.widths
    skips = [widths[0]]
    for level, width in enumerate(widths):
        skips += [width] * (config.res_blocks + (level < len(widths) - 1))
    number, previous = 0, widths[-1]
    for level in reversed(range(len(widths))):
        ours = f"up_blocks.{len(widths) - 1 - level}"
        for index in range(config.res_blocks + 1):
            theirs = f"output_blocks.{number}"
            shortcut = previous + skips.pop() != widths[level]
            yield from _unet_resnet(f"{ours}.resnets.{index}", f"{theirs}.0", shortcut)
            if config.attention[level]:
                yield from _transformer(f"{ours}.attentions.{index}", f"{theirs}.1", config.transformer_depth)
            number, previous = number + 1, widths[level]
        if level > 0:
            yield f"{ours}.upsamplers.0.conv", f"{theirs}.{1 + config.attention[level]}.conv"


def _unet_resnet(ours: str, theirs: str, shortcut: bool) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in UNET_RESNET.items())
    if shortcut:
        yield f"{ours}.conv_shortcut", f"{theirs}.skip_connection"


def _transformer(ours: str, theirs: str, depth: int) -> Iterator[tuple[str, str]]:
    """A spatial transformer: diffusers kept CompVis's names here."""
    projections = [f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")]
    block = [*projections, "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
    inside = [f"transformer_blocks.{index}.{name}" for index in range(depth) for name in block]
    yield from ((f"{ours}.{name}", f"{theirs}.{name}") for name in ("norm", "proj_in", *inside, "proj_out"))


def autoencoder_to_compvis(config: "AutoencoderConfig") -> dict[str, str]:
    """Our name of every autoencoder tensor → its name behind `first_stage_model.`.

    CompVis keeps the attention's four projections as 1×1 convolutions: `is_convolution_in_compvis`.
    """
    return _parameters(_autoencoder(config))


def is_convolution_in_compvis(ours: str) -> bool:
    """Whether a weight (out, in) of our autoencoder is (out, in, 1, 1) in CompVis's file."""
    inside = ours.startswith(("encoder.mid_block.attentions.", "decoder.mid_block.attentions."))
    return inside and ours.endswith(".weight") and ".group_norm." not in ours


def _autoencoder(config: "AutoencoderConfig") -> Iterator[tuple[str, str]]:
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    top = len(widths) - 1
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv"))
    for coder in ("encoder", "decoder"):
        yield from ((f"{coder}.{name}", f"{coder}.{name}") for name in ("conv_in", "conv_out"))
        yield f"{coder}.conv_norm_out", f"{coder}.norm_out"
        yield from _autoencoder_middle(f"{coder}.mid_block", f"{coder}.mid", config.mid_attention)
    yield from _autoencoder_levels("encoder.down_blocks", "encoder.down", widths, config.res_blocks, range(top + 1))
    # CompVis numbers the decoder's levels by their side, finest 0; diffusers in the order they run.
    order = range(top, -1, -1)
    yield from _autoencoder_levels("decoder.up_blocks", "decoder.up", widths[::-1], config.res_blocks + 1, order)
    for level in range(top):
        yield f"encoder.down_blocks.{level}.downsamplers.0.conv", f"encoder.down.{level}.downsample.conv"
        yield f"decoder.up_blocks.{level}.upsamplers.0.conv", f"decoder.up.{top - level}.upsample.conv"


def _autoencoder_middle(ours: str, theirs: str, attention: bool) -> Iterator[tuple[str, str]]:
    yield from _autoencoder_resnet(f"{ours}.resnets.0", f"{theirs}.block_1", shortcut=False)
    if attention:
        names = AUTOENCODER_ATTENTION.items()
        yield from ((f"{ours}.attentions.0.{a}", f"{theirs}.attn_1.{b}") for a, b in names)
    yield from _autoencoder_resnet(f"{ours}.resnets.1", f"{theirs}.block_2", shortcut=False)


def _autoencoder_levels(
    ours: str, theirs: str, widths: list[int], res_blocks: int, numbers: Iterable[int]
) -> Iterator[tuple[str, str]]:
    """The residual blocks of one coder in the order they run; `numbers` are CompVis's for these levels."""
    previous = widths[0]
    for level, (width, number) in enumerate(zip(widths, numbers, strict=True)):
        for index in range(res_blocks):
            pair = (f"{ours}.{level}.resnets.{index}", f"{theirs}.{number}.block.{index}")
            yield from _autoencoder_resnet(*pair, shortcut=previous != width)
            previous = width


def _autoencoder_resnet(ours: str, theirs: str, shortcut: bool) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{name}", f"{theirs}.{name}") for name in ("norm1", "conv1", "norm2", "conv2"))
    if shortcut:
        yield f"{ours}.conv_shortcut", f"{theirs}.nin_shortcut"


def text_to_open_clip(config: "ClipTextConfig") -> dict[str, str]:
    """Our name of every tensor of the text tower → open_clip's, as in SD 2.x behind `cond_stage_model.model.`."""
    names = ["token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias"]
    block = ["attn.in_proj_weight", "attn.in_proj_bias"]
    modules = ("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    block += [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    names += [f"transformer.resblocks.{layer}.{name}" for layer in range(config.layers) for name in block]
    return {f"tower.{name}": name for name in names}


def text_to_hf(config: "ClipTextConfig") -> dict[str, tuple[str, ...]]:
    """Our name of every tensor of the text tower → Hugging Face's behind `text_model.`, as in SD 1.x.

    Three names are query, key and value, which our tensor holds one behind the other along axis 0.
    """
    names: dict[str, tuple[str, ...]] = {
        "tower.token_embedding.weight": ("embeddings.token_embedding.weight",),
        "tower.positional_embedding": ("embeddings.position_embedding.weight",),
    }
    renamed = {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2"}
    renamed |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        names[f"tower.ln_final.{kind}"] = (f"final_layer_norm.{kind}",)
        for layer in range(config.layers):
            ours, theirs = f"tower.transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            fused = tuple(f"{theirs}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            names[f"{ours}.attn.in_proj_{kind}"] = fused
            names |= {f"{ours}.{a}.{kind}": (f"{theirs}.{b}.{kind}",) for a, b in renamed.items()}
    return names
