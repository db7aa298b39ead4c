"""One model in every layout: number for number, with its config, and what has no counterpart is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Script, few
from torch import Tensor, nn

from ldm import config as configuration
from ldm.bundle import Bundle, verify
from ldm.config import parse_yaml, validate
from ldm.errors import ModelError
from ldm.formats import keys
from ldm.formats.export_bundle import to_bundle
from ldm.formats.fill import whole
from ldm.formats.manifest import MANIFEST
from ldm.formats.read import OpenModel, open_model, open_tensors
from ldm.formats.tensors import MemoryTensor, read_header
from ldm.formats.write import write_tensors
from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.models.model_config import ModelConfig, build
from ldm.models.text import ClipTextConfig, ClipTextEncoder
from ldm.models.unet import UNet, UNetConfig

SD = """
autoencoder: {kind: kl, channels: 8, multipliers: [1, 2], res_blocks: 1, groups: 4}
text: {kind: clip, width: 32, layers: 2, heads: 4, vocabulary: 1024, %s}
unet: {channels: 16, multipliers: [1, 2], res_blocks: 1, attention: [true, false], context_width: 32, groups: 4, %s}
prediction: %s
sampling: {width: 64, height: 64, schedule: leading, convention: diffusers, steps: 2}
"""
CONFIGS = {
    "SD1": SD % ("activation: quick_gelu, padding: end", "heads: 2", "eps"),
    "SD2": SD
    % (
        "activation: gelu, padding: zero, hidden: penultimate",
        "heads: null, head_width: 8, linear_projection: true",
        "v",
    ),
}
PER_CHANNEL = {"latent_mean": (1.0, -0.3, 0.0, 0.7), "latent_std": (2.8, 0.4, 1.0, 3.0)}


def made(values: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A bundle with weights from a seed."""
    config = validate(values, ModelConfig, "made")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = build(config)
        for network in networks:
            assert isinstance(network, nn.Module)
            for weight in network.parameters():
                nn.init.normal_(weight, std=0.1)
    return Bundle("made", config, *networks).save(folder, dtype)


