"""Stable Diffusion models as diffusers' folders and as single files say and draw here what they do in diffusers."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from helpers import Ended, few
from PIL import Image
from reference import VERSIONS, diffusers, pipeline, write_single_file

from ldm.bundle import Bundle
from ldm.diffusion.noise import NOISE_SOURCES
from ldm.models.text import ClipTextConfig, ClipTextEncoder

pytestmark = pytest.mark.parity

PROMPTS = ["a red circle to the left of a blue square!", "", "it's 3 o'clock, isn't it? " * 12]
LAYOUTS = ("folder", "single file")


@dataclass(frozen=True)
class Model:
    """A model of diffusers and what was written of it."""

    pipe: Any
    folder: Path
    file: Path

    def path(self, layout: str) -> Path:
        return self.folder if layout == "folder" else self.file


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    made = {}
    for version in VERSIONS:
        root = tmp_path_factory.mktemp(version)
        pipe = pipeline(version, root / "words")
        pipe.save_pretrained(root / "folder")
        file = write_single_file(root / "model.safetensors", root / "folder", pipe, open_clip=version != "SD1")
        made[version] = Model(pipe, root / "folder", file)
    return made


def relative_error(found: torch.Tensor, known: torch.Tensor) -> float:
    return float((found - known).abs().max() / known.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", VERSIONS)
@torch.inference_mode()
def test_every_network_says_the_same(models: dict[str, Model], version: str, layout: str) -> None:
    model = models[version]
    pipe, ours = model.pipe, Bundle.load(str(model.path(layout)))
    assert ours.config.prediction == ("v" if version == "SD2-v" else "eps")
    torch.manual_seed(1)
    image, x, t = torch.rand(1, 3, 64, 96) * 2 - 1, torch.randn(2, 4, 8, 12), torch.tensor([3.0, 977.0])
    theirs = pipe.tokenizer(
        PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    assert isinstance(ours.text, ClipTextEncoder)
    assert ours.text.tokenize(PROMPTS).tolist() == theirs.tolist()
    known = pipe.text_encoder(theirs).last_hidden_state
    text = ours.text.encode(PROMPTS).tokens
    assert relative_error(text, known) < 1e-5
    assert relative_error(ours.unet(x, t, text[:2]), pipe.unet(x, t, known[:2]).sample) < 1e-5
    posterior, latent = pipe.vae.encode(image).latent_dist, ours.autoencoder.encode(image)
    assert relative_error(latent.mean, posterior.mean * pipe.vae.config.scaling_factor) < 1e-5
    assert relative_error(latent.std, posterior.std * pipe.vae.config.scaling_factor) < 1e-5
    assert relative_error(ours.autoencoder.decode(latent.mean), pipe.vae.decode(posterior.mean).sample) < 1e-5


LEADING = {"timestep_spacing": "leading"}
KARRAS = {"use_karras_sigmas": True}
# Sampler, grid, diffusers' scheduler and its settings. Stable Diffusion's folders space timesteps `leading`.
SAMPLING: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "DDIM leading": ("ddim", "leading", "DDIMScheduler", LEADING),
    "DDIM trailing": ("ddim", "trailing", "DDIMScheduler", {"timestep_spacing": "trailing"}),
    "Euler leading": ("euler", "leading", "EulerDiscreteScheduler", LEADING),
    "Euler karras": ("euler", "leading_karras", "EulerDiscreteScheduler", {**LEADING, **KARRAS}),
    "Euler karras, whole range": (
        "euler",
        "karras",
        "EulerDiscreteScheduler",
        {**KARRAS, "timestep_spacing": "linspace"},
    ),
    "Heun": ("heun", "leading", "HeunDiscreteScheduler", LEADING),
}
# Guidance scale, negative prompt, width, height.
ASKED = {
    "without guidance": (1.0, "", 64, 64),
    "with guidance": (7.5, "", 64, 96),
    "negative prompt": (5.0, "blurred, dark", 96, 64),
}
CASES = [("SD1", name, asked) for name in SAMPLING for asked in ASKED]
CASES += [(version, name, "negative prompt") for version in ("SD2", "SD2-v") for name in SAMPLING]
# Each sampler, each way to ask and each version at least once.
QUICK = [("SD1", name, asked) for name, asked in zip(SAMPLING, [*ASKED, *ASKED], strict=True)]
QUICK += [("SD2", "Euler leading", "negative prompt"), ("SD2-v", "DDIM trailing", "negative prompt")]
STEPS, SEED = 7, 5


def their_picture(pipe: Any, name: str, asked: str) -> np.ndarray[Any, Any]:
    """What diffusers draws, from the noise that our seed gives."""
    _, _, scheduler, settings = SAMPLING[name]
    guidance, negative, width, height = ASKED[asked]
    before = pipe.scheduler
    pipe.scheduler = getattr(diffusers, scheduler).from_config(before.config, **settings)
    noise = NOISE_SOURCES["keyed"]([SEED], (4, height // 8, width // 8)).initial()
    given = {"width": width, "height": height, "num_inference_steps": STEPS, "guidance_scale": guidance}
    made = pipe(PROMPTS[0], negative_prompt=negative, latents=noise, **given).images[0]
    pipe.scheduler = before
    return np.asarray(made, dtype=int)


@pytest.mark.parametrize(
    ("version", "name", "asked"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_pictures_are_theirs(
    models: dict[str, Model], txt2img: Callable[..., Ended], tmp_path: Path, version: str, name: str, asked: str
) -> None:
    sampler, grid, _, _ = SAMPLING[name]
    guidance, negative, width, height = ASKED[asked]
    # Each layout takes its turn; that both hold the same numbers, the networks' test tells.
    layout = LAYOUTS[list(SAMPLING).index(name) % 2]
    ended = txt2img(
        *("--model", models[version].path(layout), "--output", tmp_path / "x.png", "-p", PROMPTS[0]),
        *("--sampler", sampler, "--schedule", grid, "--steps", STEPS, "--seed", SEED, "--size", f"{width}x{height}"),
        *("--guidance-scale", guidance, "--negative-prompt", negative, "--device", "cpu", "--dtype", "float32"),
        *("--convention", "diffusers", "--prompt-syntax", "plain", "--quiet"),
    )
    assert ended.code == 0, ended.err
    ours = np.asarray(Image.open(tmp_path / "x.png"), dtype=int)
    theirs = their_picture(models[version].pipe, name, asked)
    assert theirs.std() > 5  # a picture of something
    assert np.abs(ours - theirs).max() <= 1


# Pieces of prompts, with spaces between them, that tokenizers read differently.
MARKS = "'s 'T 're ' \" ’ “ ! !! ?! &amp; < > | _ - … <end_of_text> <|startoftext endoftext|>"
LETTERS = "é e\u0301 ﬁ Ａ ß Σ ΑΣ İ ſ ² Ⅷ 一 三 日本 ก็ \u200d 👩\u200d🎨 🎨 ǆ ﷺ \u212a \u212b \ufeff ª ʼ ٣"
SPACES = ("\t", "  ", "\u00a0", "\u2028")


@pytest.mark.parametrize("count", few([100, 400], 100))
@pytest.mark.parametrize("version", ["SD1", "SD2"])
def test_token_ids_are_those_of_their_fast_tokenizer(models: dict[str, Model], version: str, count: int) -> None:
    theirs = models[version].pipe.tokenizer
    padding = "zero" if version == "SD2" else "end"
    with torch.device("meta"):
        ours = ClipTextEncoder(ClipTextConfig(layers=1, width=8, heads=1, padding=padding, tokenizer="hf"))
    rng = np.random.default_rng(0)
    pieces = [*"abcABC 0129", *MARKS.split(), *LETTERS.split(), *SPACES]
    prompts = ["".join(rng.choice(pieces, rng.integers(1, 40))) for _ in range(count)]
    assigned = [chr(n) for n in range(32, 0x20000) if unicodedata.category(chr(n)) not in ("Cc", "Cn", "Cs")]
    prompts += ["".join(rng.choice(assigned, 12)) for _ in range(count)]
    prompts = [text for text in prompts if "<|startoftext|>" not in text and "<|endoftext|>" not in text]
    given = {"padding": "max_length", "max_length": 77, "truncation": True}
    for prompt in prompts:
        assert ours.tokenize([prompt])[0].tolist() == theirs(prompt, **given).input_ids, ascii(prompt)


def test_open_clips_own_tokenizer_would_differ() -> None:
    """What the setting is for: these are the texts that the two read differently."""
    with torch.device("meta"):
        ours, hf = (
            ClipTextEncoder(ClipTextConfig(layers=1, width=8, heads=1, tokenizer=name)) for name in ("open_clip", "hf")
        )
    differ = [text for text in ("a “quoted” word", "salt &amp; pepper", "Ａ", "ﬁre", "plain words")
              if ours.tokenize([text]).tolist() != hf.tokenize([text]).tolist()]  # fmt: skip
    assert differ == ["a “quoted” word", "salt &amp; pepper", "Ａ", "ﬁre"]


def test_no_prompt_can_end_itself() -> None:
    """Where we leave Hugging Face's tokenizer on purpose: a typed token is words."""
    with torch.device("meta"):
        text = ClipTextEncoder(ClipTextConfig(layers=1, width=8, heads=1, padding="zero", tokenizer="hf"))
    ids = text.tokenize(["a <|endoftext|> b <|startoftext|> c"])[0].tolist()
    assert ids.count(49406) == ids.count(49407) == 1


