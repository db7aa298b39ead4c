"""Tiny networks of every kind with their objectives and data from a seed, for tests of the training engine.

As a program, by itself or under `torch.distributed.run`, it trains one after another and writes what came of each:
tiny_training.py KIND FOLDER [key=value …] [+ KIND FOLDER [key=value …]] …
"""

import copy
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.bundle import noise_schedule
from ldm.config import parse_yaml, validate
from ldm.data.order import Plan
from ldm.data.pictures import PictureBatch
from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.models.clip import Clip, ClipConfig
from ldm.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from ldm.models.model_config import ModelConfig
from ldm.models.text import ClipTextConfig, ClipTextEncoder
from ldm.models.unet import UNet
from ldm.nn.layers import channels_last
from ldm.training import checkpoint
from ldm.training.adversarial import Adversarial
from ldm.training.autoencoder import AutoencoderTraining, Reconstruction, autoencoder_losses, crops
from ldm.training.clip import ClipTraining, Contrast, clip_losses, normalise_globally, pairs
from ldm.training.conditioned import Conditioned, token_ids
from ldm.training.consistency import ConsistencyTraining, consistency_losses
from ldm.training.diffusion import DiffusionTraining, diffusion_losses, latent_batches
from ldm.training.latents import LatentCache
from ldm.training.loop import Batches, Conduct, Report, train
from ldm.training.lora import LoraTraining, adapt
from ldm.training.optimization import OptimizationConfig
from ldm.training.signals import Stopped, caught
from ldm.training.thumbnail import Thumbnail, ThumbnailTraining, thumbnail_losses, thumbnails
from ldm.training.update import Objective
from ldm.training.workers import workers

KINDS = ("vae", "gan", "clip", "sigmoid", "thumbnail", "unet", "conditioned", "resting", "lora", "consistency")
PICTURES = 28  # an epoch is three and a half batches of eight: most resumptions are in the middle of one
MODEL = """
autoencoder: {kind: kl, channels: 8, multipliers: [1, 2], res_blocks: 1, mid_attention: false, groups: 4}
text: {kind: clip, width: 16, layers: 1, heads: 2, context_length: 8, vocabulary: 600, padding: zero}
unet: {channels: 8, multipliers: [1, 2], res_blocks: 1, attention: [false, true], heads: 2, context_width: 16,
  groups: 4}
sampling: {width: 16, height: 16}
"""
SETTINGS: dict[str, Any] = {
    "steps": 20,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "warmup_steps": 3,
    "ema_decay": 0.9,
    "more_ema_decays": (0.5,),
    "precision": "no",
    "save_every": 10,
    "keep": 9,
}
Task = tuple[nn.Module, Objective, Batches, OptimizationConfig, tuple[str, ...]]


def pictures(start: int) -> Iterator[PictureBatch]:
    """Noisy 32×32 pictures, PICTURES of them, every second one with a hard negative, by position."""
    plan, me, step = Plan(PICTURES, SETTINGS["batch_size"], seed=3), workers(), start
    while True:
        part = plan.part(step, me.rank, me.world)
        chosen = part.samples.tolist()
        seeds = [torch.Generator().manual_seed(i) for i in chosen]
        images = torch.stack([torch.rand(3, 32, 32, generator=g) * 2 - 1 for g in seeds])
        facts: list[dict[str, Any]] = [{"negative": f"no {i}"} if i % 2 else {} for i in chosen]
        keys = tuple(f"sample-{i}" for i in chosen)
        yield PictureBatch(step, part.first, keys, images, tuple(f"a {i}" for i in chosen), tuple(facts))
        step += 1


def autoencoder_task(kind: str, settings: dict[str, Any]) -> Task:
    judge = DiscriminatorConfig(channels=4, layers=1, groups=2) if kind == "gan" else None
    config = AutoencoderTraining(crop=16, sides=(16, 32), discriminator=judge, discriminator_start=4, **settings)
    shape = model().autoencoder
    assert isinstance(shape, AutoencoderConfig)
    autoencoder = channels_last(KLAutoencoder(shape))
    module: nn.Module = Reconstruction(autoencoder)
    adversary = None
    if judge is not None:
        module = adversary = Adversarial(module, PatchDiscriminator(judge), autoencoder.decoder.conv_out.weight)
    objective = autoencoder_losses(config, shape, adversary=adversary)
    return module, objective, crops(pictures, config, seed=1), config, ("discriminator.",) if judge else ()


def clip_task(kind: str, settings: dict[str, Any]) -> Task:
    config = ClipTraining(loss="sigmoid" if kind == "sigmoid" else "infonce", **settings)
    text = model().text
    assert isinstance(text, ClipTextConfig)
    clip = Clip(ClipConfig(embedding=8, image_size=32, width=4, layers=(1, 1, 1, 1)), text)
    normalise_globally(clip)
    return Contrast(clip, config), clip_losses(config), pairs(pictures, clip), config, ()


