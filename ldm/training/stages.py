"""The stages of a run: autoencoder → CLIP → thumbnails → latents → UNet → bundle, or an adaptation of a given model.

Every stage is a generator that reports as it goes and leaves its product in the run's folder; a stage that has left
its product is over at once when it is started again. All processes go through it; the main one writes.
"""

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ldm.bundle import Bundle
from ldm.data.latents import MadeFrom
from ldm.errors import SettingError
from ldm.files import save_text
from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.models.clip import Clip
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.text import ClipTextConfig, ClipTextEncoder
from ldm.nn.layers import channels_last
from ldm.training import latents, source
from ldm.training.adversarial import Adversarial
from ldm.training.autoencoder import (
    AutoencoderTraining,
    Reconstruction,
    autoencoder_losses,
    crops,
    fit_statistics,
    initialise,
    psnr,
)
from ldm.training.checkpoint import load_tensors, save_tensors
from ldm.training.clip import Contrast, clip_losses, normalise_globally, pairs
from ldm.training.conditioned import Condition, Conditioned, text_states, token_ids
from ldm.training.consistency import consistency_losses
from ldm.training.continuity import FREE
from ldm.training.diffusion import (
    DiffusionTraining,
    UNetTraining,
    diffusion_losses,
    encoded_batches,
    latent_batches,
    shard_batches,
)
from ldm.training.farewell import beat, heartbeat
from ldm.training.inversion import Inversion, save_word, worded
from ldm.training.latents import LatentCache
from ldm.training.loop import Batches, Report, train
from ldm.training.lora import adapt, merge, save_lora
from ldm.training.parallel import compiled
from ldm.training.perceptual import Lpips
from ldm.training.run import Run, digest, give_weights, model_so_far, network_digest
from ldm.training.source import latent_shards
from ldm.training.thumbnail import Thumbnail, thumbnail_losses, thumbnails
from ldm.training.workers import workers

STATISTICS_PICTURES = 256
LOOK_EVERY_SECONDS = 1.0
ENCODED_AT_ONCE = 32
CAPTIONS_KEPT = 8  # of each picture whose latent is kept, among which every use chooses
PART = 2048  # pictures whose latents are lost at most when encoding is stopped


def keep(run: Run, name: str, module: nn.Module) -> None:
    """Leave a finished module as a product; no process goes on before it is there."""
    if workers().main:
        save_tensors(run.product(name), dict(module.state_dict()))
    workers().wait()


def autoencoder_stage(run: Run) -> Iterator[Report]:
    """Train the KL autoencoder; leaves its weights, and its statistics, preview map and PSNR in autoencoder.json."""
    config, shape = run.recipe.autoencoder_training, run.model.autoencoder
    if config is None or not isinstance(shape, AutoencoderConfig) or run.has("autoencoder"):
        return
    torch.manual_seed(run.recipe.seed)
    autoencoder = channels_last(KLAutoencoder(shape))
    if config.from_base:
        assert run.base is not None and isinstance(run.base.autoencoder, KLAutoencoder)  # preflight has seen to it
        autoencoder.load_state_dict(run.base.autoencoder.state_dict())
    else:
        initialise(autoencoder)
    module, adversary = with_adversary(autoencoder, config, shape)
    perceptual = Lpips.load(config.perceptual) if config.perceptual is not None else None
    yield from train(
        module,
        autoencoder_losses(config, shape, perceptual, adversary),
        crops(run.pictures(config.batch_size, max(config.sides), run.recipe.seed), config, run.recipe.seed),
        config,
        run.checkpoints("autoencoder"),
        run.recipe.seed,
        run.conduct,
        clip_apart=("discriminator.",) if adversary is not None else (),
    )
    if workers().main:
        describe(run, autoencoder)
    keep(run, "autoencoder", autoencoder)


def with_adversary(
    autoencoder: KLAutoencoder, config: AutoencoderTraining, shape: AutoencoderConfig
) -> tuple[nn.Module, Adversarial | None]:
    """What is trained: the autoencoder, beside a discriminator where the recipe has one."""
    reconstruction = Reconstruction(autoencoder)
    if config.discriminator is None:
        return reconstruction, None
    discriminator = PatchDiscriminator(config.discriminator, shape.image_channels)
    last_layer = autoencoder.decoder.conv_out.weight
    assert isinstance(last_layer, nn.Parameter)
    adversary = Adversarial(reconstruction, discriminator, last_layer)
    return adversary, adversary


