"""Train a model from a recipe: one stage, or all of them from nothing to a bundle."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, run
from ldm.errors import SettingError

if TYPE_CHECKING:
    from ldm.bundle import Bundle
    from ldm.request import GenerationRequest
    from ldm.training.latents import Samples
    from ldm.training.loop import Report
    from ldm.training.recipe import DataConfig, Recipe
    from ldm.training.run import Run

EXAMPLES = """examples:
  python scripts/train.py all --config configs/shapes.yaml --run-dir runs/shapes
  python scripts/train.py unet --config configs/shapes.yaml --run-dir runs/shapes unet_training.0.batch_size=16
A stage that is interrupted goes on from its last checkpoint when the same command is given again."""
STAGES = ("all", "vae", "clip", "unet")
LINE_EVERY_SECONDS = 30.0
RECIPE = "recipe.yaml"


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=f"{__doc__}\n\n{EXAMPLES}", prog="train.py")
    made.add_argument("stage", choices=STAGES, help="which stage; all runs what is not finished yet, and then bundles")
    made.add_argument("--config", required=True, type=Path, metavar="FILE", help="the recipe, a YAML file")
    made.add_argument("--run-dir", required=True, type=Path, metavar="FOLDER", help="where products and logs go")
    made.add_argument("--train-data", metavar="GLOB", help="shards to use instead of the recipe's")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    return made


def main() -> None:
    """Check the recipe and the data, then run the stages that are not finished."""
    args = parser().parse_args()
    from ldm import config
    from ldm.training.recipe import DataConfig, Recipe

    recipe = config.load(args.config, Recipe, args.overrides)
    if args.train_data:
        data = DataConfig(shards=args.train_data)
        recipe = recipe.model_copy(update={"data": data})
    check(recipe, args.run_dir)
    from ldm.training.checkpoint import save_text
    from ldm.training.run import Run

    args.run_dir.mkdir(parents=True, exist_ok=True)
    save_text(args.run_dir / RECIPE, config.dump(recipe))
    this = Run(recipe, args.run_dir, lambda seed: open_samples(recipe.data, seed))
    if args.stage in ("all", "vae"):
        autoencoder(this)
    if args.stage in ("all", "clip"):
        clip(this)
    if args.stage in ("all", "unet"):
        unet(this)
    if args.stage == "all":
        from ldm.training.run import finish

        print(finish(this))


def check(recipe: "Recipe", folder: Path) -> None:
    """Say now what would stop the run later: wrong data, samples that cannot be drawn, another run's folder."""
    from ldm import config
    from ldm.models.text import LabelConfig, LabelEncoder
    from ldm.request import GenerationRequest, resolve
    from ldm.training.recipe import Recipe

    open_samples(recipe.data, 0)
    resolve(GenerationRequest(prompt="any"), recipe.model)
    for stage in recipe.unet_training:
        for prompt in recipe.sample_prompts:
            resolve(sample_request(prompt, stage.side), recipe.model)
    if isinstance(recipe.model.text, LabelConfig):
        LabelEncoder(recipe.model.text).encode(recipe.sample_prompts)
    if (folder / RECIPE).is_file():
        before, now = config.load(folder / RECIPE, Recipe).model_dump(), recipe.model_dump()
        changed = [key for key in now if now[key] != before[key] and not key.startswith("sample_")]
        if changed:
            raise SettingError(
                f"{folder}: this run began with another recipe, {', '.join(changed)} differ; "
                "use another --run-dir, or give the first recipe again"
            )


def sample_request(prompt: str, side: int) -> "GenerationRequest":
    """What samples on the way are drawn with."""
    from ldm.request import GenerationRequest

    return GenerationRequest(prompt=prompt, width=side, height=side, steps=20)


def open_samples(data: "DataConfig", seed: int) -> "Samples":
    """Captioned pictures without end, in an order that is a function of the seed."""
    if data.digits is not None:
        from ldm.data.digits import endless

        return endless(data.digits, seed)
    from ldm.data.shards import find_shards, read_samples

    assert data.shards is not None
    return read_samples(find_shards(data.shards), seed=seed, shuffle=True, epochs=None)


def autoencoder(this: "Run") -> None:
    """The autoencoder stage, and what it reached."""
    from ldm.training.run import autoencoder_stage

    for _ in shown(autoencoder_stage(this), this, "autoencoder"):
        pass
    about = this.product("autoencoder").with_suffix(".json")
    if about.is_file():
        figures = json.loads(about.read_text())
        note(f"autoencoder: PSNR {figures['psnr_db']} dB, preview map R² {figures['preview_r_squared']}")


def clip(this: "Run") -> None:
    """The CLIP stage."""
    from ldm.training.run import clip_stage

    for _ in shown(clip_stage(this), this, "clip"):
        pass


def unet(this: "Run") -> None:
    """Cached latents and the UNet, stage by stage."""
    from ldm.training.latents import LatentCache
    from ldm.training.run import latents_stage, model_so_far, unet_stage

    for index, stage in enumerate(this.recipe.unet_training):
        if this.product(f"unet-{index}").is_file():
            continue
        for progress in latents_stage(this, index):
            if isinstance(progress, LatentCache):
                cache = progress
            elif progress % 2048 == 0:
                note(f"latents at {stage.side} px: {progress} of {stage.pictures}")
        bundle = model_so_far(this)
        for report in shown(unet_stage(this, index, cache, bundle), this, f"unet-{index}"):
            if report.step % this.recipe.sample_every == 0 or report.step == report.total:
                sample_grid(this, bundle, report, f"unet-{index}-{report.step:06d}", stage.side)


def sample_grid(this: "Run", bundle: "Bundle", report: "Report", name: str, side: int) -> None:
    """Draw the recipe's prompts with the averaged weights of this moment."""
    from ldm.images import grid, save_png
    from ldm.pipeline import TextToImage
    from ldm.training.run import averaged

    prompts = this.recipe.sample_prompts
    request = sample_request(prompts[0], side)
    images = TextToImage(averaged(bundle, report)).draw(prompts, range(len(prompts)), request)
    folder = this.folder / "samples"
    folder.mkdir(exist_ok=True)
    save_png(grid(images, columns=min(8, len(images))), folder / f"{name}.png", {"prompts": list(prompts)})


def shown(reports: "Iterator[Report]", this: "Run", stage: str) -> "Iterator[Report]":
    """The reports, with a progress bar on a terminal, a line now and then elsewhere, and all of them in log.jsonl."""
    from tqdm import tqdm

    bar, began, said, first = None, time.monotonic(), 0.0, None
    with (this.folder / "log.jsonl").open("a", encoding="utf-8", buffering=1) as log:
        for report in reports:
            first = first if first is not None else report.step
            losses = {key: round(value, 5) for key, value in report.losses.items()}
            row = {"stage": stage, "step": report.step, "seconds": round(time.monotonic() - began, 1), **losses}
            log.write(json.dumps(row) + "\n")
            words = " ".join(f"{key} {value:.4f}" for key, value in losses.items())
            if sys.stderr.isatty():
                bar = bar or tqdm(total=report.total, initial=report.step - 1, desc=stage, unit="step")
                bar.set_postfix_str(words, refresh=False)
                bar.update()
            elif time.monotonic() - said >= LINE_EVERY_SECONDS or report.step in (1, report.total):
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
