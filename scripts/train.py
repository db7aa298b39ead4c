"""Train a model from a recipe: one stage, all of them from nothing to a bundle, or an adaptation of a model."""

import fcntl
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, run
from ldm.errors import LdmError, MachineError, SettingError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from ldm.bundle import Bundle
    from ldm.training.diffusion import DiffusionTraining
    from ldm.training.latents import LatentCache
    from ldm.training.loop import Conduct, Report
    from ldm.training.recipe import Recipe
    from ldm.training.record import Record
    from ldm.training.run import Run

EXAMPLES = """examples:
  python scripts/train.py all --config configs/shapes.yaml --run-dir runs/shapes
  python scripts/train.py unet --config configs/shapes.yaml --run-dir runs/shapes unet_training.0.batch_size=16
  python scripts/train.py lora --config my-lora.yaml --base model.safetensors --run-dir runs/my-lora
  accelerate launch --num_processes 8 scripts/train.py all --config configs/sd15.yaml --run-dir runs/sd15
A stage that is interrupted goes on from its last checkpoint when the same command is given again."""
ADAPTATIONS = ("lora", "inversion", "consistency")
STAGES = ("all", "vae", "clip", "thumbnail", "evaluator", "unet", "bundle", *ADAPTATIONS)
LINE_EVERY_SECONDS = 30.0
LONGEST_MINUTES = 100_000


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=f"{__doc__}\n\n{EXAMPLES}", prog="train.py")
    made.add_argument("stage", choices=STAGES, help="which stage; all runs what is not finished yet, and then bundles")
    made.add_argument("--config", required=True, type=Path, metavar="FILE", help="the recipe, a YAML file")
    made.add_argument("--run-dir", required=True, type=Path, metavar="FOLDER", help="where products and logs go")
    made.add_argument("--base", metavar="NAME|PATH", help="the model that gives the parts that are not trained here")
    made.add_argument("--train-data", metavar="GLOB", help="shards to use instead of the recipe's")
    made.add_argument("--minutes", type=float, metavar="N", help="save and end with exit code 75 after so long")
    made.add_argument("--report-to", choices=("tensorboard", "wandb", "none"), help="default: tensorboard")
    made.add_argument("--dist-timeout", type=float, default=600.0, metavar="SECONDS", help="how long processes wait")
    made.add_argument("--allow-world-size-change", action="store_true", help="resume on another number of processes")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    return made


def main() -> int:
    """Check the recipe and the data, then run the stages that are not finished; returns the exit code."""
    args = parser().parse_intermixed_args()  # overrides may stand before, between and behind flags
    if args.minutes is not None and not 0 < args.minutes < LONGEST_MINUTES:
        raise SettingError(
            f"--minutes: got {args.minutes:g}, expected more than 0 and less than {LONGEST_MINUTES}; choose another"
        )
    from ldm import config
    from ldm.training.recipe import Recipe

    overrides = list(args.overrides)
    if args.train_data:
        overrides += ["data.digits=null", f"data.shards={json.dumps(args.train_data)}"]
    recipe = config.load(args.config, Recipe, overrides)
    from ldm.training.workers import workers

    if args.stage == "bundle":
        return bundled(args, recipe)
    me = workers(args.dist_timeout)
    with ExitStack() as held:
        refused = taken(args.run_dir, held) if me.main else None
        if not me.agreed(refused is not None):
            return conducted(args, recipe)
    if refused is not None:
        raise refused
    return SettingError.exit_code  # the main process says why


def conducted(args: "argparse.Namespace", recipe: "Recipe") -> int:
    """Train until it is done or a signal comes, and leave in status.json how it ended."""
    import torch

    from ldm.machine import keep_freed_memory
    from ldm.training import signals
    from ldm.training.farewell import together
    from ldm.training.loop import Conduct
    from ldm.training.record import Record, trackers
    from ldm.training.workers import workers

    me = workers()
    keep_freed_memory(heaps=None)
    with signals.caught(args.minutes) as stop:
        record = Record(args.run_dir, me)
        try:
            with together(me):
                this = opened(args, recipe, Conduct(stop, args.allow_world_size_change))
            record.bad_samples = this.bad_samples
            record.watching = trackers(args.report_to, recipe.name, args.run_dir) if me.main else []
            with together(me):
                stages(this, args.stage, record)
        except signals.Stopped as stopped:
            if me.main:
                record.status("saved", signal=str(stopped))
                note(f"stopped by {stopped}; the state is saved: give the same command again to go on")
            return stopped.exit_code
        except torch.OutOfMemoryError:
            record.status("failed", error="out of memory")
            raise MachineError(
                "memory: the GPU's is too small for a step; lower micro_batch_size, then set "
                "gradient_checkpointing=true, precision=bf16, and with several GPUs strategy=fsdp"
            ) from None
        except SystemExit:  # another process says why
            raise
        except BaseException as error:
            told = str(error) if isinstance(error, LdmError) else f"{type(error).__name__}: {error}"
            record.status("failed", error=told)
            raise
        finally:
            record.close()
        if me.main:
            record.status("finished")
    return 0