def half(folder: Path, pipe: Any) -> None:
    pipe.save_pretrained(folder, variant="fp16")


def sharded(folder: Path, pipe: Any) -> None:
    pipe.save_pretrained(folder, max_shard_size="200KB")


def sharded_half(folder: Path, pipe: Any) -> None:
    pipe.save_pretrained(folder, max_shard_size="200KB", variant="fp16")


def both(folder: Path, pipe: Any) -> None:
    pipe.save_pretrained(folder)
    pipe.save_pretrained(folder, variant="fp16")


@pytest.mark.parametrize(
    "write", few([half, sharded, sharded_half, both], sharded_half, both), ids=lambda write: write.__name__
)
def test_variants_and_shards_of_a_folder_hold_the_same_model(
    models: dict[str, Model], tmp_path: Path, write: Callable[[Path, Any], None]
) -> None:
    model = models["SD1"]
    write(tmp_path / "folder", model.pipe)
    known, found = Bundle.load(str(model.folder)), Bundle.load(str(tmp_path / "folder"))
    assert found.config == known.config
    for part in ("autoencoder", "text", "unet"):
        ours = getattr(found, part).state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in getattr(known, part).state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "version"), [(768, {"attention_head_dim": 8}), (1024, {"attention_head_dim": [5, 10, 20, 20]})]
)
@torch.inference_mode()
def test_full_size_networks_say_the_same(width: int, version: dict[str, Any]) -> None:
    """Stable Diffusion 1.5 and 2.1, from the shapes alone: the weights are shared, so that they fit into 8 GB."""
    from ldm.formats.evidence import FAMILIES
    from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
    from ldm.models.unet import UNet, UNetConfig

    transformers, family = reference.transformers, FAMILIES[width]
    linear = width == 1024
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(cross_attention_dim=width, use_linear_projection=linear, **version).eval()
    config = UNetConfig.model_validate({**family.unet, "context_width": width, "linear_projection": linear})
    with torch.device("meta"):
        ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x, t, states = torch.randn(1, 4, 64, 64), torch.tensor([500.0]), torch.randn(1, 77, width)
    assert relative_error(ours(x, t, states), theirs(x, t, states).sample) < 1e-4
    del ours, theirs
    # Stable Diffusion 2's folders have 23 of open_clip's 24 blocks.
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 23 if linear else 12}
    hf = transformers.CLIPTextConfig(
        **shape, num_attention_heads=width // 64, hidden_act=family.text["activation"], eos_token_id=49407
    )
    tower = transformers.CLIPTextModel(hf).eval()
    values = {**family.text, "width": width, "layers": shape["num_hidden_layers"], "tokenizer": "hf"}
    text = ClipTextEncoder(ClipTextConfig.model_validate(values)).eval()
    state = {name.removeprefix("text_model."): tensor for name, tensor in tower.state_dict().items()}
    names = reference.keys.text_to_hf(text.config)
    text.load_state_dict({ours: torch.cat([state[name] for name in parts]) for ours, parts in names.items()})
    ids = text.tokenize(PROMPTS)
    assert relative_error(text(ids)[0], tower(ids).last_hidden_state) < 1e-4
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    ).eval()
    autoencoder = KLAutoencoder(AutoencoderConfig()).eval()
    autoencoder.load_state_dict(vae.state_dict())
    latent = torch.randn(1, 4, 64, 64)
    known = vae.decode(latent / 0.18215).sample
    assert relative_error(autoencoder.decode(latent), known) < 1e-4
