"""Measure a model: draw fixed prompts from fixed seeds and count how many pictures are right."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, run

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.pipeline import TextToImage
    from ldm.request import GenerationRequest

EXAMPLES = """examples:
  python scripts/evaluate.py --metrics shapes
  python scripts/evaluate.py --model runs/ddpm-digits/ddpm-digits --metrics digits --sampler ddpm --steps 1000"""
FIRST_SEED = 10_000


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=f"{__doc__}\n\n{EXAMPLES}", prog="evaluate.py")
    made.add_argument("--model", metavar="NAME|PATH", help="bundle to measure [the bundled model]")
    made.add_argument("--metrics", choices=("shapes", "digits"), default="shapes", help="what is counted [shapes]")
    made.add_argument("--num-images", default="500", metavar="N", help="pictures per list of prompts [500]")
    made.add_argument("--sampler", help="sampler [the model's default]")
    made.add_argument("--schedule", help="grid of noise levels [the model's default]")
    made.add_argument("--steps", help="sampling steps [the model's default]")
    made.add_argument("--guidance-scale", help="guidance [the model's default]")
    made.add_argument("--batch-size", default="8", metavar="N", help="pictures drawn at once [8]")
    made.add_argument("--digits", default="bundled", metavar="FOLDER", help="real digits, MNIST's IDX files [bundled]")
    made.add_argument("--device", default="auto", help="cpu, cuda, … [auto]")
    made.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 [auto]")
    made.add_argument("--sheet", type=Path, metavar="FILE", help="save a PNG of the first 64 pictures of each list")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def main() -> None:
    """Draw, count, print."""
    args = parser().parse_args()
    from ldm.bundle import DEFAULT, Bundle
    from ldm.errors import SettingError
    from ldm.machine import check_names, find_device, find_dtype
    from ldm.models.text import LabelConfig
    from ldm.outputs import check_writable
    from ldm.pipeline import TextToImage
    from ldm.request import GenerationRequest, resolve

    check_names(args.device, args.dtype)
    for path in (args.out, args.sheet):
        if path is not None:
            check_writable(path.parent)
    device = find_device(args.device)
    dtype, _ = find_dtype(args.dtype, device)
    bundle = Bundle.load(args.model or DEFAULT, str(device), dtype)
    asked = GenerationRequest(
        prompt="measured",
        num_images=args.num_images,
        batch_size=args.batch_size,
        sampler=args.sampler,
        schedule=args.schedule,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
    )
    request = resolve(asked, bundle.config)
    if (args.metrics == "digits") != isinstance(bundle.config.text, LabelConfig):
        raise SettingError(f"metrics: {args.metrics} does not fit the model {bundle.name}; use the other one")
    measure = shapes if args.metrics == "shapes" else digits
    figures = measure(TextToImage(bundle), request, args)
    protocol = {
        "model": bundle.name,
        "sha256": bundle.sha256,
        "sampler": request.sampler,
        "schedule": request.schedule,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "first_seed": FIRST_SEED,
        "num_images": request.num_images,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if args.out:
        args.out.write_text(json.dumps({"protocol": protocol, "figures": figures}, indent=2) + "\n")
    print(json.dumps(protocol))


def draw(engine: "TextToImage", prompts: Sequence[str], request: "GenerationRequest") -> "list[Image]":
    """One picture per prompt, picture i from seed FIRST_SEED + i."""
    from tqdm import tqdm

    assert request.batch_size is not None
    images: list[Image] = []
    batch_size = request.batch_size
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, disable=not sys.stderr.isatty(), unit="batch"):
        chunk = prompts[start : start + batch_size]
        images += engine.draw(chunk, range(FIRST_SEED + start, FIRST_SEED + start + len(chunk)), request)
    return images


def shapes(engine: "TextToImage", request: "GenerationRequest", args: argparse.Namespace) -> dict[str, object]:
    """Held-out prompts with one object and with two, read by the oracle."""
    from ldm.data.shapes import held_out_prompts
    from ldm.evaluation.scores import score_shapes

    figures: dict[str, object] = {}
    for kind in ("one", "two"):
        prompts = held_out_prompts(request.num_images, kind, seed=0)
        began = time.monotonic()
        images = draw(engine, prompts, request)
        seconds = (time.monotonic() - began) / len(images)
        score = score_shapes(prompts, images)
        print(f"{kind}-object prompts: colour and shape right {score.colour_and_shape}")
        print(f"{kind}-object prompts: everything right {score.everything}; {seconds:.2f} s a picture")
        figures[kind] = {**score.as_json(), "wrong": [(i, prompts[i]) for i in score.wrong]}
        save_sheet(images, args.sheet, kind)
    return figures


def digits(engine: "TextToImage", request: "GenerationRequest", args: argparse.Namespace) -> dict[str, object]:
    """Every digit equally often, read by a linear probe that learned on real digits."""
    from ldm.data.digits import load
    from ldm.evaluation.scores import score_digits

    asked = [i % 10 for i in range(request.num_images)]
    images = draw(engine, [str(digit) for digit in asked], request)
    share, real = score_digits(asked, images, *load(args.digits))
    print(f"read as the digit asked for: {share}")
    print(f"the probe on held-out real digits: {real}")
    save_sheet(images, args.sheet, "digits")
    return {"read_as_asked": share.share, "probe_on_real": real.share}


def save_sheet(images: "list[Image]", path: Path | None, kind: str) -> None:
    """The first pictures side by side."""
    if path is not None:
        from ldm.images import grid, save_png

        save_png(grid(images[:64], columns=8), path.with_name(f"{path.stem}-{kind}.png"))


if __name__ == "__main__":
    run(main)
