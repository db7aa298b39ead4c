"""Checkpoints are what their evidence says: every tensor has its place, and everything else is refused in words."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import compvis, full_size, header, sparse, write
from helpers import tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.bundle import Bundle, read_config
from ldm.config import validate
from ldm.errors import ModelError, SettingError
from ldm.formats import diffusers_config, diffusers_folder, keys, probe, tensors
from ldm.formats.describe import describe
from ldm.formats.evidence import FAMILIES
from ldm.formats.fill import copy, whole
from ldm.formats.finding import find
from ldm.formats.read import open_model
from ldm.formats.single_file import CONFIG_KEY
from ldm.formats.tensors import MemoryTensor, read_header
from ldm.models.model_config import ModelConfig
from ldm.models.unet import UNetConfig
from ldm.request import GenerationRequest, resolve

ROOT = Path(__file__).resolve().parent.parent
SAMPLING = {"width": 512, "height": 512}
SD1 = {"text": {"kind": "clip", "tokenizer": "hf"}, "unet": {}}
SD2 = {
    "text": {"kind": "clip", "width": 1024, "layers": 24, **FAMILIES[1024].text},
    "unet": {"context_width": 1024, "linear_projection": True, **FAMILIES[1024].unet},
}


def config_of(values: dict[str, Any], **unet: Any) -> ModelConfig:
    values = {**values, "unet": {**values["unet"], **unet}, "autoencoder": {"kind": "kl"}, "sampling": SAMPLING}
    return validate(values, ModelConfig, "test")


# Headers ---------------------------------------------------------------------------------------------------------

ONE = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def packed(entries: object, data: int = 24) -> bytes:
    text = entries.encode() if isinstance(entries, str) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def changed(**entry: object) -> bytes:
    return packed({"a": {**ONE["a"], **entry}})


WHOLE = "not a whole safetensors file"
BAD_FILES = {
    "empty": (b"", f"{WHOLE} (it has 0 bytes); copy or download it again"),
    "4 bytes": (b"\x01\0\0\0", f"{WHOLE} (it has 4 bytes)"),
    "half a header": (packed(ONE)[:40], f"{WHOLE} (a header of "),
    "last byte torn": (packed(ONE)[:-1], f"{WHOLE} (23 bytes of numbers, expected 24)"),
    "one byte more": (packed(ONE, 25), f"{WHOLE} (25 bytes of numbers, expected 24)"),
    "header of 2^40 bytes": ((2**40).to_bytes(8, "little") + b"{}" * 50, f"{WHOLE} (a header of 1099511627776 bytes"),
    "overlap": (packed({**ONE, "b": {**ONE["a"], "data_offsets": [12, 36]}}, 36), "b lies at 12 to 36"),
    "hole": (packed({"a": ONE["a"], "b": {**ONE["a"], "data_offsets": [30, 54]}}, 54), "b lies at 30 to 54"),
    "shape of other size": (changed(shape=[2, 4]), "a lies at 0 to 24"),
    "negative shape": (changed(shape=[-2, -3]), "a has a strange shape"),
    "shape of text": (changed(shape=["2", 3]), "a has a strange shape"),
    "unknown dtype": (changed(dtype="F31"), "a has the unknown number format 'F31'"),
    "dtype a list": (changed(dtype=[1]), "in its header"),
    "no offsets": (packed({"a": {"dtype": "F32", "shape": []}}, 4), "'data_offsets' in its header"),
    "metadata of numbers": (packed({"__metadata__": {"a": 1}, **ONE}), "its metadata is not text"),
    "a name twice": (packed('{"a": 1, "a": 2}'), "a name is there twice"),
    "a list": (packed("[1]"), WHOLE),
    "deep": (packed("[" * 100_000), "its header is not JSON"),
    "not UTF-8": ((3).to_bytes(8, "little") + b'{"\xff', "its header is not JSON"),
    "zip": (b"PK\x03\x04" + bytes(60), "is a pickle file; convert it: python scripts/convert.py"),
    "pickle": (b"\x80\x02}q\x00." + bytes(60), "is a pickle file; convert it: python scripts/convert.py"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "is a web page, not a model"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer, not a model"),
    "GGUF": (b"GGUF" + bytes(60), "is a GGUF file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_by_what_is_wrong_with_it(tmp_path: Path, name: str) -> None:
    data, words = BAD_FILES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value) and "; " in str(caught.value)


def test_a_good_header_is_read_and_its_numbers_are_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK", 8)  # one row at a time
    known = {"a": torch.randn(3, 2), "b": torch.tensor(1.5), "c": torch.zeros(0, 4), "d": torch.randn(5).bfloat16()}
    save_file(known, tmp_path / "x", {"format": "pt"})
    found = read_header(tmp_path / "x")
    assert found.metadata == {"format": "pt"}
    assert all(torch.equal(whole(found.tensors[name], name), tensor) for name, tensor in known.items())


def special(kind: str, folder: Path) -> Path:
    path = folder / "model"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "lost link":
        path.symlink_to(folder / "gone")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pipe", "neither a file nor a folder"),
        ("device", "neither a file nor a folder"),
        ("lost link", "cannot be read (No such file or directory)"),
        ("loop", "cannot be read (Too many levels of symbolic links)"),
        ("folder", "not a model folder, it has no config.yaml and no model_index.json"),
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, words: str) -> None:
    path = special(kind, tmp_path)
    for look in (find, Bundle.load):
        with pytest.raises(ModelError) as caught:
            look(str(path))
        assert words in str(caught.value)


# What a file is --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of full size with the names and shapes of Stable Diffusion's, without numbers."""
    folder = tmp_path_factory.mktemp("big")
    sd1 = full_size(config_of(SD1), keys.HF_TEXT)
    sd2 = full_size(config_of(SD2), keys.OPEN_CLIP_TEXT[0])
    names = {
        "SD1": sd1 | {f"{keys.HF_TEXT}embeddings.position_ids": (1, 77), "betas": (1000,)},
        "SD2": sd2 | {"cond_stage_model.model.text_projection": (1024, 1024), "cond_stage_model.model.logit_scale": ()},
        "SD2 of 23 blocks": {name: shape for name, shape in sd2.items() if ".resblocks.23." not in name},
        "inpainting": sd1 | {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)},
        "v marked": sd1 | {"v_pred": ()},
        "zero SNR": sd1 | {"v_pred": (), "ztsnr": ()},
        "NovelAI": {name.replace("transformer.text_model.", "transformer."): shape for name, shape in sd1.items()},
    }
    return {name: sparse(folder / f"{name}.safetensors", shapes) for name, shapes in names.items()}