@pytest.fixture(scope="module", params=few(CONFIGS, "SD1"))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each version, in half precision as files usually are."""
    return made(
        parse_yaml(CONFIGS[request.param], request.param), tmp_path_factory.mktemp("models") / "made", torch.float16
    )


@pytest.fixture
def convert(in_process: Callable[[str], Script]) -> Script:
    return in_process("convert.py")


def numbers(model: OpenModel) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": whole(tensor, name)
        for part, tensors in model.parts.items()
        for name, tensor in tensors.items()
    }


def assert_same_numbers(a: OpenModel, b: OpenModel, without: tuple[str, ...] = ()) -> None:
    """The same tensors, bit for bit and in the same number format."""
    first, second = numbers(a), numbers(b)
    assert {name for name in first if not name.startswith(without or ("\0",))} == second.keys()
    assert all(first[name].dtype == second[name].dtype and first[name].equal(second[name]) for name in second)


def test_single_file_and_back_is_the_same_model(convert: Script, bundle: Path, tmp_path: Path) -> None:
    one, back = tmp_path / "one.safetensors", tmp_path / "back"
    assert convert("--to", "single-file", bundle, one).out == f"{one}\n"
    assert convert("--to", "bundle", one, back).code == 0
    assert open_model(one).config == open_model(back).config == open_model(bundle).config
    assert_same_numbers(open_model(bundle), open_model(one))
    assert_same_numbers(open_model(bundle), open_model(back))
    Bundle.load(str(back))  # the manifest agrees
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "one.safetensors"]


def test_diffusers_folder_and_back_is_the_same_model(convert: Script, bundle: Path, tmp_path: Path) -> None:
    folder, back, one = tmp_path / "folder", tmp_path / "back", tmp_path / "one.safetensors"
    assert convert("--to", "diffusers", bundle, folder).code == 0
    assert convert("--to", "bundle", folder, back).code == 0
    assert convert("--to", "single-file", folder, one).code == 0
    before, after = open_model(bundle), open_model(back)
    last = ()
    if before.config.text.hidden == "penultimate":  # type: ignore[union-attr]  # CLIP in these models
        last = ("text.tower.transformer.resblocks.1.",)  # diffusers leaves out what no picture needs
    for other in (folder, back, one):
        assert_same_numbers(before, open_model(other), without=last)
    assert after.config.unet == before.config.unet
    assert after.config.autoencoder == before.config.autoencoder
    assert after.config.prediction == before.config.prediction
    assert after.config.noise_schedule == before.config.noise_schedule
    with torch.inference_mode():
        states = [Bundle.load(str(path)).text.encode(["a red circle"]).tokens for path in (bundle, back)]
    assert torch.equal(*states)


def test_names_in_the_file_are_those_of_each_version(convert: Script, bundle: Path, tmp_path: Path) -> None:
    convert("--to", "single-file", bundle, tmp_path / "one.safetensors")
    found = read_header(tmp_path / "one.safetensors").tensors
    text = [name for name in found if name.startswith("cond_stage_model.")]
    version_1 = open_model(bundle).config.text.activation == "quick_gelu"  # type: ignore[union-attr]  # CLIP in these models
    assert all(name.startswith(keys.HF_TEXT if version_1 else keys.OPEN_CLIP_TEXT[0]) for name in text)
    assert found["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert found["model.diffusion_model.input_blocks.1.1.proj_in.weight"].shape == (16, 16) + (1, 1) * version_1


def test_latent_statistics_are_folded_and_the_check_sees_it(convert: Script, tmp_path: Path) -> None:
    values = parse_yaml(CONFIGS["SD2"], "SD2")
    values["autoencoder"] |= PER_CHANNEL
    source = made(values, tmp_path / "source", torch.float16)
    ended = convert("--to", "diffusers", source, tmp_path / "out", "--check")
    shown = [line for line in ended.out.splitlines() if "largest difference" in line]
    assert [line.split(":")[0] for line in shown] == ["text encoder", "UNet", "encoder", "decoder"]
    assert all(float(line.split("difference ")[1].split()[0]) < 1e-5 for line in shown)
    written = open_model(tmp_path / "out")
    assert isinstance(written.config.autoencoder, AutoencoderConfig)
    assert written.config.autoencoder.latent_std == (1 / 0.18215,) * 4
    assert {tensor.dtype for tensor in written.parts["autoencoder"].values()} == {"F32"}
    assert {tensor.dtype for tensor in written.parts["unet"].values()} == {"F16"}
    half = convert("--to", "diffusers", source, tmp_path / "half", "--check", "--dtype", "bfloat16").out
    decoder = float(half.splitlines()[-1].split("difference ")[1].split()[0])
    assert decoder > 1e-4  # bf16 rounds, and the comparison can tell


@pytest.mark.parametrize(
    ("autoencoder", "text", "words"),
    [
        ("{kind: pixels, image_channels: 4}", None, "diffusion in pixel space has no counterpart"),
        (None, "{kind: labels, labels: [a, b], width: 32}", "labels in place of text have no counterpart"),
        (
            None,
            "{kind: clip, width: 32, layers: 2, heads: 2, causal: false}",
            "a text tower that reads both ways has no counterpart",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(
    convert: Script, tmp_path: Path, autoencoder: str | None, text: str | None, words: str
) -> None:
    values = parse_yaml(CONFIGS["SD1"], "SD1")
    values |= {"autoencoder": parse_yaml(autoencoder, "a")} if autoencoder else {}
    values |= {"text": parse_yaml(text, "t")} if text else {}
    source = made(values, tmp_path / "source")
    for layout, name in (("single-file", "x.safetensors"), ("diffusers", "x")):
        ended = convert("--to", layout, source, tmp_path / name)
        assert ended.code == 2 and words in ended.err and "use --to bundle" in ended.err
    assert convert("--to", "bundle", source, tmp_path / "copy").code == 0
    assert_same_numbers(open_model(source), open_model(tmp_path / "copy"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "source"]


def compvis(bundle: Path, convert: Script, folder: Path) -> dict[str, Tensor]:
    """The tensors of a tiny model under CompVis's names, with averaged ones that are ten times as large."""
    convert("--to", "single-file", bundle, folder / "plain.safetensors")
    file = read_header(folder / "plain.safetensors")
    tensors = {name: whole(tensor, name) for name, tensor in file.tensors.items()}
    inside = [name.removeprefix(keys.UNET) for name in tensors if name.startswith(keys.UNET)]
    averaged = {keys.ema_name(name): 10 * tensors[keys.UNET + name] for name in inside}
    return tensors | averaged | {"model_ema.decay": torch.tensor(0.9999), "betas": torch.zeros(1000)}