def bundled(args: "argparse.Namespace", recipe: "Recipe") -> int:
    """Put together what the run has at this moment, also while another process trains it; prints the folder."""
    from ldm.bundle import Bundle
    from ldm.training.run import Run
    from ldm.training.snapshot import snapshot

    base = Bundle.load(args.base) if args.base else None
    print(snapshot(Run(recipe, args.run_dir, base)))
    return 0


def taken(folder: Path, held: ExitStack) -> SettingError | None:
    """Take the lock of a run's folder, until `held` or the process ends. What is wrong where another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        fcntl.flock(held.enter_context((folder / ".lock").open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return SettingError(f"{folder}: another run is using this folder; wait for it or give another --run-dir")
    return None


def opened(args: "argparse.Namespace", recipe: "Recipe", conduct: "Conduct") -> "Run":
    """The run, once its recipe, base and data are known to be right; raises what would stop it later."""
    from ldm.bundle import Bundle
    from ldm.training.continuity import begin
    from ldm.training.preflight import check
    from ldm.training.run import Run
    from ldm.training.source import require

    require(recipe.data)  # says what is wrong with the data before a model is opened
    base = Bundle.load(args.base) if args.base else None
    this = Run(recipe, args.run_dir, base, conduct)
    check(this, args.stage, reads_latents=args.stage in ("unet", *ADAPTATIONS))
    begin(this)
    return this


def stages(this: "Run", stage: str, record: "Record") -> None:
    """Run one stage, or all that a recipe has, and put their products together."""
    from ldm.training.stages import finish
    from ldm.training.workers import workers

    if stage in ("all", "vae"):
        autoencoder(this, record)
    if stage in ("all", "clip"):
        clip(this, record)
    if stage in ("all", "thumbnail"):
        thumbnail(this, record)
    if stage in ("all", "evaluator"):
        evaluator(this, record)
    if stage in ("all", "unet"):
        unet(this, record)
    if stage in ADAPTATIONS:
        adapt(this, stage, record)
    if stage == "all" and this.recipe.unet_training and workers().main:
        print(finish(this))


def autoencoder(this: "Run", record: "Record") -> None:
    """The autoencoder stage, and what it reached."""
    from ldm.training.stages import autoencoder_stage

    config = this.recipe.autoencoder_training
    run = this.square().mixing(config.mix_share if config else None)
    for _ in shown(autoencoder_stage(run), record, "autoencoder"):
        pass
    about = this.product("autoencoder").with_suffix(".json")
    if about.is_file() and record.me.main:
        figures = json.loads(about.read_text())
        note(f"autoencoder: PSNR {figures['psnr_db']} dB, preview map R² {figures['preview_r_squared']}")


def clip(this: "Run", record: "Record") -> None:
    """The CLIP stage."""
    from ldm.training.stages import clip_stage

    config = this.recipe.clip_training
    for _ in shown(clip_stage(this.square().mixing(config.mix_share if config else None)), record, "clip"):
        pass


def thumbnail(this: "Run", record: "Record") -> None:
    """What CLIP does not teach the text tower."""
    from ldm.training.stages import thumbnail_stage

    config = this.recipe.thumbnail_training
    for _ in shown(thumbnail_stage(this.square().mixing(config.mix_share if config else None)), record, "thumbnail"):
        pass


def evaluator(this: "Run", record: "Record") -> None:
    """The CLIP that judges."""
    from ldm.training.evaluator import evaluator_stage

    config = this.recipe.evaluator_training
    for _ in shown(evaluator_stage(this.square().mixing(config.mix_share if config else None)), record, "evaluator"):
        pass


def unet(this: "Run", record: "Record") -> None:
    """Latents and the UNet, stage by stage."""
    from ldm.training.run import model_so_far
    from ldm.training.stages import unet_stage

    for index, stage in enumerate(this.recipe.unet_training):
        if this.has(f"unet-{index}"):
            continue
        mixed = this.mixing(stage.mix_share)
        cache = encoded(mixed, stage, record)
        bundle = model_so_far(this)
        for report in shown(unet_stage(mixed, index, cache, bundle), record, f"unet-{index}"):
            sample(this, bundle, report, f"unet-{index}", stage.side)


def adapt(this: "Run", stage: str, record: "Record") -> None:
    """A LoRA of the base's UNet, a new word for it, or a UNet that needs few steps."""
    from dataclasses import replace

    from ldm.training.consistency import few_steps
    from ldm.training.run import model_so_far
    from ldm.training.stages import consistency_stage, inversion_stage, lora_stage

    recipe = this.recipe
    config = {
        "lora": recipe.lora_training,
        "inversion": recipe.inversion_training,
        "consistency": recipe.consistency_training,
    }[stage]
    if config is None:
        raise SettingError(f"{stage}_training: this recipe has no such section; add one, see docs/training.md")
    if this.base is None:
        raise SettingError(f"--base: {stage} needs the model that it adapts; give its name or path")
    mixed = this.mixing(config.mix_share)
    cache = encoded(mixed, config, record)
    bundle = model_so_far(this)
    if stage == "consistency":
        bundle = replace(bundle, config=few_steps(bundle.config))
    running = {"lora": lora_stage, "inversion": inversion_stage, "consistency": consistency_stage}[stage]
    for report in shown(running(mixed, cache, bundle), record, stage):
        if stage != "inversion":
            sample(this, bundle, report, stage, config.side)