@pytest.mark.parametrize(
    ("name", "architecture", "prediction", "layers", "left_over"),
    [
        ("SD1", "Stable Diffusion 1.x", None, "12 layers, Hugging Face names", 2),
        ("SD2", "Stable Diffusion 2.x", None, "24 layers, open_clip names", 2),
        ("SD2 of 23 blocks", "Stable Diffusion 2.x", None, "23 layers, open_clip names", 0),
        ("inpainting", "Stable Diffusion 1.x inpainting", None, "12 layers", 0),
        ("v marked", "Stable Diffusion 1.x", "v", "12 layers", 1),
        ("NovelAI", "Stable Diffusion 1.x", None, "12 layers, Hugging Face names", 0),
    ],
)
def test_a_file_of_full_size_is_told_from_its_header(
    big: dict[str, Path], name: str, architecture: str, prediction: str | None, layers: str, left_over: int
) -> None:
    said = describe(big[name])
    assert (said.architecture, said.prediction, said.left_over) == (architecture, prediction, left_over)
    assert layers in said.text
    assert said.is_inpainting == (name == "inpainting")
    assert list(said.formats) == ["F16"] and not said.has_config and not said.has_ema


@pytest.mark.parametrize("name", ["SD1", "SD2", "SD2 of 23 blocks", "inpainting", "zero SNR", "NovelAI"])
def test_every_tensor_of_a_file_of_full_size_has_its_place(big: dict[str, Path], name: str) -> None:
    opened = open_model(big[name])
    assert opened.description.tensors == sum(
        len(stored.parts)  # type: ignore[attr-defined]  # these are joined
        for part in opened.parts.values()
        for stored in part.values()
    )
    config = opened.config
    if name.startswith("SD2"):
        assert config.text == config_of(SD2).text.model_copy(
            update={"tokenizer": "hf", "layers": 23, "hidden": "last"}
            if "23" in name
            else {"tokenizer": "hf", "hidden": "penultimate"}
        )
        assert config.unet == config_of(SD2).unet
        assert opened.predicting("v", "").config.sampling.width == 768
    else:
        assert config.text == config_of(SD1).text
        assert config.unet == config_of(SD1, in_channels=9 if name == "inpainting" else 4).unet
    assert config.is_inpainting == (name == "inpainting")
    assert config.noise_schedule.kind == ("scaled_linear_zero_snr" if name == "zero SNR" else "scaled_linear")
    assert (config.sampling.width, config.sampling.convention, config.sampling.steps) == (512, "diffusers", 50)


