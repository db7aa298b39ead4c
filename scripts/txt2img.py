"""Draw pictures from text."""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, number, printable, run, warn
from ldm.errors import DataError, SettingError

if TYPE_CHECKING:
    from ldm.bundle import Bundle
    from ldm.models.model_config import ModelConfig
    from ldm.pipeline import GeneratedImage, TextToImage
    from ldm.request import GenerationRequest

EXAMPLES = """examples:
  python scripts/txt2img.py --prompt "a 3D emoji of a red apple"
  python scripts/txt2img.py -p "a cartoon emoji of a tulip" --seed 7 -n 4 --steps 20 --sampler euler_ancestral"""

EPILOG = """Pictures are PNG files with their settings inside; only their paths are printed on stdout, one a line.
Image i of a prompt is drawn from seed + i; every prompt starts from the same seed.
exit codes: 0 done, 2 bad setting, 3 bad prompt file, 4 bad model, 5 machine, 6 numbers not finite, 130 Ctrl-C"""

# What the flags of CompVis's scripts are called here; they work and are not shown.
OLD_NAMES = {
    "--ckpt": "model",
    "--ddim_steps": "steps",
    "--scale": "guidance_scale",
    "--cfg-scale": "guidance_scale",
    "--scheduler": "schedule",
    "--n_samples": "batch_size",
    "--precision": "dtype",
    "--W": "width",
    "--H": "height",
}
SETTINGS = (
    "negative_prompt",
    "width",
    "height",
    "steps",
    "sampler",
    "schedule",
    "sigmas",
    "timesteps",
    "convention",
    "guidance_scale",
    "guidance_rescale",
    "guidance_interval",
    "perp_neg",
    "reuse",
    "merge_tokens",
    "prompt_syntax",
    "rng",
    "seed",
    "num_images",
    "batch_size",
    "batch_exact",
    "allow_empty_prompt",
)
# Up to so many texts are read before anything is drawn, and the text tower goes: half a gigabyte of Stable Diffusion's.
READ_AHEAD = 64


class Once(argparse.Action):
    """Stores a value, and says so when a flag is given twice: the last one counts."""

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, value: Any, flag: str | None = None
    ) -> None:
        if getattr(args, self.dest) is not None:
            warn(f"{flag}: given more than once; {value} counts")
        setattr(args, self.dest, value)


def parser() -> ArgumentParser:
    """The flags. They are read as text: the request checks their values, in the same words as everywhere else."""
    made = ArgumentParser(prog="txt2img.py", description=f"{__doc__}\n\n{EXAMPLES}", epilog=EPILOG)
    made.register("action", None, Once)
    basic = made.add_argument_group("basic")
    basic.add_argument(
        "-p", "--prompt", action="append", metavar="TEXT", help="what to draw; repeatable; -: lines of stdin"
    )
    basic.add_argument("--from-file", metavar="FILE", help="read prompts from a text file, one a line")
    basic.add_argument("--negative-prompt", metavar="TEXT", help="what to keep out of the picture [nothing]")
    basic.add_argument("--model", metavar="NAME|PATH", help="a bundled model, a folder, or a file [emoji-256]")
    basic.add_argument("--seed", metavar="N", help="0 … 4294967295, or -1 for a random one [-1]")
    basic.add_argument("-n", "--num-images", metavar="N", help="pictures of each prompt [the batch size, else 1]")
    basic.add_argument("--steps", metavar="N", help="1 … 1000 [the model's]")
    basic.add_argument("--guidance-scale", metavar="X", help="0 … 30; 1 is no guidance [the model's]")
    basic.add_argument("--size", metavar="WxH", help="picture size in pixels [the model's]")
    advanced = made.add_argument_group("advanced")
    add_sampling(advanced)
    advanced.add_argument("--reuse", metavar="N", help="1 … 20; ask coarse levels every Nth time: faster, worse [1]")
    advanced.add_argument("--merge-tokens", metavar="X", help="0 … 0.75; like pixels attend as one: faster, worse [0]")
    advanced.add_argument("--width", metavar="N", help="64 … 2048, instead of --size")
    advanced.add_argument("--height", metavar="N", help="64 … 2048, instead of --size")
    advanced.add_argument("--batch-size", metavar="N", help="pictures drawn at once [what has 512x512 pixels together]")
    advanced.add_argument("--batch-exact", action="store_true", default=None, help="the network sees one image a call")
    advanced.add_argument("--allow-empty-prompt", action="store_true", default=None, help="draw without a prompt")
    advanced.add_argument(
        "--prediction", choices=("eps", "v"), help="what a Stable Diffusion file's UNet predicts [told from the file]"
    )
    advanced.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N, mps [auto]")
    advanced.add_argument("--dtype", metavar="NAME", help="auto, float32, bfloat16, float16 [auto]")
    advanced.add_argument("--offload", action="store_true", help="networks are on the device only while they are asked")
    advanced.add_argument("--tiled-vae", action="store_true", help="decode in bands of rows: less memory, same picture")
    advanced.add_argument("--compile", action="store_true", help="translate the networks first: for many pictures")
    output = made.add_argument_group("output")
    output.add_argument("--outdir", metavar="FOLDER", help="where pictures go, as NNNN-prompt.png [outputs]")
    output.add_argument("--output", metavar="FILE", help="the exact name of one picture, instead of --outdir")
    output.add_argument("--grid", metavar="FILE", help="also write all pictures as one, a row for each prompt")
    output.add_argument("--preview-every", metavar="N", help="write a preview NAME.step012.png every N steps [never]")
    output.add_argument("--json", action="store_true", help="print one line of JSON for each picture")
    output.add_argument("--dry-run", action="store_true", help="print the settings and noise levels, and stop")
    output.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes")
    output.add_argument("--version", action="version", version=f"ldm {version()}")
    for flag, name in OLD_NAMES.items():
        made.add_argument(flag, dest=name, help=argparse.SUPPRESS)
    return made