def encoded(this: "Run", stage: "DiffusionTraining", record: "Record") -> "LatentCache | None":
    """The latents of a stage, made where they are not there; None for a stage that encodes as it goes."""
    from ldm.training.latents import LatentCache
    from ldm.training.stages import latents_stage
    from ldm.training.workers import workers

    if stage.pictures is None:
        return None
    for progress in latents_stage(this, stage, stage.pictures):
        if isinstance(progress, LatentCache):
            return progress.to(workers().device)
        if this.conduct.stop is not None:
            this.conduct.stop.check()
        if progress and progress % 2048 == 0:
            note(f"latents at {stage.side} px: {progress} of {stage.pictures}")
            record.status("encoding", side=stage.side, done=progress, of=stage.pictures)
    raise AssertionError("unreachable")


def sample(this: "Run", bundle: "Bundle", report: "Report", stage: str, side: int) -> None:
    """Now and then, draw the recipe's prompts with the averaged weights of this moment."""
    from ldm.images import grid, save_png
    from ldm.pipeline import TextToImage
    from ldm.training.preflight import sample_request
    from ldm.training.signals import Stopped
    from ldm.training.stages import averaged

    if report.stopping or (report.step % this.recipe.sample_every and report.step != report.total):
        return
    drawing = averaged(bundle, report)
    if drawing is None:
        return
    stop = this.conduct.stop
    if stop is not None:
        drawing.unet.register_forward_pre_hook(lambda *_: stop.check())
    prompts = this.recipe.sample_prompts
    request = sample_request(prompts[0], side, None if stage == "consistency" else 20)
    try:
        images = TextToImage(drawing).draw(prompts, range(len(prompts)), request)
    except Stopped:
        return  # the loop saves first, and raises it again
    folder = this.folder / "samples"
    folder.mkdir(exist_ok=True)
    path = folder / f"{stage}-{report.step:06d}.png"
    save_png(grid(images, columns=min(8, len(images))), path, {"prompts": list(prompts)})


def shown(reports: "Iterator[Report]", record: "Record", stage: str) -> "Iterator[Report]":
    """The reports, all of them recorded, with a progress bar on a terminal and a line now and then elsewhere."""
    from tqdm import tqdm

    bar, began, said, first = None, time.monotonic(), 0.0, None
    for report in reports:
        first = first if first is not None else report.step
        record.step(stage, report)
        words = " ".join(f"{key} {value:.4f}" for key, value in report.losses.items())
        if record.me.main and sys.stderr.isatty():
            bar = bar or tqdm(total=report.total, initial=report.step - 1, desc=stage, unit="step")
            bar.set_postfix_str(words, refresh=False)
            bar.update()
        elif record.me.main and (time.monotonic() - said >= LINE_EVERY_SECONDS or report.step in (1, report.total)):
            said = time.monotonic()
            left = (said - began) / max(1, report.step - first) * (report.total - report.step)
            note(f"{stage} {report.step}/{report.total} {words} {report.rate:.1f}/s, {left / 60:.0f} min left")
        yield report
    if bar is not None:
        bar.close()


def note(text: str) -> None:
    """Say something on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