def thumbnail_task(kind: str, settings: dict[str, Any]) -> Task:
    config = ThumbnailTraining(side=32, layers=1, **settings)  # the side of the pictures
    module = Thumbnail(tower(), config)
    return module, thumbnail_losses(), thumbnails(pictures, module.text), config, ()


def unet_task(kind: str, settings: dict[str, Any]) -> Task:
    drawn = torch.Generator().manual_seed(5)
    mean, std = torch.randn(PICTURES, 4, 8, 8, generator=drawn), torch.rand(PICTURES, 4, 8, 8, generator=drawn)
    unet, conditions = channels_last(UNet(model().unet)), torch.randn(4, 8, 16, generator=drawn)
    network: nn.Module = unet
    if kind in ("conditioned", "resting"):
        network = Conditioned(tower().requires_grad_(kind == "conditioned"), unet)
        conditions = token_ids(network.text)(["a", "b c", "d", ""])
    cache = LatentCache(mean, std, conditions, torch.arange(PICTURES)[:, None] % 3)
    stage: dict[str, Any] = {"side": 16, "pictures": PICTURES, **settings}
    if kind == "consistency":
        return consistency_task(unet, cache, ConsistencyTraining(guidance_scale=2.0, **stage))
    stage |= {"offset_noise": 0.1, "min_snr_gamma": 5.0}
    config = LoraTraining(rank=2, **stage) if kind == "lora" else DiffusionTraining(**stage)
    if isinstance(config, LoraTraining):
        adapt(talking(unet), config)
    objective = diffusion_losses(model(), noise_schedule(model()), config)
    return network, objective, latent_batches(cache, config, seed=1), config, ()


def consistency_task(unet: UNet, cache: LatentCache, config: ConsistencyTraining) -> Task:
    teacher = copy.deepcopy(talking(unet)).requires_grad_(False)
    objective = consistency_losses(model(), noise_schedule(model()), config, teacher)
    return unet, objective, latent_batches(cache, config, seed=1), config, ()


def talking(unet: UNet) -> UNet:
    """The UNet with numbers where a fresh one has zeros: that one says nothing, and there is nothing to learn from."""
    nn.init.normal_(unet.conv_out.weight, std=0.1)
    for module in unet.modules():
        if hasattr(module, "proj_out"):
            nn.init.normal_(module.proj_out.weight, std=0.1)
    return unet


TASKS: dict[str, Callable[[str, dict[str, Any]], Task]] = {
    **dict.fromkeys(("vae", "gan"), autoencoder_task),
    **dict.fromkeys(("clip", "sigmoid"), clip_task),
    "thumbnail": thumbnail_task,
    **dict.fromkeys(("unet", "conditioned", "resting", "lora", "consistency"), unet_task),
}


def tower() -> ClipTextEncoder:
    """A text tower whose last block is not read, so that it must not learn: as in Stable Diffusion 2."""
    text = model().text
    assert isinstance(text, ClipTextConfig)
    return ClipTextEncoder(text.model_copy(update={"layers": 2, "hidden": "penultimate"}))


def model() -> ModelConfig:
    return validate(parse_yaml(MODEL, "tiny"), ModelConfig, "tiny")


def trained(kind: str, folder: Path, conduct: Conduct | None = None, **settings: Any) -> Iterator[Report]:
    """Train a tiny network of this kind, made anew from its seed, with checkpoints in `folder`."""
    torch.manual_seed(0)
    module, objective, batches, config, apart = TASKS[kind](kind, {**SETTINGS, **settings})
    return train(module, objective, batches, config, folder, 7, conduct or Conduct(), apart)


def state_digest(folder: Path) -> str:
    """sha256 of everything in the newest checkpoint."""
    newest = checkpoint.newest(folder)
    assert newest is not None
    saved = checkpoint.read(newest)
    digest = hashlib.sha256(json.dumps([saved.step, saved.numbers], sort_keys=True).encode())
    for file, tensors in sorted(saved.tensors.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{file} {name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main(*arguments: str) -> None:
    """Train what is listed between the `+`, then leave the other processes."""
    me, rest = workers(60.0), list(arguments)
    while rest:
        end = rest.index("+") if "+" in rest else len(rest)
        one(*rest[:end])
        rest = rest[end + 1 :]
    if me.world > 1:
        torch.distributed.destroy_process_group()


def one(kind: str, folder: str, *pairs: str) -> None:
    """Train, with the signals that stop caught; the main process writes losses.json into the folder."""
    settings = {key: parse_yaml(value, key) for key, value in (pair.split("=") for pair in pairs)}
    losses: list[dict[str, float]] = []
    conduct_of: dict[str, Any] = {"allow_world_size_change": settings.pop("allow_world_size_change", False)}
    with caught() as stop:
        try:
            for report in trained(kind, Path(folder), Conduct(stop, **conduct_of), **settings):
                losses.append(report.losses)
                print("step", report.step, flush=True)
        except Stopped as stopped:
            os._exit(stopped.exit_code)
    if workers().main:
        (Path(folder) / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
