"""A whole training run: autoencoder → CLIP → cached latents → UNet → bundle, each stage resumable.

Every stage is a generator that reports as it goes and leaves its product in the run's folder; a stage that has left
its product is over at once when it is started again.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ldm.bundle import Bundle, build
from ldm.config import parse_yaml, validate
from ldm.images import to_tensor
from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.models.clip import Clip
from ldm.models.text import ClipTextConfig
from ldm.models.unet import UNet
from ldm.nn.layers import channels_last
from ldm.training import latents
from ldm.training.autoencoder import Reconstruction, autoencoder_losses, crops, fit_statistics, initialise, psnr
from ldm.training.checkpoint import load_tensors, save_tensors, save_text
from ldm.training.clip import clip_losses, pairs
from ldm.training.diffusion import diffusion_losses, latent_batches
from ldm.training.latents import LatentCache, Samples
from ldm.training.loop import Report, train
from ldm.training.recipe import Recipe

STATISTICS_PICTURES = 256


@dataclass(frozen=True)
class Run:
    """A recipe, the folder its products go to, and an endless source of captioned pictures by seed."""

    recipe: Recipe
    folder: Path
    samples: Callable[[int], Samples]

    def product(self, name: str) -> Path:
        """Where a finished stage leaves its tensors."""
        return self.folder / f"{name}.safetensors"


def digest(value: object) -> str:
    """A short name for what a product was made from."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def autoencoder_stage(run: Run) -> Iterator[Report]:
    """Train the KL autoencoder; leaves its weights, and its statistics, preview map and PSNR in autoencoder.json."""
    config, shape = run.recipe.autoencoder_training, run.recipe.model.autoencoder
    path = run.product("autoencoder")
    if config is None or not isinstance(shape, AutoencoderConfig) or path.is_file():
        return
    torch.manual_seed(run.recipe.seed)
    autoencoder = channels_last(KLAutoencoder(shape))
    initialise(autoencoder)
    yield from train(
        Reconstruction(autoencoder),
        autoencoder_losses(config, shape),
        lambda step: crops((image for image, _, _ in run.samples(step)), config, step),
        config,
        run.folder / "checkpoints" / "autoencoder",
        run.recipe.seed,
    )
    pictures = run.samples(-1)
    images = torch.stack([to_tensor(next(pictures)[0]) for _ in range(STATISTICS_PICTURES)])
    fitted, r_squared = fit_statistics(autoencoder, images)
    about = {
        "psnr_db": round(psnr(autoencoder, images[:64]), 2),
        "preview_r_squared": round(r_squared, 4),
        "config": fitted.model_dump(mode="json"),
    }
    save_text(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
    save_tensors(path, dict(autoencoder.state_dict()))


def clip_stage(run: Run) -> Iterator[Report]:
    """Train CLIP; leaves the text tower, and the whole model for evaluation."""
    config, shape, text = run.recipe.clip_training, run.recipe.clip, run.recipe.model.text
    path = run.product("text")
    if config is None or shape is None or not isinstance(text, ClipTextConfig) or path.is_file():
        return
    torch.manual_seed(run.recipe.seed)
    clip = Clip(shape, text)
    yield from train(
        clip,
        clip_losses(config),
        lambda step: pairs(run.samples(step), clip, config.batch_size),
        config,
        run.folder / "checkpoints" / "clip",
        run.recipe.seed,
    )
    save_tensors(run.product("clip"), dict(clip.state_dict()))
    save_tensors(path, dict(clip.text.state_dict()))


def model_so_far(run: Run) -> Bundle:
    """The model with what earlier stages have left: trained autoencoder and text tower, a fresh UNet."""
    model = run.recipe.model
    about = run.product("autoencoder").with_suffix(".json")
    if about.is_file():
        fitted = validate(parse_yaml(about.read_text(), str(about))["config"], AutoencoderConfig, str(about))
        model = model.model_copy(update={"autoencoder": fitted})
    torch.manual_seed(run.recipe.seed)
    autoencoder, text, unet = build(model)
    for name, module in (("autoencoder", autoencoder), ("text", text)):
        if run.product(name).is_file():
            assert isinstance(module, nn.Module)
            module.load_state_dict(load_tensors(run.product(name)))
            channels_last(module)
    for module in (autoencoder, text):
        assert isinstance(module, nn.Module)
        module.eval().requires_grad_(False)
    return Bundle(run.recipe.name, model, autoencoder, text, channels_last(unet))


def latents_stage(run: Run, index: int) -> Iterator[int | LatentCache]:
    """Encode the pictures of one UNet stage; yields how many are done, and last the cache."""
    stage = run.recipe.unet_training[index]
    bundle = model_so_far(run)
    source = {
        name: str(run.product(name).stat().st_mtime_ns)
        for name in ("autoencoder", "text")
        if run.product(name).is_file()
    }
    about: dict[str, object] = {"of": digest([source, run.recipe.data.model_dump(), stage.side, stage.pictures])}
    path = run.folder / "latents" / f"{stage.side}.safetensors"
    cache = latents.load(path, about)
    if cache is None:
        bf16 = stage.precision == "bf16"
        samples = run.samples(0)
        for report in latents.encode(samples, stage.pictures, stage.side, bundle.autoencoder, bundle.text, bf16):
            if isinstance(report, LatentCache):
                cache = report
                latents.save(path, cache, about)
            else:
                yield report
    assert cache is not None
    yield cache


def unet_stage(run: Run, index: int, cache: LatentCache, bundle: Bundle) -> Iterator[Report]:
    """One stage of the UNet of `bundle`, which is trained in place and starts from what the stage before it left."""
    path = run.product(f"unet-{index}")
    if path.is_file():
        return
    stage = run.recipe.unet_training[index]
    if index > 0:
        bundle.unet.load_state_dict(load_tensors(run.product(f"unet-{index - 1}")))
    yield from train(
        bundle.unet,
        diffusion_losses(bundle.config, bundle.schedule, stage),
        latent_batches(cache, stage, run.recipe.seed + index),
        stage,
        run.folder / "checkpoints" / f"unet-{index}",
        run.recipe.seed + index,
    )
    save_tensors(path, dict(bundle.unet.state_dict()))


def averaged(bundle: Bundle, report: Report) -> Bundle:
    """A copy of the bundle that draws with the averaged weights of this moment."""
    unet: UNet = copy.deepcopy(bundle.unet)
    report.ema.copy_to(unet)
    unet.to("cpu").eval().requires_grad_(False)
    return Bundle(bundle.name, bundle.config, bundle.autoencoder, bundle.text, unet)


def finish(run: Run) -> Path:
    """Put the products together; returns the folder of the bundle."""
    bundle = model_so_far(run)
    bundle.unet.load_state_dict(load_tensors(run.product(f"unet-{len(run.recipe.unet_training) - 1}")))
    return bundle.save(run.folder / run.recipe.name)