def add_sampling(group: "argparse._ArgumentGroup") -> None:
    """The flags that say how to get from noise to a picture; docs/samplers.md explains them."""
    from ldm.diffusion.names import CONVENTIONS, GRIDS
    from ldm.diffusion.samplers import SAMPLERS
    from ldm.request import PROMPT_SYNTAXES, RNGS

    group.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} [the model's]")
    group.add_argument("--schedule", metavar="NAME", help=f"noise levels: {', '.join(GRIDS)} [the model's]")
    group.add_argument(
        "--sigmas", metavar="X,…,0", help="the noise levels themselves, instead of --schedule and --steps"
    )
    group.add_argument("--timesteps", metavar="N,…", help="the timesteps themselves, instead of --schedule and --steps")
    group.add_argument("--convention", metavar="NAME", help=f"as in {', '.join(CONVENTIONS)} [the model's]")
    group.add_argument("--rng", metavar="NAME", help=f"where noise comes from: {', '.join(RNGS)} [keyed]")
    group.add_argument("--guidance-rescale", metavar="X", help="0 … 1; less contrast at high guidance [0]")
    group.add_argument("--guidance-interval", metavar="LOW,HIGH", help="guide only between these noise levels [always]")
    group.add_argument("--perp-neg", metavar="X", help="0 … 30; weight of what only the negative prompt says [0: off]")
    group.add_argument("--prompt-syntax", metavar="NAME", help=f"{', '.join(PROMPT_SYNTAXES)}: text as it is [plain]")


def version() -> str:
    """The version that is installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("ldm")
    except PackageNotFoundError:
        return "(not installed)"


def main() -> None:
    """Check everything that can be checked, cheapest first; then load the model and draw."""
    args = parser().parse_args()
    # Paths are printed as the bytes they are, also where they are not UTF-8.
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # stdout is a text file
    requests = read_requests(args)
    preview_every = check_output(args, requests)
    from ldm.formats.finding import DEFAULT, find

    folder = find(args.model or DEFAULT)
    from ldm import bundle
    from ldm.diffusion.conventions import missing
    from ldm.machine import find_device, find_dtype, keep_compiled, keep_freed_memory
    from ldm.models.autoencoder import KLAutoencoder
    from ldm.pipeline import TextToImage, memory_plan
    from ldm.request import resolve, resolve_seed

    config = bundle.read_config(folder, args.prediction)
    seed = resolve_seed(requests[0].seed)
    requests = [resolve(request.model_copy(update={"seed": seed}), config) for request in requests]
    assert requests[0].convention and requests[0].sampler
    note(args, missing(requests[0].convention, requests[0].sampler, requests[0].schedule))
    device = find_device(args.device or "auto")
    dtype, remark = find_dtype(args.dtype or "auto", device)
    memory = {}
    if args.dry_run or args.offload or args.tiled_vae:
        on_cpu = device.type == "cpu"  # where nothing is lent
        memory = memory_plan(requests[0], config, dtype, args.offload and not on_cpu, args.tiled_vae or on_cpu)
    if args.dry_run:
        for request in requests:
            show_plan(request, config, memory, args.json)
        return
    keep_freed_memory()
    note(args, remark)
    note(args, ", ".join(f"{what}: {count / 1e9:.2f} GB" for what, count in memory.items()))
    note(args, f"seed: {seed}")
    if device.type == "cuda":
        from ldm.nn.attention import backend

        note(args, f"attention: {backend(device, dtype)}")
    loaded = bundle.Bundle.load(str(folder), "cpu" if args.offload else str(device), dtype, args.prediction)
    if args.tiled_vae and isinstance(loaded.autoencoder, KLAutoencoder):
        loaded.autoencoder.spare_memory()
    if args.compile:
        keep_compiled()
        loaded.compile()
    if loaded.description is not None and loaded.description.layout != "bundle":
        note(args, f"{loaded.name}: {loaded.description.summary}")
    loaded = loaded if args.offload else read_ahead(loaded, requests)
    draw_all(args, requests, TextToImage(loaded, str(device) if args.offload else None), preview_every)


def read_ahead(loaded: "Bundle", requests: "Sequence[GenerationRequest]") -> "Bundle":
    """The model without its text tower, whose memory the other networks then use, if it is asked for few texts."""
    from dataclasses import replace

    from ldm.models.text import ReadAhead

    prompts = [text for one in requests for text in (one.prompt, one.negative_prompt)]
    texts = dict.fromkeys((*prompts, *("" for one in requests if one.perp_neg > 0.0)))
    return replace(loaded, text=ReadAhead(loaded.text, tuple(texts))) if len(texts) <= READ_AHEAD else loaded


def note(args: argparse.Namespace, text: str) -> None:
    """Say `text` on stderr, unless asked to be quiet."""
    if text and not args.quiet:
        print(printable(text), file=sys.stderr, flush=True)


def read_requests(args: argparse.Namespace) -> "list[GenerationRequest]":
    """One checked request for each prompt of the command line, of stdin and of the file."""
    from ldm.machine import check_names
    from ldm.prompts import clean, read_lines
    from ldm.request import GenerationRequest

    check_names(args.device or "auto", args.dtype or "auto")
    if args.size is not None:
        args.width, args.height = read_size(args)
    if args.num_images is None:
        args.num_images = args.batch_size
    settings = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    prompts = [("", text) for text in args.prompt or [] if text != "-"]
    files = [("stdin", sys.stdin.buffer.read())] if "-" in (args.prompt or []) else []
    if args.from_file is not None:
        files.append((args.from_file, read_bytes(args.from_file)))
    for name, data in files:
        prompts += [(f"{name}:{line}", text) for line, text in read_lines(data, name)]
    requests = []
    for where, text in prompts or [("", "")]:
        try:
            requests.append(GenerationRequest(prompt=text, **settings))
        except SettingError as error:
            if not where or not str(error).startswith("prompt:"):
                raise
            raise DataError(f"{where}: {error}") from None
        if requests[-1].prompt != text:
            warn("prompt: control characters were removed")
    if clean(args.negative_prompt or "") != (args.negative_prompt or ""):
        warn("negative_prompt: control characters were removed")
    return requests


def read_bytes(name: str) -> bytes:
    """The content of a prompt file."""
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}; give a text file with one prompt a line") from None


def read_size(args: argparse.Namespace) -> tuple[str, str]:
    """Width and height of --size WxH, still to be checked."""
    if args.width is not None or args.height is not None:
        raise SettingError("size: given together with --width or --height; use one of the two ways")
    match = re.fullmatch(r"([0-9]{1,9})[xX×]([0-9]{1,9})", args.size)
    if match is None:
        raise SettingError(f"size: {args.size[:40]} is not WIDTHxHEIGHT; use for example 512x512")
    return match[1], match[2]


def check_output(args: argparse.Namespace, requests: "Sequence[GenerationRequest]") -> int:
    """Prove that the pictures can be written; returns the number of steps between previews, 0 for none."""
    from ldm.outputs import check_new, check_writable
    from ldm.request import whole

    preview_every = 0 if args.preview_every is None else number("preview_every", whole(1, 1000, 10), args.preview_every)
    if args.output is not None:
        if args.outdir is not None:
            raise SettingError("output: given together with --outdir; use one of the two")
        if len(requests) > 1 or requests[0].num_images > 1:
            raise SettingError("output: names one picture, but more are asked for; use --outdir")
        check_new(Path(args.output))
    if args.grid is not None:
        check_new(Path(args.grid), "grid")
        if args.output is not None and Path(args.grid) == Path(args.output):
            raise SettingError("grid: is the name that --output has; give another one")
    if not args.dry_run:
        for file in filter(None, (args.output or outdir(args) / "any.png", args.grid)):
            check_writable(Path(file).parent)
    return preview_every


def outdir(args: argparse.Namespace) -> Path:
    """The folder of numbered pictures."""
    return Path("outputs" if args.outdir is None else args.outdir)


def show_plan(request: "GenerationRequest", config: "ModelConfig", memory: "dict[str, int]", as_json: bool) -> None:
    """Print what would be done: the settings, the timesteps and noise levels σ visited, and the cost."""
    from ldm.bundle import noise_schedule
    from ldm.pipeline import network_calls, route_of

    schedule = noise_schedule(config)
    there = route_of(request, schedule)
    images = 1 if request.batch_exact else min(request.num_images, request.batch_size or 1)
    plan = {
        **request.settings(),
        "timesteps": [round(timestep, 3) for timestep in there.timesteps],
        "sigmas": [round(sigma, 5) for sigma in there.sigmas],
        "start_scale": round(there.start, 5),
        "model_calls": network_calls(request, schedule) or "depends on the picture",
        "latents_per_model_call": images * request.passes,
        "memory_bytes": memory,
    }
    print(json.dumps(plan) if as_json else "\n".join(f"{key}: {json.dumps(value)}" for key, value in plan.items()))


def draw_all(
    args: argparse.Namespace, requests: "Sequence[GenerationRequest]", pipeline: "TextToImage", preview_every: int
) -> None:
    """Draw every request in batches, with a progress bar on a terminal; every picture is saved when it is finished."""
    from tqdm import tqdm

    from ldm.images import ContactSheet
    from ldm.outputs import check_new

    first, count = requests[0], sum(request.num_images for request in requests)
    sheet = ContactSheet(count, first.num_images, first.width or 1, first.height or 1) if args.grid else None
    batches = [batch for request in requests for batch in request.batches()]
    total = sum(len(pipeline.route(batch).timesteps) for batch in batches)
    began, images = time.monotonic(), 0
    for prompt in dict.fromkeys(text for batch in batches for text in (batch.prompt, batch.negative_prompt)):
        if cut := pipeline.bundle.text.words_cut(prompt):
            warn(f"prompt: the model reads only its beginning; cut: {cut}")
    with tqdm(total=total, unit="step", disable=args.quiet or not sys.stderr.isatty(), leave=False) as bar:
        for batch in batches:
            with ExitStack() as names:
                paths = [name_of(args, batch, names) for _ in range(batch.num_images)]
                for step in pipeline.stream(batch):
                    bar.update()
                    if preview_every and (step.index + 1) % preview_every == 0:
                        save_previews(pipeline, step, paths, batch)
                for path, image in zip(paths, pipeline.images(batch, step.x), strict=True):
                    save(args, path, image)
                    images += 1
                    if sheet is not None:
                        sheet.add(image.image)
    if sheet is not None:
        check_new(Path(args.grid), "grid")
        Path(args.grid).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(Path(args.grid))
        note(args, f"all of them: {args.grid}")
    note(args, f"{images} image{'s' if images > 1 else ''} in {time.monotonic() - began:.1f} s")


def name_of(args: argparse.Namespace, batch: "GenerationRequest", names: ExitStack) -> Path:
    """The path of the next picture, which is ours as long as `names` is open."""
    from ldm.outputs import reserved
    from ldm.prompts import slug

    if args.output is None:
        return names.enter_context(reserved(outdir(args), slug(batch.prompt)))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    return Path(args.output)


def save_previews(pipeline: "TextToImage", step: Any, paths: Sequence[Path], batch: "GenerationRequest") -> None:
    """Write what the pictures look like after a step, enlarged to their size."""
    from ldm.images import save_png
    from ldm.outputs import preview_path

    for index, path in enumerate(paths):
        preview = pipeline.preview(step, index).resize((batch.width or 1, batch.height or 1))
        save_png(preview, preview_path(path, step.index + 1))


def save(args: argparse.Namespace, path: Path, image: "GeneratedImage") -> None:
    """Write a picture and print its path, or the line of JSON that was asked for."""
    from ldm.images import save_png
    from ldm.outputs import check_new

    if args.output is not None and path.exists():
        check_new(path)  # somebody else wrote it while we were drawing
    save_png(image.image, path, image.settings)
    line = {"path": str(path), "seed": image.seed, "settings": image.settings}
    print(json.dumps(line) if args.json else path, flush=True)


if __name__ == "__main__":
    run(main)
