"""What we write opens in diffusers, as a folder and as one file, and says the same there."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Script, few
from PIL import Image
from torch import Tensor, nn

from ldm.bundle import Bundle
from ldm.config import validate
from ldm.data.shards import write_shards
from ldm.formats.export import Exported, compvis_tensors, exported, to_single_file
from ldm.formats.export_diffusers import to_diffusers
from ldm.formats.tensors import MemoryTensor, StoredTensor
from ldm.models.model_config import ModelConfig, build
from ldm.models.text import open_clip_module
from ldm.pipeline import TextToImage
from ldm.request import GenerationRequest

pytestmark = pytest.mark.parity

open_clip_module()  # makes torchvision importable beside a CPU-only PyTorch; diffusers imports it too
diffusers = pytest.importorskip("diffusers")
single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")

TEXT = {"kind": "clip", "width": 32, "layers": 3, "heads": 4, "context_length": 77, "vocabulary": 1024}
UNET = {"channels": 32, "multipliers": [1, 2], "res_blocks": 1, "attention": [True, False], "context_width": 32}
# Wide levels on which nothing is normalised alike by 4 and by 32 groups, so that a group count that is lost shows.
AUTOENCODER = {"kind": "kl", "channels": 16, "multipliers": [1, 2], "res_blocks": 1, "groups": 4}
SAMPLING = {"width": 64, "height": 64, "schedule": "leading", "convention": "diffusers", "steps": 4}
MODELS: dict[str, dict[str, Any]] = {
    "like SD1": {
        "autoencoder": {**AUTOENCODER, "mid_attention": True},
        "text": {**TEXT, "activation": "quick_gelu", "padding": "end"},
        "unet": {**UNET, "heads": 2, "groups": 8},
        "sampling": SAMPLING,
    },
    "like SD2-v": {
        "autoencoder": {**AUTOENCODER, "mid_attention": True},
        "text": {**TEXT, "activation": "gelu", "padding": "zero"},
        "unet": {**UNET, "heads": None, "head_width": 16, "linear_projection": True, "groups": 8},
        "prediction": "v",
        "sampling": SAMPLING,
    },
    "ours": {
        "autoencoder": {
            **AUTOENCODER,
            "mid_attention": False,
            "latent_mean": [1.2, -0.3, 0.0, 0.7],
            "latent_std": [2.8, 0.4, 1.0, 3.0],
        },
        "text": {**TEXT, "activation": "gelu", "padding": "zero"},
        "unet": {**UNET, "heads": 2, "groups": 4, "transformer_depth": 2},
        "sampling": {**SAMPLING, "schedule": "trailing", "convention": "exact"},
    },
}
PROMPTS = ["a red circle to the left of a blue square", "", "it's 3 o'clock, isn't it? " * 12]


@dataclass(frozen=True)
class Model:
    """A model of ours, what was written of it, and where."""

    bundle: Bundle
    written: Exported
    folder: Path

    @property
    def pipelines(self) -> dict[str, Any]:
        """diffusers' pipeline from the folder and from the file."""
        config = {"config": str(self.folder / "diffusers"), "local_files_only": True}
        return {
            "folder": diffusers.StableDiffusionPipeline.from_pretrained(self.folder / "diffusers"),
            "single file": diffusers.StableDiffusionPipeline.from_single_file(
                str(self.folder / "one.safetensors"), **config
            ),
        }