def describe(run: Run, autoencoder: KLAutoencoder) -> None:
    """Measure a trained autoencoder on pictures of the data, and write down its config with what was found.

    On the device that trains: on a CPU a large one takes longer than the other processes wait.
    """
    autoencoder.to(workers().device)
    data = run.recipe.data.model_copy(update={"resident": False, "workers": 0})
    pictures = source.pictures(data, STATISTICS_PICTURES, run.model.sampling.width, run.recipe.seed + 1, alone=True)
    images = next(pictures(0)).images
    fitted, r_squared = fit_statistics(autoencoder, images)
    about = {
        "psnr_db": round(psnr(autoencoder, images[:64]), 2),
        "preview_r_squared": round(r_squared, 4),
        "config": fitted.model_dump(mode="json"),
    }
    save_text(run.product("autoencoder").with_suffix(".json"), json.dumps(about, indent=2) + "\n")
    autoencoder.to("cpu")


def clip_stage(run: Run) -> Iterator[Report]:
    """Train CLIP; leaves the text tower, and the whole model for evaluation."""
    config, shape, text = run.recipe.clip_training, run.recipe.clip, run.model.text
    if config is None or shape is None or not isinstance(text, ClipTextConfig) or run.has("text"):
        return
    torch.manual_seed(run.recipe.seed)
    clip = Clip(shape, text)
    if config.from_base:
        assert run.base is not None and isinstance(run.base.text, ClipTextEncoder)  # preflight has seen to it
        clip.text.load_state_dict(run.base.text.state_dict())
    normalise_globally(clip)
    run = run.resident() if config.resident else run
    yield from train(
        Contrast(clip, config),
        clip_losses(config),
        pairs(run.pictures(config.batch_size, shape.image_size, run.recipe.seed), clip),
        config,
        run.checkpoints("clip"),
        run.recipe.seed,
        run.conduct,
    )
    keep(run, "clip", clip)
    keep(run, "text", clip.text)


def thumbnail_stage(run: Run) -> Iterator[Report]:
    """Teach the text tower what is where; leaves the tower. Raises SettingError for a model that reads labels."""
    config = run.recipe.thumbnail_training
    if config is None or run.has("text-thumbnail"):
        return
    text = readable(model_so_far(run), "thumbnail_training").requires_grad_(True)
    torch.manual_seed(run.recipe.seed)
    run = run.resident() if config.resident else run
    yield from train(
        Thumbnail(text, config),
        thumbnail_losses(),
        thumbnails(run.pictures(config.batch_size, config.side, run.recipe.seed), text),
        config,
        run.checkpoints("thumbnail"),
        run.recipe.seed,
        run.conduct,
    )
    keep(run, "text-thumbnail", text)


def latents_stage(run: Run, stage: DiffusionTraining, count: int) -> Iterator[int | LatentCache]:
    """Encode the first `count` pictures for a stage; yields how many are done, and last the cache.

    The main process encodes; the others wait for its file.
    """
    bundle, ids = model_so_far(run), reads_ids(run, stage)
    products = [run.product("autoencoder"), *([] if ids else [run.text])]
    made_from: dict[str, object] = {path.stem: str(path.stat().st_mtime_ns) for path in products if path.is_file()}
    if run.base is not None:
        made_from["base"] = (network_digest(run.base, "autoencoder"), network_digest(run.base, "text"))
    data = run.recipe.data.model_dump(mode="json", exclude=set(FREE))
    of = digest([made_from, data, run.recipe.seed, stage.side, count, ids])
    about: dict[str, object] = {"of": of}
    path = run.folder / "latents" / f"{stage.side}.safetensors"
    cache = latents.load(path, about)
    if cache is None and workers().main:
        parts = []
        for report in encoded_parts(run, stage, count, bundle, path, about):
            beat(workers())
            if isinstance(report, LatentCache):
                parts.append(report)
            else:
                yield report
        cache = latents.joined(parts)
        latents.save(path, cache, about)
        for part in path.parent.glob(f"{path.stem}-*"):
            part.unlink()
    encoding_goes_on = heartbeat(workers())
    while cache is None:
        time.sleep(LOOK_EVERY_SECONDS)
        encoding_goes_on()
        yield 0
        cache = latents.load(path, about)
    yield cache


