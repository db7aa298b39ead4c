"""Measure a model, or pictures from anywhere: draw fixed prompts from fixed seeds, look, and say how sure it is."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, nearest, number, run, warn
from ldm.errors import SettingError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.evaluation.drawing import Drawing
    from ldm.evaluation.pictures import Look, Pictures
    from ldm.evaluation.report import Sheet
    from ldm.evaluation.results import Result
    from ldm.evaluation.suite import Judges

    Found = tuple[list[Result], list[Sheet]]

EXAMPLES = """metrics, separated by commas:
  shapes        held-out shapes, read back from pixels               digits        the same for a model of digits
  order         errors with captions of fresh shapes, and with the relation mirrored
  fid kid prdc  drawn against real pictures       --data --extractor
  clip-score    pictures against their captions   --evaluator [--data: real ones beside them]
  retrieval     R@1 among captions                --evaluator [--data, --more-captions, --style-groups]
  memorisation  nearest training pictures         --train-data [--data, --extractor]
  vae           reconstruction, PSNR and SSIM     --data
  loss          held-out ε-loss by noise level    --data

examples:
  python scripts/evaluate.py --metrics shapes
  python scripts/evaluate.py --model runs/ddpm-digits/ddpm-digits --metrics digits --sampler ddpm --steps 1000
  python scripts/evaluate.py --metrics vae,loss --data data/shapes --num-data 64
  python scripts/evaluate.py --metrics fid,retrieval --prompts prompts.txt --data data/shapes \\
    --extractor runs/shapes --evaluator runs/other --out report.json --html report.html"""
OF_MODEL = {"shapes": (), "order": (), "digits": (), "vae": ("data",), "loss": ("data",)}
COUNT = 500
PAIRS = 16
Item = TypeVar("Item")


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=f"{__doc__}\n\n{EXAMPLES}", prog="evaluate.py")
    made.add_argument("--model", metavar="NAME|PATH", help="bundle to measure [emoji-256]")
    made.add_argument("--metrics", default="shapes", metavar="A,B,…", help="what is measured, see above [shapes]")
    add_pictures(made.add_argument_group("pictures"))
    judges = made.add_argument_group("judges")
    judges.add_argument("--extractor", type=Path, metavar="PATH", help="features: TorchScript, or a run's CLIP")
    judges.add_argument("--extractor-side", default="299", metavar="N", help="pixels that TorchScript is given [299]")
    judges.add_argument("--evaluator", type=Path, metavar="PATH", help="a run's CLIP, not the one the model reads with")
    judges.add_argument("--more-captions", type=Path, metavar="FILE", help="further captions to tell apart")
    judges.add_argument("--style-groups", metavar="A,B;C", help="style words, groups that are judged as one")
    drawing = made.add_argument_group("drawing")
    drawing.add_argument("--num-images", metavar="N", help="pictures per list of prompts [500; of --prompts all]")
    drawing.add_argument("--sampler", help="sampler [the model's default]")
    drawing.add_argument("--schedule", help="grid of noise levels [the model's default]")
    drawing.add_argument("--steps", help="sampling steps [the model's default]")
    drawing.add_argument("--guidance-scale", help="guidance [the model's default]")
    drawing.add_argument("--batch-size", default="8", metavar="N", help="pictures drawn at once [8]")
    drawing.add_argument("--device", default="auto", help="cpu, cuda, … [auto]")
    drawing.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 [auto]")
    drawing.add_argument("--keep", type=Path, metavar="FOLDER", help="keep pictures there, and draw none of them again")
    made.add_argument("--sheet", type=Path, metavar="FILE", help="save the first 64 of each list, as FILE-one.png …")
    made.add_argument("--out", type=Path, metavar="FILE", help="write results and protocols as JSON")
    made.add_argument("--html", type=Path, metavar="FILE", help="write them as a page with pictures")
    return made


def add_pictures(group: "argparse._ArgumentGroup") -> None:
    """Where prompts and pictures come from."""
    group.add_argument("--prompts", type=Path, metavar="FILE", help="what to draw: .txt, .jsonl, .json [--data's]")
    group.add_argument("--pictures", metavar="WHERE", help="measure these instead of drawing any")
    group.add_argument("--data", metavar="WHERE", help="real pictures: shards, a folder of pictures, a list in .jsonl")
    group.add_argument("--num-data", metavar="N", help="the first N of --data [all]")
    group.add_argument("--train-data", metavar="WHERE", help="the pictures that the model was trained on")
    group.add_argument("--digits", default="bundled", metavar="FOLDER", help="real digits, MNIST's files [bundled]")


def main() -> None:
    """Check, draw, look, print, write."""
    args = parser().parse_args()
    from ldm.evaluation.report import as_html, as_json
    from ldm.files import save_text
    from ldm.outputs import check_writable

    names = chosen(args)
    for path in (args.out, args.sheet, args.html):
        if path is not None:
            check_writable(path.parent)
    if args.keep is not None:
        check_writable(args.keep)
    drawing = None if args.pictures and not set(names) & set(OF_MODEL) else open_model(args, names)
    judges = open_judges(args, drawing)
    results: list[Result] = []
    sheets: list[Sheet] = []
    with ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ldm-evaluate-")))
        for found in measured(args, names, drawing, judges, folder):
            results += found[0]
            sheets += found[1]
    count = count_of(args.num_images, "num_images")
    told: dict[str, object] = {"pictures": args.pictures} if drawing is None else drawing.about(count)
    if args.out:
        save_text(args.out, as_json(results, told))
    if args.html:
        save_text(args.html, as_html(results, sheets, f"Evaluation of {told.get('model') or told['pictures']}"))
    print(json.dumps(told))


def chosen(args: argparse.Namespace) -> list[str]:
    """The metrics asked for. Raises SettingError for an unknown one, and for one that lacks what it needs."""
    from ldm.evaluation.suite import METRICS

    needs = {**OF_MODEL, **{name: metric.needs for name, metric in METRICS.items()}}
    names = [name.strip() for name in args.metrics.split(",")]
    for name in names:
        if name not in needs:
            raise SettingError(f"metrics: no metric {name[:40]!r}{nearest(name, list(needs))}; use {', '.join(needs)}")
        for flag in needs[name]:
            if getattr(args, flag) is None:
                raise SettingError(f"--{flag.replace('_', '-')}: {name} needs it; name it, --help says what it takes")
        if name in METRICS and not (args.prompts or args.pictures or args.data):
            raise SettingError(f"--prompts: {name} needs something to draw; name a file, --data or --pictures")
    return names


def open_model(args: argparse.Namespace, names: Sequence[str]) -> "Drawing":
    """The model, ready to draw, and the settings to draw with. Raises SettingError where they do not fit."""
    from ldm.bundle import Bundle
    from ldm.evaluation.drawing import Drawing
    from ldm.formats.finding import DEFAULT
    from ldm.machine import check_names, find_device, find_dtype, keep_freed_memory
    from ldm.models.text import LabelConfig
    from ldm.pipeline import TextToImage
    from ldm.request import GenerationRequest, resolve

    check_names(args.device, args.dtype)
    asked = GenerationRequest(
        prompt="measured",
        batch_size=args.batch_size,
        sampler=args.sampler,
        schedule=args.schedule,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
    )
    count_of(args.num_images, "num_images")
    device = find_device(args.device)
    dtype, _ = find_dtype(args.dtype, device)
    keep_freed_memory()
    bundle = Bundle.load(args.model or DEFAULT, str(device), dtype)
    request = resolve(asked, bundle.config)
    labels = isinstance(bundle.config.text, LabelConfig)
    for name in names:
        if (name == "digits" and not labels) or (name in ("shapes", "order") and labels):
            raise SettingError(f"metrics: {name} does not fit the model {bundle.name}; use the other one")
    return Drawing(TextToImage(bundle), request)


def count_of(value: str | None, name: str, otherwise: int = COUNT) -> int:
    """A number of pictures."""
    from ldm.request import whole

    return otherwise if value is None else number(name, whole(1, 1_000_000, COUNT), value)


def open_judges(args: argparse.Namespace, drawing: "Drawing | None") -> "Judges":
    """The judges that are named. Raises SettingError for an evaluator that the model is conditioned with."""
    from ldm.evaluation.pictures import read_prompts
    from ldm.evaluation.retrieval import Styles
    from ldm.evaluation.suite import Judges
    from ldm.evaluation.towers import open_evaluator, open_extractor
    from ldm.machine import check_names, find_device

    check_names(args.device, args.dtype)
    device = str(find_device(args.device))
    side = count_of(args.extractor_side, "extractor_side")
    extractor = None if args.extractor is None else open_extractor(args.extractor, side, device)
    evaluator = None if args.evaluator is None else open_evaluator(args.evaluator, device)
    if evaluator is not None and drawing is not None and evaluator.shares_text_tower(drawing.engine.bundle.text):
        raise SettingError("--evaluator: the model is conditioned with this text tower; name a CLIP of another run")
    others = [] if args.more_captions is None else read_prompts(args.more_captions)
    try:
        styles = None if args.style_groups is None else Styles.parse(args.style_groups)
    except ValueError as error:
        raise SettingError(f"--style-groups: {error}; for example 3D,gradient;flat,simple;black and white") from None
    return Judges(extractor, evaluator, tuple(asked.caption for asked in others), styles)


def measured(
    args: argparse.Namespace, names: Sequence[str], drawing: "Drawing | None", judges: "Judges", folder: Path
) -> "Iterator[Found]":
    """Results and pictures of all metrics, one kind after another."""
    of_drawn = [name for name in names if name not in OF_MODEL]
    if drawing is not None:
        if "shapes" in names:
            yield shapes(drawing, args, folder)
        if "order" in names:
            yield order(drawing, args)
        if "digits" in names:
            yield digits(drawing, args, folder)
        if "vae" in names or "loss" in names:
            yield held_out(drawing, args, names)
    if of_drawn:
        yield drawn_against_real(drawing, args, of_drawn, judges, folder)


def shapes(drawing: "Drawing", args: argparse.Namespace, folder: Path) -> "Found":
    """Held-out prompts with one object and with two, read by the oracle."""
    from ldm.data.shapes import held_out_prompts
    from ldm.evaluation.drawing import opened
    from ldm.evaluation.report import sheet_of
    from ldm.evaluation.scores import score_shapes, shapes_results

    results: list[Result] = []
    sheets: list[Sheet] = []
    for kind in ("one", "two"):
        prompts = held_out_prompts(count_of(args.num_images, "num_images"), kind, seed=0)
        began = time.monotonic()
        images = [opened(path) for path in draw(drawing, prompts, folder)]
        seconds = (time.monotonic() - began) / len(images)
        score = score_shapes(prompts, images)
        print(f"{kind}-object prompts: colour and shape right {score.colour_and_shape}")
        print(f"{kind}-object prompts: everything right {score.everything}; {seconds:.2f} s a picture", flush=True)
        results += shapes_results(score, kind, prompts, drawing.made(prompts))
        sheets.append(sheet_of(f"{kind}-object prompts", images, prompts))
        save_sheet(images, args.sheet, kind)
    return results, sheets


def order(drawing: "Drawing", args: argparse.Namespace) -> "Found":
    """Whether captions of two shapes are told from those that mirror their relation."""
    from ldm.evaluation.held_out import encoded
    from ldm.evaluation.order import order_results, pairs

    asked, bundle = list(pairs(count_of(args.num_images, "num_images"))), drawing.engine.bundle
    seen = last(encoded(bundle, lambda: (pair.picture for pair in asked), decode=False), "encoding")
    results, table = order_results(bundle, seen, [pair.mirrored for pair in asked])
    print(table)
    tell(results)
    return results, []


def digits(drawing: "Drawing", args: argparse.Namespace, folder: Path) -> "Found":
    """Every digit equally often, read by a linear probe that learned on real digits."""
    from ldm.data.digits import load
    from ldm.evaluation.drawing import opened
    from ldm.evaluation.report import sheet_of
    from ldm.evaluation.scores import digits_results, score_digits

    asked = [i % 10 for i in range(count_of(args.num_images, "num_images"))]
    prompts = [str(digit) for digit in asked]
    images = [opened(path) for path in draw(drawing, prompts, folder)]
    real = load(args.digits)
    share, of_real = score_digits(asked, images, *real)
    print(f"read as the digit asked for: {share}")
    print(f"the probe on held-out real digits: {of_real}")
    save_sheet(images, args.sheet, "digits")
    sheets = [sheet_of("digits", images, prompts)]
    return digits_results(share, of_real, real[0], drawing.made(prompts)), sheets


def held_out(drawing: "Drawing", args: argparse.Namespace, names: Sequence[str]) -> "Found":
    """Reconstruction and ε-loss of real pictures."""
    from ldm.evaluation.held_out import autoencoder_results, encoded, loss_results, loss_table
    from ldm.evaluation.report import Sheet

    bundle, pictures = drawing.engine.bundle, real_pictures(args)
    seen = last(encoded(bundle, pictures, decode="vae" in names, pairs=PAIRS), "encoding")
    results: list[Result] = []
    sheets: list[Sheet] = []
    if "vae" in names:
        results += autoencoder_results(bundle, seen)
        lines = [line for caption in seen.captions for line in (caption, f"{caption}, reconstructed")]
        sheets.append(Sheet("Reconstructions", seen.pairs, tuple(lines[: len(seen.pairs)])))
        save_sheet(seen.pairs, args.sheet, "vae")
    if "loss" in names:
        found, bins = loss_results(bundle, seen)
        print(loss_table(bins))
        results += found
    tell(results)
    return results, sheets


def drawn_against_real(
    drawing: "Drawing | None", args: argparse.Namespace, names: Sequence[str], judges: "Judges", folder: Path
) -> "Found":
    """Everything that is measured in features of drawn pictures."""
    from ldm.evaluation.pictures import find_pictures, look
    from ldm.evaluation.report import PICTURES, Sheet
    from ldm.evaluation.suite import Evidence, measured

    eyes, real, trained = judges.eyes(names), None, None
    if args.data is not None:
        real = last(look(real_pictures(args), eyes, PICTURES), "real pictures")
    pictures, made = subjects(drawing, args, real, folder)
    drawn = last(look(pictures, eyes, PICTURES), "drawn pictures")
    if args.train_data is not None:
        eyes_on_training = judges.eyes(names, trained=True)
        trained = last(look(find_pictures(args.train_data), eyes_on_training), "training pictures")
    evidence = Evidence(drawn, made or {"pictures_sha256": drawn.sha256}, judges, real, trained)
    results: list[Result] = []
    for name in names:
        found = measured(name, evidence)
        tell(found)
        results += found
    save_sheet(drawn.thumbnails, args.sheet, "drawn")
    looks = [("Drawn", drawn), *([("Real", real)] if real is not None else [])]
    return results, [Sheet(title, seen.thumbnails, seen.captions[: len(seen.thumbnails)]) for title, seen in looks]


def subjects(
    drawing: "Drawing | None", args: argparse.Namespace, real: "Look | None", folder: Path
) -> "tuple[Pictures, dict[str, object]]":
    """The pictures that are measured, and what decided them; nothing for pictures that others have made."""
    from ldm.evaluation.pictures import Asked, find_pictures, read_prompts, recaptioned

    asked = [] if args.prompts is None else read_prompts(args.prompts)
    if args.pictures is not None:
        pictures = find_pictures(args.pictures)
        return recaptioned(pictures, asked) if asked else pictures, {}
    assert drawing is not None
    if not asked and real is not None:
        asked = [Asked(caption, caption) for caption in real.captions]
    count = count_of(args.num_images, "num_images", otherwise=len(asked))
    asked = [asked[i % len(asked)] for i in range(count)]
    return drawing.captioned(asked, draw(drawing, [one.prompt for one in asked], folder))


def real_pictures(args: argparse.Namespace) -> "Pictures":
    """The real ones that are asked for."""
    from ldm.evaluation.pictures import find_pictures

    return find_pictures(args.data, None if args.num_data is None else count_of(args.num_data, "num_data"))


def draw(drawing: "Drawing", prompts: Sequence[str], folder: Path) -> list[Path]:
    """The files of drawn pictures, one for each prompt, with a progress bar where somebody looks."""
    from tqdm import tqdm

    paths = drawing.draw(prompts, folder)
    return list(tqdm(paths, "drawing", len(prompts), disable=not sys.stderr.isatty(), unit="picture", leave=False))


def last(reports: "Iterator[int | Item]", what: str) -> Item:
    """The last of reports, those before it being numbers of pictures for a progress bar."""
    from tqdm import tqdm

    with tqdm(desc=what, disable=not sys.stderr.isatty(), unit="picture", leave=False) as bar:
        for report in reports:
            if not isinstance(report, int):
                return report
            bar.update(report - bar.n)
    raise AssertionError("unreachable")


def tell(results: "Sequence[Result]") -> None:
    """A line for each result, and a warning for each note."""
    for result in results:
        print(result, flush=True)
        for note in result.notes:
            warn(f"{result.metric}: {note}")


def save_sheet(images: "Sequence[Image]", path: Path | None, kind: str) -> None:
    """The first pictures side by side."""
    if path is not None:
        from ldm.images import grid, save_png

        save_png(grid(list(images[:64]), columns=8), path.with_name(f"{path.stem}-{kind}.png"))


if __name__ == "__main__":
    run(main)