def test_describe_needs_no_torch_and_no_second(big: dict[str, Path]) -> None:
    code = "import sys; from pathlib import Path; from ldm.formats.describe import describe\n"
    code += "said = describe(Path(sys.argv[1])); assert 'torch' not in sys.modules; print(said.architecture)"
    command = [sys.executable, "-c", code, str(big["SD1"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "Stable Diffusion 1.x\n"


def test_an_inpainting_model_is_not_drawn_with_from_text_alone(big: dict[str, Path]) -> None:
    config = open_model(big["inpainting"]).config
    with pytest.raises(SettingError, match=r"model: its UNet reads 9 channels, .* for inpainting; "):
        resolve(GenerationRequest(prompt="a cat"), config)


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TO_K = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
OTHERS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "SDXL": (
        {CONV_IN: (320, 4, 3, 3), TO_K: (640, 2048), "model.diffusion_model.label_emb.0.0.weight": (1280, 2816)},
        "this is an SDXL file: cross-attention 2048, expected 768 or 1024",
    ),
    "another width": (
        {
            CONV_IN: (320, 4, 3, 3), TO_K: (640, 512), "first_stage_model.x": (1,),
            "cond_stage_model.model.token_embedding.weight": (9, 512),
        },
        "cross-attention 512, expected 768 or 1024",
    ),
    "no text": ({CONV_IN: (320, 4, 3, 3)}, "its UNet has no cross-attention"),
    "UNet alone": ({CONV_IN: (320, 4, 3, 3), TO_K: (640, 768)}, "holds no text encoder and no autoencoder"),
    "LoRA": ({"lora_unet_down_blocks_0.lora_down.weight": (4, 320)}, "this is a LoRA"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "this is a ControlNet"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (9, 3)}, "this is a Flux or SD3 file"),
    "VAE": ({"encoder.conv_in.weight": (128, 3, 3, 3)}, "this is an autoencoder alone"),
    "part of a folder": ({"down_blocks.0.resnets.0.conv1.weight": (3, 3)}, "this is one part of a diffusers folder"),
    "textual inversion": ({"emb_params": (1, 768)}, "this is a textual inversion"),
    "anything": ({"weight": (1, 768)}, "no Stable Diffusion model: it has no tensor model.diffusion_model."),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_file_is_named(tmp_path: Path, name: str) -> None:
    shapes, words = OTHERS[name]
    path = sparse(tmp_path / "x.safetensors", shapes)
    for look in (describe, open_model):
        with pytest.raises(ModelError) as caught:
            look(path)
        assert words in str(caught.value)


# A whole model in one file ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return tiny_model()


def same(found: Bundle, known: Bundle) -> bool:
    return all(
        torch.equal(tensor, getattr(found, part).state_dict()[name])
        for part in ("autoencoder", "text", "unet")
        for name, tensor in getattr(known, part).state_dict().items()
    )


@pytest.mark.parametrize("text", [keys.HF_TEXT, keys.HF_TEXT_BARE, *keys.OPEN_CLIP_TEXT])
@pytest.mark.parametrize("wrapper", ["", "state_dict."])
def test_a_single_file_is_the_model_it_was_made_from(tmp_path: Path, tiny: Bundle, text: str, wrapper: str) -> None:
    extra = {
        f"{keys.HF_TEXT}embeddings.position_ids": torch.full((1, 16), 7.3),
        "alphas_cumprod": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5),
    }
    state = {wrapper + name: tensor for name, tensor in (compvis(tiny, text) | extra).items()}
    found = Bundle.load(str(write(tmp_path / "tiny.safetensors", state, tiny.config)))
    assert same(found, tiny)
    assert found.config == tiny.config
    assert found.name == "tiny.safetensors"


def test_averaged_weights_are_taken_where_they_are_asked_for(tmp_path: Path, tiny: Bundle) -> None:
    state = compvis(tiny)
    for name, tensor in list(state.items()):
        if name.startswith(keys.UNET):
            state[keys.ema_name(name.removeprefix(keys.UNET))] = tensor + 1
    path = write(tmp_path / "x.safetensors", state, tiny.config)
    assert describe(path).has_ema
    plain, averaged = (open_model(path, ema=ema).parts["unet"]["conv_in.weight"] for ema in (False, True))
    assert torch.equal(whole(averaged, ""), whole(plain, "") + 1)
    del state["model_ema.diffusion_modeltime_embed0bias"]
    with pytest.raises(ModelError, match=r"1 missing: model_ema\.diffusion_modeltime_embed0bias; "):
        open_model(write(path, state, tiny.config), ema=True)
    with pytest.raises(ModelError, match=r"has no averaged weights"):
        open_model(write(path, compvis(tiny), tiny.config), ema=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_the_number_format_asked_for(
    tmp_path: Path, tiny: Bundle, dtype: torch.dtype
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in compvis(tiny).items()}
    found = Bundle.load(str(write(tmp_path / "x.safetensors", state, tiny.config)))
    ours = found.unet.state_dict()["conv_in.weight"]
    assert ours.dtype == torch.float32
    assert torch.equal(ours, tiny.unet.state_dict()["conv_in.weight"].to(dtype).float())
    assert {tensor.dtype for tensor in found.unet.state_dict().values()} == {torch.float32}


def without(state: dict[str, Tensor]) -> None:
    del state["first_stage_model.decoder.conv_in.bias"]


def with_more(state: dict[str, Tensor]) -> None:
    state |= {f"model.diffusion_model.extra.{number}": torch.zeros(1) for number in range(7)}


def misshapen(state: dict[str, Tensor]) -> None:
    state[CONV_IN] = state[CONV_IN][:, :3].clone()


def not_finite(state: dict[str, Tensor]) -> None:
    state[CONV_IN][0, 0, 0, :2] = float("inf")


def whole_numbers(state: dict[str, Tensor]) -> None:
    state[CONV_IN] = state[CONV_IN].long()


def doubles(state: dict[str, Tensor]) -> None:
    state[CONV_IN] = state[CONV_IN].double()


FIVE = ", ".join(f"model.diffusion_model.extra.{number}" for number in range(5))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without, "1 missing: first_stage_model.decoder.conv_in.bias; "),
        (with_more, f"7 unexpected: {FIVE}; "),
        (misshapen, f"1 of another shape: {CONV_IN} (16, 3, 3, 3), expected (16, 4, 3, 3); "),
        (not_finite, "conv_in.weight holds 2 values that are not finite; "),
        (whole_numbers, "conv_in.weight is I64, expected fp32, fp16 or bf16; "),
        (doubles, "conv_in.weight is F64, expected fp32, fp16 or bf16; "),
    ],
)
def test_a_tensor_too_few_too_many_or_damaged_is_named(
    tmp_path: Path, tiny: Bundle, damage: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    state = compvis(tiny)
    damage(state)
    with pytest.raises(ModelError) as caught:
        Bundle.load(str(write(tmp_path / "x.safetensors", state, tiny.config)))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": {"kind": "clip", "width": 32, "layers": 10**9, "heads": 4}}, "its config asks for"),
        ({"unet": {"channels": 10**6, "context_width": 32, "groups": 4, "heads": 2}}, "its config asks for"),
        ({"text": {"kind": "labels", "labels": ["a"], "width": 32}}, "only a CLIP text tower and a KL autoencoder"),
        ({"prediction": "w"}, "prediction: Input should be 'eps', 'v' or 'x0'"),
        ({"extra": 1}, "extra: no such key"),
        ({"unet": {"context_width": 64, "groups": 4, "channels": 16, "heads": 2}}, "text encoder is 32 wide"),
    ],
)
def test_a_hostile_config_in_the_metadata_is_refused(
    tmp_path: Path, tiny: Bundle, change: dict[str, Any], words: str
) -> None:
    values = {**tiny.config.model_dump(mode="json"), **change}
    save_file(compvis(tiny), tmp_path / "x", {CONFIG_KEY: json.dumps(values)})
    with pytest.raises(ModelError) as caught:
        open_model(tmp_path / "x")
    assert words in str(caught.value)
    save_file(compvis(tiny), tmp_path / "x", {CONFIG_KEY: "[" * 9999})
    with pytest.raises(ModelError, match="is not a config"):
        open_model(tmp_path / "x")