def test_averaged_weights_are_taken_when_asked_for(convert: Script, bundle: Path, tmp_path: Path) -> None:
    tensors = compvis(bundle, convert, tmp_path)
    metadata = read_header(tmp_path / "plain.safetensors").metadata
    write_tensors(
        tmp_path / "both.safetensors", {name: MemoryTensor(tensor) for name, tensor in tensors.items()}, metadata
    )
    assert convert("--to", "bundle", tmp_path / "both.safetensors", tmp_path / "plain").code == 0
    assert convert("--to", "bundle", tmp_path / "both.safetensors", tmp_path / "averaged", "--ema").code == 0
    plain, averaged = (numbers(open_model(tmp_path / name)) for name in ("plain", "averaged"))
    assert_same_numbers(open_model(bundle), open_model(tmp_path / "plain"))
    assert torch.equal(averaged["unet.conv_in.weight"], 10 * plain["unet.conv_in.weight"])
    assert torch.equal(averaged["text.tower.ln_final.bias"], plain["text.tower.ln_final.bias"])
    assert convert("--to", "bundle", bundle, tmp_path / "none", "--ema").code == 4


def test_wrong_destinations_are_refused_before_anything_is_read(convert: Script, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for destination, code, words in (
        ("taken", 2, "exists and is never overwritten"),
        ("one.ckpt", 2, "does not end in .safetensors"),
        ("/proc/x/one.safetensors", 5, "cannot write there"),
    ):
        ended = convert("--to", "single-file", "no/such/model", tmp_path / destination)
        assert ended.code == code and words in ended.err and len(ended.errors) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def sd1() -> tuple[dict[str, tuple[int, ...]], ModelConfig]:
    """Names and shapes of a whole file of Stable Diffusion 1.x, in full size; without a number."""
    unet, autoencoder, text = UNetConfig(), AutoencoderConfig(), ClipTextConfig()
    with torch.device("meta"):
        networks = (UNet(unet), KLAutoencoder(autoencoder), ClipTextEncoder(text))
    shapes = [{name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} for network in networks]
    found = {keys.UNET + theirs: shapes[0][ours] for ours, theirs in keys.unet_to_compvis(unet).items()}
    for ours, theirs in keys.autoencoder_to_compvis(autoencoder).items():
        found[keys.AUTOENCODER + theirs] = shapes[1][ours] + (1, 1) * keys.is_convolution_in_compvis(ours)
    for ours, names in keys.text_to_hf(text).items():
        shape = (shapes[2][ours][0] // len(names), *shapes[2][ours][1:])
        found |= {keys.HF_TEXT + name: shape for name in names}
    left = {"betas": (1000,), "model_ema.decay": (), f"{keys.HF_TEXT}embeddings.position_ids": (1, 77)}
    sampling = {"width": 512, "height": 512}
    return found | left, ModelConfig(autoencoder=autoencoder, text=text, unet=unet, sampling=sampling)  # type: ignore[arg-type]  # kinds by name


def hollow(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """A whole safetensors file of that many zeros, which take no room on the disk."""
    header: dict[str, Any] = {"__metadata__": metadata or {}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_every_tensor_of_a_full_file_of_stable_diffusion_1_has_its_place(tmp_path: Path) -> None:
    shapes, config = sd1()
    assert len(shapes) == 1131 + 2  # v1-5-pruned-emaonly, and two that training left
    opened = open_model(hollow(tmp_path / "sd1.safetensors", shapes))
    assert (opened.config.unet, opened.config.autoencoder) == (config.unet, config.autoencoder)
    assert {part: len(tensors) for part, tensors in opened.parts.items()} == {
        "autoencoder": 248,
        "text": 148,
        "unet": 686,
    }


def test_describe_says_what_a_full_file_is_and_reads_no_weight(
    in_process: Callable[[str], Script], tmp_path: Path
) -> None:
    path = hollow(tmp_path / "sd1.safetensors", sd1()[0])
    describe = in_process("describe.py")
    ended = describe(path)
    assert ended.code == 0
    facts = {line[:18].strip(): line[18:] for line in ended.out.splitlines()}
    assert facts["model"] == "Stable Diffusion 1.x"
    assert facts["predicts"].startswith("not known yet: nothing in the file says it")
    assert facts["text"] == "CLIP, 12 layers, Hugging Face names; cross-attention 768"
    assert facts["weights"] == "1130 tensors, F16 2,132.5 MB"
    assert facts["not read"] == "3 tensors that are no weights"
    assert json.loads(describe(path, "--json").out)["model"] == "Stable Diffusion 1.x"


def test_a_ckpt_becomes_a_model(convert: Script, bundle: Path, tmp_path: Path) -> None:
    tensors = compvis(bundle, convert, tmp_path)
    torch.save({"global_step": 7, "state_dict": tensors}, tmp_path / "model.ckpt")
    ended = convert("--to", "bundle", tmp_path / "model.ckpt", tmp_path / "out")
    # A file without a config has the widths of its version: this one is neither's.
    assert ended.code == 4 and "cross-attention 32, expected 768 or 1024" in ended.err
    assert not (tmp_path / "out").exists()
    config = configuration.dump(open_model(bundle).config)
    metadata = {"ldm.config": json.dumps(parse_yaml(config, "config"))}
    stored = {name: MemoryTensor(tensor) for name, tensor in tensors.items()}
    assert_same_numbers(open_model(bundle), open_tensors(tmp_path / "model.ckpt", stored, metadata))


@pytest.mark.slow
def test_a_full_ckpt_of_stable_diffusion_1_becomes_a_file(convert: Script, tmp_path: Path) -> None:
    zero = torch.zeros(1, dtype=torch.float16)
    shapes, _ = sd1()
    tensors = {name: zero.expand(shape or (1,)).reshape(shape) for name, shape in shapes.items()}
    torch.save({"global_step": 7, "state_dict": tensors}, tmp_path / "model.ckpt")
    one = tmp_path / "one.safetensors"
    ended = convert("--to", "single-file", tmp_path / "model.ckpt", one, "--prediction", "eps")
    assert ended.code == 0, ended.err
    written = read_header(one)
    left = {"betas", "model_ema.decay", f"{keys.HF_TEXT}embeddings.position_ids"}
    assert {name: tensor.shape for name, tensor in written.tensors.items()} == {
        name: shape for name, shape in shapes.items() if name not in left
    }
    assert open_model(one).config.prediction == "eps"


def test_a_model_in_small_files_is_the_same_model(convert: Script, bundle: Path, tmp_path: Path) -> None:
    whole, small = open_model(bundle), tmp_path / "small"
    to_bundle(small, whole.config, whole.parts, largest=80_000)
    files = sorted(path.name for path in small.glob("unet-*"))
    assert len(files) > 2 and files[0] == f"unet-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size <= 80_000 or len(read_header(path).tensors) == 1 for path in small.glob("*.safe*"))
    assert_same_numbers(whole, open_model(small))
    assert len(verify(small)) == 64
    states = [Bundle.load(str(path)).text.encode(["a red circle"]).tokens for path in (bundle, small)]
    assert torch.equal(*states)
    assert convert("--to", "bundle", small, tmp_path / "back", "--largest", "16").code == 0
    assert (tmp_path / "back" / "unet.safetensors").is_file()
    assert convert("--to", "single-file", small, tmp_path / "one.safetensors", "--largest", "16").code == 2


def test_a_bundle_can_share_networks_with_the_one_beside_it(convert: Script, bundle: Path, tmp_path: Path) -> None:
    first, other, second = (tmp_path / name for name in ("first", "other", "second"))
    model = Bundle.load(str(bundle))
    model.save(first)
    torch.nn.init.normal_(model.unet.conv_out.weight)
    model.save(other)
    ended = convert("--to", "bundle", other, second, "--sharing", "first")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in second.iterdir()) == ["config.yaml", "manifest.json", "unet.safetensors"]
    assert_same_numbers(open_model(other), open_model(second))
    assert len(verify(second)) == 64 and verify(second) != verify(first)
    drawn = [Bundle.load(str(path)) for path in (other, second)]
    assert torch.equal(*(one.unet.conv_out.weight for one in drawn))
    assert torch.equal(*(one.text.encode(["a red circle"]).tokens for one in drawn))
    assert convert("--to", "bundle", second, tmp_path / "whole").code == 0
    assert (tmp_path / "whole" / "text.safetensors").is_file(), "written whole again where nobody asks for less"

    shutil.copytree(second, tmp_path / "alone" / "second")
    with pytest.raises(ModelError, match="no such file; copy the whole model folder again, and first beside it"):
        verify(tmp_path / "alone" / "second")
    changed = first / "text.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match="sha256 differs"):
        verify(second)


@pytest.mark.parametrize("beside", ["..", ".", "", "a/b", "/etc", "../first"])
def test_a_manifest_names_nothing_but_folders_beside_it(bundle: Path, tmp_path: Path, beside: str) -> None:
    folder = tmp_path / "second"
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"shared": {"text": beside}}))
    (folder / "text.safetensors").unlink()
    for read in (open_model, verify):
        with pytest.raises(ModelError, match="not the name of a folder"):
            read(folder)