def stored(network: Any) -> dict[str, StoredTensor]:
    return {name: MemoryTensor(tensor) for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module", params=few(MODELS, "like SD1"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model with weights from a seed, written both ways."""
    config = validate(MODELS[request.param], ModelConfig, request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = build(config)
        for network in networks:
            assert isinstance(network, nn.Module)
            network.eval().requires_grad_(False)
            for weight in network.parameters():
                if weight.dim() > 1 and not weight.any():  # a fresh UNet says nothing: its last layers start at zero
                    nn.init.normal_(weight, std=0.2)
                elif weight.dim() == 1:  # nor are all biases and norms alike in a trained one
                    weight += 0.1 * torch.randn_like(weight)
    folder = tmp_path_factory.mktemp("export")
    names = ("autoencoder", "text", "unet")
    parts = {name: stored(network) for name, network in zip(names, networks, strict=True)}
    written = exported(config, parts, folder)
    to_diffusers(folder / "diffusers", written)
    to_single_file(folder / "one.safetensors", written)
    return Model(Bundle(request.param, config, *networks), written, folder)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_every_part_says_the_same_in_diffusers(model: Model) -> None:
    ours = model.bundle
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 4, 16, 24, generator=generator), torch.tensor([3.0, 977.0])
    image = torch.rand(1, 3, 32, 48, generator=generator) * 2 - 1
    for opened, pipeline in model.pipelines.items():
        vae, scale = pipeline.vae, pipeline.vae.config.scaling_factor
        with torch.inference_mode():
            tokens = ours.text.encode(PROMPTS).tokens
            theirs = torch.cat([pipeline.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in PROMPTS])
            assert relative_error(tokens, theirs) < 1e-5, opened
            theirs = pipeline.unet(x, t, tokens[:2]).sample
            assert relative_error(ours.unet(x, t, tokens[:2]), theirs) < 1e-5, opened
            assert relative_error(ours.autoencoder.decode(x), vae.decode(x / scale).sample) < 2e-5, opened
            known, found = vae.encode(image).latent_dist, ours.autoencoder.encode(image)
            assert relative_error(found.mean, known.mean * scale) < 2e-5, opened
            assert relative_error(found.std, known.std * scale) < 2e-5, opened


def test_picture_is_the_same_in_diffusers(model: Model) -> None:
    ours = drawn(model.bundle)
    for opened, pipeline in model.pipelines.items():
        difference = (theirs(model, pipeline) - ours).abs().max()
        assert difference <= 1, (opened, float(difference))


def drawn(bundle: Bundle) -> Tensor:
    """The picture of the first prompt (h w 3), 0 to 255."""
    engine = TextToImage(bundle)
    request = engine.ready(GenerationRequest(prompt=PROMPTS[0], seed=5, steps=4, guidance_scale=3.0))
    *_, last = engine.stream(request)
    (ours,) = engine.images(request, last.x)
    return torch.tensor(pixels(ours.image))


def theirs(model: Model, pipeline: Any) -> Tensor:
    """The same by diffusers."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 64, "output_type": "np"}
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(5))
    return torch.tensor(pipeline(PROMPTS[0], latents=scaled(model, noise), **settings).images[0]) * 255


def scaled(model: Model, noise: Tensor) -> Tensor:
    """The noise as an exact start at σ_max scales it; diffusers takes it to be of unit variance."""
    if model.bundle.config.sampling.convention == "diffusers":
        return noise
    sigma = model.bundle.schedule.sigma_max
    return noise * sigma / (1 + sigma**2) ** 0.5


def pixels(image: Any) -> Any:
    import numpy as np

    return np.asarray(image, dtype="float32")


LORA = """
name: red
data: {shards: SHARDS}
lora_training: {side: 64, steps: 60, batch_size: 4, learning_rate: 1e-2, warmup_steps: 0, precision: "no", rank: 4,
  layers: linear, caption_dropout: 0}
sample_prompts: [a]
"""


def test_a_lora_that_was_trained_on_a_file_draws_the_same_in_diffusers(
    model: Model, train: Script, tmp_path: Path
) -> None:
    """From a single file with Stable Diffusion's names to a picture, in both, and it is not the picture of before."""
    pytest.importorskip("peft")
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (220, 20, 60)).save(picture, "PNG")
    samples = [{"__key__": f"{i}", "png": picture.getvalue(), "txt": PROMPTS[0]} for i in range(8)]
    write_shards(samples, tmp_path / "data", 8, "red")
    (tmp_path / "red.yaml").write_text(LORA.replace("SHARDS", str(tmp_path / "data")))
    flags = ("lora", "--config", tmp_path / "red.yaml", "--base", model.folder / "one.safetensors")
    ended = train(*flags, "--run-dir", tmp_path / "run")
    assert ended.code == 0, ended.err
    ours, before = drawn(Bundle.load(str(tmp_path / "run" / "red"))), drawn(model.bundle)
    pipeline = model.pipelines["folder"]
    pipeline.load_lora_weights(tmp_path / "run" / "lora.safetensors")
    difference = (theirs(model, pipeline) - ours).abs()
    # The bundle's weights are fp16, with the additions merged in.
    assert float(difference.max()) <= 6 and float(difference.mean()) < 1, (difference.max(), difference.mean())
    assert float((ours - before).abs().mean()) > 10


def test_diffusers_turns_our_names_into_its_own(model: Model) -> None:
    """Its converter is another implementation of the same table."""
    tensors = {
        name: torch.empty(tensor.shape, device="meta") for name, tensor in compvis_tensors(model.written).items()
    }
    unet = single_file_utils.convert_ldm_unet_checkpoint(
        dict(tensors), {"layers_per_block": model.written.config.unet.res_blocks}
    )
    assert {name: tensor.shape for name, tensor in unet.items()} == shapes(model.bundle.unet)
    blocks = ["DownEncoderBlock2D"] * len(model.written.autoencoder.multipliers)
    vae = single_file_utils.convert_ldm_vae_checkpoint(
        dict(tensors), {"down_block_types": blocks, "up_block_types": blocks}
    )
    assert vae.keys() == shapes(model.bundle.autoencoder).keys()


def shapes(network: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}