def test_a_files_own_word_can_be_overruled(tmp_path: Path, tiny: Bundle) -> None:
    path = write(tmp_path / "x.safetensors", compvis(tiny), tiny.config)
    assert open_model(path).config.prediction == "v"
    opened = open_model(path, prediction="eps")
    assert (opened.config.prediction, opened.description.prediction_reason) == ("eps", "you say so")
    assert Bundle.load(str(path), prediction="eps").config.prediction == "eps"
    assert read_config(path, prediction="eps").sampling == tiny.config.sampling


# The probe -------------------------------------------------------------------------------------------------------


class Answers(nn.Module):
    """In place of a UNet: answers with what a network that was trained to say ε or v says at the last timestep."""

    def __init__(self, says: str, in_channels: int) -> None:
        super().__init__()
        self.says, self.config = says, UNetConfig(in_channels=in_channels)
        self.conv_in = nn.Conv2d(in_channels, 1, 1)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        assert float(t) == 999.0 and x.shape[1] == self.config.in_channels
        noise, picture = x[:, :4], torch.linspace(-1, 1, 4 * x.shape[2] * x.shape[3]).view_as(x[:, :4])
        root, rest = 0.0683, 0.9977  # √ᾱ and √(1−ᾱ) of timestep 999
        return {"eps": rest * noise + root * picture, "v": root * noise - rest * picture}[self.says]