def test_nothing_is_shared_that_differs_or_is_not_there(convert: Script, bundle: Path, tmp_path: Path) -> None:
    Bundle.load(str(bundle)).save(tmp_path / "first")
    for flags, words in (
        (("bundle", "--sharing", "first", "--dtype", "float32"), "no network of first is the same"),
        (("bundle", "--sharing", "nobody"), "no bundle 'nobody' beside"),
        (("bundle", "--sharing", "../first"), "no bundle '../first' beside"),
        (("diffusers", "--sharing", "first"), "or not --to bundle"),
    ):
        ended = convert("--to", flags[0], bundle, tmp_path / "second", *flags[1:])
        assert ended.code == 2 and words in ended.errors[0]
        assert not (tmp_path / "second").exists()


def test_pieces_of_two_models_or_too_few_are_refused(bundle: Path, tmp_path: Path) -> None:
    opened, folder = open_model(bundle), tmp_path / "small"
    to_bundle(folder, opened.config, opened.parts, largest=80_000)
    last = sorted(folder.glob("unet-*"))[-1]
    kept = last.read_bytes()
    last.unlink()
    for read in (open_model, verify):
        with pytest.raises(ModelError, match="expected all of one set"):
            read(folder)
    last.write_bytes(kept)
    (folder / "unet.safetensors").write_bytes(kept)
    with pytest.raises(ModelError, match="expected all of one set"):
        open_model(folder)
    (folder / "unet.safetensors").unlink()
    first = sorted(folder.glob("unet-*"))[0]
    first.write_bytes(kept)
    with pytest.raises(ModelError, match="in another piece too"):
        open_model(folder)
    with pytest.raises(ModelError, match="sha256 differs"):
        verify(folder)