def encoded_parts(
    run: Run, stage: DiffusionTraining, count: int, bundle: Bundle, path: Path, about: dict[str, object]
) -> Iterator[int | LatentCache]:
    """The latents in parts of PART pictures, each kept beside `path` once it is there; yields as `encode` does."""
    condition = encoding(run, bundle, stage, torch.float16)
    pictures = run.pictures(ENCODED_AT_ONCE, stage.side, run.recipe.seed, alone=True, draws=CAPTIONS_KEPT)
    for first in range(0, count, PART):
        kept, of = path.with_stem(f"{path.stem}-{first:08d}"), {**about, "first": first}
        part = latents.load(kept, of)
        if part is not None:
            yield part
            continue
        batches, bf16 = pictures(first // ENCODED_AT_ONCE), stage.precision == "bf16"
        for report in latents.encode(batches, min(PART, count - first), bundle.autoencoder, condition, bf16):
            if isinstance(report, LatentCache):
                latents.save(kept, report, of)
                yield report
            else:
                yield first + report


def diffusion_batches(
    run: Run, stage: DiffusionTraining, bundle: Bundle, cache: LatentCache | None, seed: int
) -> Batches:
    """Batches of a UNet stage: from the cache, from shards of latents, or of pictures encoded when they are used."""
    if cache is not None:
        return latent_batches(cache, stage, seed)
    if stage.latents is not None:
        digests = (network_digest(bundle, "autoencoder"), network_digest(bundle, "text"))
        made_from, data = MadeFrom(*digests, stage.side), run.recipe.data
        shards = latent_shards(stage.latents, data, stage.batch_size, seed, made_from)
        run.tallies.extend(shards.tallies)
        return shard_batches(shards, data.workers)
    condition = encoding(run, bundle, stage, torch.float32)
    pictures = run.pictures(stage.batch_size, stage.side, seed)
    return encoded_batches(pictures, stage, bundle.autoencoder, condition, workers().device)


def encoding(run: Run, bundle: Bundle, stage: DiffusionTraining, dtype: torch.dtype) -> Condition:
    """Bring autoencoder and text tower to the device; what the UNet is then given for prompts, states in `dtype`."""
    for module in (bundle.autoencoder, bundle.text):
        assert isinstance(module, nn.Module)
        module.to(workers().device)
    return token_ids(readable(bundle, "train_text")) if reads_ids(run, stage) else text_states(bundle.text, dtype)


def reads_ids(run: Run, stage: DiffusionTraining) -> bool:
    """Whether a stage is given token ids for text states: the tower learns in it or later, with the same latents."""
    stages = run.recipe.unet_training
    if not isinstance(stage, UNetTraining) or stage.latents is not None:
        return False
    return any(one.train_text for one in stages[stages.index(stage) :])


def readable(bundle: Bundle, setting: str) -> ClipTextEncoder:
    """The bundle's text tower, which this setting wants to train. Raises SettingError for a model that reads labels."""
    if not isinstance(bundle.text, ClipTextEncoder):
        raise SettingError(f"{setting}: this model reads labels, not words; leave {setting} out")
    return bundle.text


def unet_stage(run: Run, index: int, cache: LatentCache | None, bundle: Bundle) -> Iterator[Report]:
    """One stage of the UNet of `bundle`, which is trained in place and starts from what the stage before it left.

    Where the text tower learns with it, the stage leaves that too, and later ones read with it.
    """
    name = f"unet-{index}"
    if run.has(name):
        return
    stage, seed = run.recipe.unet_training[index], run.recipe.seed + index
    if index > 0:
        bundle.unet.load_state_dict(load_tensors(run.product(f"unet-{index - 1}")))
    network: nn.Module = bundle.unet
    if reads_ids(run, stage):
        network = Conditioned(readable(bundle, "train_text").requires_grad_(stage.train_text), bundle.unet)
    yield from train(
        network,
        diffusion_losses(bundle.config, bundle.schedule, stage),
        diffusion_batches(run, stage, bundle, cache, seed),
        stage,
        run.checkpoints(name),
        seed,
        run.conduct,
    )
    if stage.train_text:
        keep(run, f"text-{index}", readable(bundle, "train_text"))
    keep(run, name, bundle.unet)


def lora_stage(run: Run, cache: LatentCache | None, bundle: Bundle) -> Iterator[Report]:
    """Adapt the UNet of `bundle`; leaves the additions as a LoRA file, and the UNet with them as the last one."""
    config = run.recipe.lora_training
    if config is None or run.has("lora"):
        return
    torch.manual_seed(run.recipe.seed)
    adapt(bundle.unet, config)
    yield from train(
        bundle.unet,
        diffusion_losses(bundle.config, bundle.schedule, config),
        diffusion_batches(run, config, bundle, cache, run.recipe.seed),
        config,
        run.checkpoints("lora"),
        run.recipe.seed,
        run.conduct,
    )
    if workers().main:
        base = run.base.name if run.base is not None else ""
        additions = run.product("lora").with_suffix(".part")
        save_lora(additions, bundle.unet, config, base)
        merge(bundle.unet)
        bundle.save(run.folder / run.recipe.name)
        additions.replace(run.product("lora"))  # last: where it is, the stage is over
    workers().wait()


def inversion_stage(run: Run, cache: LatentCache | None, bundle: Bundle) -> Iterator[Report]:
    """Learn a new word of the model `bundle`; leaves its vector. Raises SettingError for a model that reads labels."""
    config = run.recipe.inversion_training
    if config is None or run.has("word"):
        return
    inversion = Inversion(readable(bundle, "inversion_training"), bundle.unet, config)
    batches = diffusion_batches(run, config, bundle, cache, run.recipe.seed)
    yield from train(
        inversion,
        diffusion_losses(bundle.config, bundle.schedule, config),
        worded(batches, inversion, run.recipe.seed),
        config,
        run.checkpoints("inversion"),
        run.recipe.seed,
        run.conduct,
    )
    if workers().main:
        save_word(run.product("word"), inversion, config.word)
    workers().wait()


def consistency_stage(run: Run, cache: LatentCache | None, bundle: Bundle) -> Iterator[Report]:
    """Distil the UNet of `bundle`, which is trained in place; leaves it, and the bundle that draws in few steps."""
    config = run.recipe.consistency_training
    if config is None or run.has("unet-consistency"):
        return
    teacher: nn.Module = copy.deepcopy(bundle.unet).to(workers().device).eval().requires_grad_(False)
    yield from train(
        bundle.unet,
        consistency_losses(bundle.config, bundle.schedule, config, compiled(teacher) if config.compile else teacher),
        diffusion_batches(run, config, bundle, cache, run.recipe.seed),
        config,
        run.checkpoints("consistency"),
        run.recipe.seed,
        run.conduct,
    )
    if workers().main:
        bundle.save(run.folder / run.recipe.name)
    keep(run, "unet-consistency", bundle.unet)


def averaged(bundle: Bundle, report: Report) -> Bundle | None:
    """A copy of the bundle that draws with the averaged weights of this moment; None where others draw.

    Every process must ask, and waits for the one that draws: so that is done on the device that trains.
    """
    averages = report.averages()
    if not workers().main:
        return None
    drawing = copy.deepcopy(bundle)
    for name in ("autoencoder", "text", "unet"):
        getattr(drawing, name).to(workers().device).eval().requires_grad_(False)
    give_weights(drawing, averages)
    return drawing


def finish(run: Run) -> Path:
    """Put the products together; returns the folder of the bundle."""
    bundle = model_so_far(run)
    bundle.unet.load_state_dict(load_tensors(run.product(f"unet-{len(run.recipe.unet_training) - 1}")))
    return bundle.save(run.folder / run.recipe.name)