@pytest.mark.parametrize("says", ["eps", "v"])
@pytest.mark.parametrize("in_channels", [4, 9])
def test_a_unet_that_is_asked_says_what_it_predicts(says: str, in_channels: int) -> None:
    prediction, reason = probe.ask(Answers(says, in_channels), torch.zeros(1, 77, 768))  # type: ignore[arg-type]  # answers in place of a UNet
    assert prediction == says
    assert ("does not give back" in reason) == (says == "v")


# Folders of diffusers: the settings that we lack -------------------------------------------------------------------

UNET = {
    "_class_name": "UNet2DConditionModel",
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
    "addition_embed_type": None,
    "upcast_attention": True,
}


def test_the_config_of_a_unet_is_ours() -> None:
    where = Path("unet/config.json")
    assert UNetConfig.model_validate(diffusers_config.unet(UNET, where)) == UNetConfig()
    second = {**UNET, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
    assert UNetConfig.model_validate(diffusers_config.unet(second, where)) == config_of(SD2).unet


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time', which has no counterpart here"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256, which has no counterpart"),
        ({"dual_cross_attention": True}, "dual_cross_attention is True"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos is False, expected True"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06, expected 1e-05"),
        ({"layers_per_block": [1, 2, 2, 2]}, "layers_per_block differs between levels"),
        ({"attention_head_dim": [5, 8, 8, 8]}, "heads differ between levels"),
        ({"down_block_types": ["AttnDownBlock2D"]}, "blocks of kind AttnDownBlock2D"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "up_block_types do not mirror"),
        ({"block_out_channels": [320, 500]}, "are no multiples of the first"),
        ({"block_out_channels": "320"}, "block_out_channels: Input should be a valid tuple"),
        ({"cross_attention_dim": -1}, "cross_attention_dim: Input should be greater than 0"),
    ],
)
def test_a_setting_of_a_unet_that_we_lack_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as caught:
        diffusers_config.unet({**UNET, **change}, Path("unet/config.json"))
    assert str(caught.value).startswith("unet/config.json: ") and words in str(caught.value)


def test_settings_of_other_parts_that_we_lack_are_refused_by_name() -> None:
    where = Path("config.json")
    refused: list[tuple[Callable[..., object], dict[str, Any], str]] = [
        (diffusers_config.autoencoder, {"use_quant_conv": False}, "use_quant_conv is False"),
        (diffusers_config.autoencoder, {"latents_mean": [0.1]}, "latents_mean is"),
        (diffusers_config.scheduler, {"prediction_type": "flow"}, "prediction_type is 'flow'"),
        (diffusers_config.scheduler, {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2'"),
        (diffusers_config.scheduler, {"trained_betas": [0.1]}, "trained_betas: "),
        (lambda values, where: diffusers_config.text(values, "end", where), {"use_attention_mask": True}, "mask is on"),
        (lambda values, where: diffusers_config.text(values, "end", where), {"intermediate_size": 7}, "expected 4"),
    ]
    for read, values, words in refused:
        with pytest.raises(ModelError) as caught:
            read(values, where)
        assert words in str(caught.value)


def folder_with(folder: Path, **files: object) -> Path:
    for name, values in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        path.rename(path.with_suffix(".json"))
    return folder


def test_folders_of_other_pipelines_and_torn_ones_are_refused(tmp_path: Path) -> None:
    def refused(words: str, **files: object) -> None:
        with pytest.raises(ModelError) as caught:
            open_model(folder_with(tmp_path, **files))
        assert words in str(caught.value)

    refused("this is an SDXL folder", model_index={"_class_name": "StableDiffusionXLPipeline"})
    refused("this is a folder of FluxPipeline", model_index={"_class_name": "FluxPipeline"})
    refused("model_index.json: not JSON", model_index="{")
    refused("model_index.json: holds no settings", model_index="[]")
    refused("has no folder vae", model_index={"_class_name": "StableDiffusionPipeline"})


def test_weights_of_a_folder_are_one_set_of_files_beside_each_other(tmp_path: Path) -> None:
    place = tmp_path / "unet"
    place.mkdir()

    def refused(words: str) -> None:
        with pytest.raises(ModelError) as caught:
            diffusers_folder.weights(tmp_path, "unet")
        assert words in str(caught.value)

    refused("no diffusion_pytorch_model.safetensors")
    (place / "diffusion_pytorch_model.bin").touch()
    refused("only pickle files, which are never run")
    index = place / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    refused("names the file '../secret.safetensors', expected one beside it")
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    refused("part-1.safetensors: cannot be read (No such file or directory)")
    (place / "part-1.safetensors").write_bytes(header({"a": (), "b": ()}, "F32") + bytes(8))
    refused("holds other tensors than diffusion_pytorch_model.safetensors.index.json says")
    index.write_text(json.dumps({"weight_map": 5}))
    refused("has no weight_map")
    index.unlink()
    for variant in ("fp16", "ema"):
        (place / f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(header({"a": ()}, "F32") + bytes(4))
    refused("several variants and none without a variant")
    (place / "diffusion_pytorch_model.ema.safetensors").unlink()
    assert list(diffusers_folder.weights(tmp_path, "unet")) == ["a"]


def test_a_tokenizer_with_other_words_is_refused_by_name(tmp_path: Path, tiny: Bundle) -> None:
    from ldm.formats.read import _refuse_other_words

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    model = {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(ModelError, match=r"tokenizer\.json: not CLIP's vocabulary of 1024 words; "):
        _refuse_other_words(tmp_path, tiny.config)
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    with pytest.raises(ModelError, match=r"pads with '\[PAD\]'"):
        diffusers_folder.padding(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    assert diffusers_folder.padding(tmp_path) == "zero"


def test_every_number_of_fp16_becomes_the_nearest_one_of_bf16() -> None:
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    stored = patterns[patterns.isfinite()].reshape(-1, 64, 2, 2)
    made = torch.empty(stored.shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
    copy(MemoryTensor(stored), made, "a file")
    assert torch.equal(made, stored.to(torch.bfloat16))
    assert torch.equal(made.signbit(), stored.signbit())
