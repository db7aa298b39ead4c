"""Measure how fast Stable Diffusion 1.5 runs here, beside diffusers and beside what the machine can do at all."""

import argparse
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, nearest, number, run, warn
from ldm.errors import DataError, SettingError

if TYPE_CHECKING:
    from ldm.evaluation.speed import Comparison

TXT2IMG = str(Path(__file__).resolve().with_name("txt2img.py"))
EPILOG = """examples:
  python scripts/benchmark.py --out before.json
  python scripts/benchmark.py --only unet,decode --repeat 7 --compare before.json --plot ratios.svg
  python scripts/benchmark.py --only options --repeat 3
  python scripts/benchmark.py --device cuda --batch 1,16 --compile
parts:
  help, start, sample                        whole processes: txt2img.py --help; until the UNet is asked; a picture
  memory                                     decoding in a process of its own: time, and memory beside the weights
  text, unet, decode, encode, train          our networks beside those of diffusers
  attention, layers, networks                what is computed otherwise for pictures, beside the plain computation
  bundle, options, precision                 the model that ships; what options that change the picture, and bf16, spare
                                             and cost
All weights but the bundle's are random: speed and memory do not depend on them. The contenders take turns, so that what
drifts meets all of them alike; a ratio is the median of the ratios of all turns. The roofline is measured first, in the
same run: a square matrix product, and a 3x3 convolution of 320 channels. Memory is the peak of a process of its own.
Reading data is not among the parts: benchmark_data.py counts processor time of one core, not turns by the clock."""
ALONE = ("help", "bundle")  # processes that have nothing to compare with, and are short
DRAWING = ("start", "sample")
PROCESSES = (*ALONE, *DRAWING, "memory")
OF_BUNDLE = ("bundle", "options", "precision")
INSIDE = ("text", "unet", "decode", "encode", "attention", "layers", "networks", "train", *OF_BUNDLE)
PARTS = tuple(dict.fromkeys((*PROCESSES, *INSIDE)))
PROMPT = "a red circle to the left of a blue square"
Figures = dict[str, dict[str, Any]]


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=__doc__, epilog=EPILOG, prog="benchmark.py")
    made.add_argument("--only", default=",".join(PARTS), metavar="A,B,…", help=f"of {', '.join(PARTS)} [all]")
    made.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda [auto]")
    made.add_argument("--dtype", default="auto", metavar="NAME", help="ours and diffusers' best [auto]")
    made.add_argument("--side", metavar="PIXELS", help="of the pictures [512]")
    made.add_argument("--batch", default="1", metavar="N,…", help="pictures at once [1]")
    made.add_argument("--repeat", metavar="N", help="turns of each [5]; of start, sample, memory at most 2")
    made.add_argument("--steps", default="4", metavar="N", help="of whole processes [4]")
    made.add_argument("--compile", action="store_true", help="the UNet also compiled, ours and theirs")
    made.add_argument("--quick", action="store_true", help="one turn at 256 pixels: to see that it runs")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    made.add_argument("--plot", type=Path, metavar="FILE", help="write the ratios as bars, as SVG")
    made.add_argument("--compare", type=Path, metavar="FILE", help="compare with the figures of an earlier run")
    made.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # one whole process
    return made


def main() -> None:
    """Measure what is asked for, print tables in Markdown as the figures come, and write them down."""
    args = parser().parse_args()
    if args.child:
        child(*args.child)
        return
    chosen, batches, repeat, side, steps = checked(args)
    before = read_figures(args.compare) if args.compare else {}
    with_theirs = find_spec("diffusers") is not None
    if not with_theirs:
        warn("diffusers: not installed, so nothing is compared with it; install the extra parity")
    figures: Figures = {"machine": machine()}
    whole = [part for part in PROCESSES if part in chosen]
    if whole:
        for what, found in processes(whole, args, with_theirs, repeat, side, steps):
            figures[what] = found
            show(what, found)
            keep(figures, args)
    if set(chosen) & set(INSIDE):
        for batch in batches:
            for comparison in contests(chosen, args, with_theirs, repeat, side, batch, figures):
                figures[comparison.what] = comparison.values()
                show(comparison.what, figures[comparison.what])
                keep(figures, args)
    if before:
        show_change(before, figures)
    keep(figures, args)
    if args.plot:
        args.plot.write_text(plot(figures), encoding="utf-8")


def keep(figures: Figures, args: argparse.Namespace) -> None:
    """Write down what there is so far: a later part may fail, or be stopped."""
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def checked(args: argparse.Namespace) -> tuple[list[str], list[int], int, int, int]:
    """What to measure, and the numbers of the flags. Raises SettingError."""
    from ldm.outputs import check_writable
    from ldm.request import whole

    chosen = args.only.split(",")
    for name in chosen:
        if name not in PARTS:
            raise SettingError(f"only: no part {name[:40]!r}{nearest(name[:40], PARTS)}; use of {', '.join(PARTS)}")
    side = number("side", whole(64, 2048, 512), args.side or ("256" if args.quick else "512"))
    repeat = number("repeat", whole(1, 1000, 5), args.repeat or ("1" if args.quick else "5"))
    steps = number("steps", whole(1, 1000, 4), "1" if args.quick else args.steps)
    batches = [number("batch", whole(1, 1000, 1), text) for text in args.batch.split(",")]
    if side % 64:
        raise SettingError(f"side: {side} is not a multiple of 64; use 512")
    for path in (args.out, args.plot):
        if path is not None:
            check_writable(path.parent)
    return chosen, batches, repeat, side, steps


def machine() -> dict[str, Any]:
    """What the figures depend on, beside the program."""
    import platform

    import torch

    name = next((line.split(":")[1].strip() for line in lines_of("/proc/cpuinfo") if "model name" in line), "")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {**versions, "processor": name or platform.machine(), "threads": torch.get_num_threads(), "gpu": cuda}


def lines_of(path: str) -> list[str]:
    """The lines of a file of Linux's, none elsewhere."""
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def contests(
    chosen: Sequence[str], args: argparse.Namespace, with_theirs: bool, repeat: int, side: int, batch: int,
    figures: Figures,
) -> "Iterator[Comparison]":  # fmt: skip
    """The contests inside this process, behind the rooflines of both number formats."""
    from dataclasses import asdict

    import torch

    from ldm.evaluation.bundled import BUNDLED
    from ldm.evaluation.contests import CONTESTS, Bench
    from ldm.evaluation.speed import roofline
    from ldm.machine import find_device, find_dtype, keep_freed_memory
    from ldm.models.text import import_torchvision

    if find_spec("torchvision"):
        import_torchvision()  # also beside a CPU-only PyTorch; diffusers does it too
    device = find_device(args.device)
    bench = Bench(device, find_dtype(args.dtype, device)[0], side, batch, repeat, args.compile, with_theirs)
    for dtype in dict.fromkeys((torch.float32, bench.dtype, torch.bfloat16)):
        bench.rooflines[str(dtype)] = found = roofline(dtype, device, 0.2 if args.quick else 2.0)
        figures[f"roofline {dtype}"] = asdict(found)
        rates = f"convolution {found.convolution / 1e9:,.0f}, product {found.product / 1e9:,.0f} GFLOP/s"
        print(f"roofline, {dtype}: {rates}", flush=True)
    keep_freed_memory()
    known = CONTESTS | BUNDLED
    for name in chosen:
        if name in known:
            yield from known[name](bench)


def processes(
    kinds: Sequence[str], args: argparse.Namespace, with_theirs: bool, repeat: int, side: int, steps: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole processes: until help is there, the UNet is first asked, or the picture is written; with their memory."""
    import torch

    from ldm.evaluation.processes import ended
    from ldm.evaluation.speed import compare
    from ldm.evaluation.stand_in import write
    from ldm.machine import find_device, find_dtype

    device = find_device(args.device)
    best = str(find_dtype(args.dtype, device)[0]).removeprefix("torch.")
    programs = {"ldm": ("ldm", best)}
    if with_theirs:
        programs |= {"diffusers, default": ("diffusers", "float32"), "diffusers, best": ("diffusers", best)}
    with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
        stand_in = write(Path(folder)) if set(kinds) & set(DRAWING) else (folder, folder)
        given = (str(device), *map(str, stand_in), str(steps), str(side), f"{folder}/picture.png")
        drawing = ("--prompt", PROMPT, "--device", str(device), "--dtype", best, "--outdir", folder)
        for kind in kinds:
            if kind in ALONE:
                commands = {"ldm": (TXT2IMG, *(("--help",) if kind == "help" else drawing))}
            else:
                commands = {name: (__file__, "--child", kind, *one, *given) for name, one in programs.items()}
            peaks: dict[str, list[int]] = {name: [] for name in commands}
            inside: dict[str, list[float]] = {name: [] for name in commands}

            def work(
                name: str, command: Sequence[str], kind: str = kind, peaks: Any = peaks, inside: Any = inside
            ) -> None:
                said, peak = ended([sys.executable, *command])
                if kind == "memory":
                    seconds, peak = float(said.split()[-2]), int(said.split()[-1])
                    inside[name].append(seconds)
                peaks[name].append(peak)

            contenders = {name: partial(work, name, command) for name, command in commands.items()}
            turns, warm_up = repeat if kind in ALONE else min(repeat, 2), kind not in ("sample", "memory")
            made = compare(kind, contenders, turns, torch.device("cpu"), warm_up=warm_up)
            for name, timing in made.timings.items():
                timing.seconds[:] = inside[name] or timing.seconds
            found = made.values()
            for name, one in found["contenders"].items():  # type: ignore[attr-defined]  # JSON values
                one["peak"] = max(peaks[name])
            words = {
                "help": "txt2img.py --help, the whole process",
                "bundle": "the bundle, from the start of the process to its end, with a picture",
                "start": "from the start of the process to the first call of the UNet",
                "sample": f"whole process, {steps} steps, {side}x{side}",
                "memory": f"decoding {side}x{side}, each in processes of its own; memory: beside the weights",
            }
            yield words[kind], found


def child(
    kind: str, program: str, dtype: str, device: str, model: str, theirs: str, steps: str, side: str, to: str
) -> None:
    """Draw one picture as a user of a program does; of kind `start`, only until the UNet is first asked."""
    Path(to).unlink(missing_ok=True)
    if kind == "start":
        from torch.nn.modules.module import register_module_forward_pre_hook

        def leave(module: object, _: object) -> None:
            if type(module).__name__ in ("UNet", "UNet2DConditionModel"):
                os._exit(0)

        register_module_forward_pre_hook(leave)
    if kind == "memory":
        print(*decoding_alone(program, dtype, device, int(side)), file=sys.stderr)
    elif program == "ldm":
        flags = ["--model", model, "--prompt", PROMPT, "--steps", steps, "--size", f"{side}x{side}", "--seed", "1"]
        sys.argv = ["txt2img.py", *flags, "--device", device, "--dtype", dtype, "--output", to]
        runpy.run_path(TXT2IMG, run_name="__main__")
    else:
        draw_with_diffusers(dtype, device, theirs, int(steps), int(side), to)


def decoding_alone(program: str, dtype: str, device: str, side: int) -> tuple[float, int]:
    """What a program's autoencoder needs to decode one picture.

    Seconds, the median of three turns behind the first, and bytes beside the weights in the first.
    """
    import torch

    from ldm.evaluation.processes import memory_beside
    from ldm.evaluation.speed import compare
    from ldm.evaluation.stand_in import shapes, their_autoencoder
    from ldm.machine import keep_freed_memory
    from ldm.models.text import import_torchvision

    ours = program == "ldm"
    if ours:
        keep_freed_memory()
    else:
        import_torchvision()
    decoder: Any = shapes().autoencoder.to_empty(device="cpu") if ours else their_autoencoder().eval()
    decoder.requires_grad_(False).to(device, getattr(torch, dtype))
    for parameter in decoder.parameters():
        parameter.normal_(0.0, 0.02)
    if ours or dtype != "float32":
        decoder.to(memory_format=torch.channels_last)
    x = torch.randn(1, 4, side // 8, side // 8, device=device, dtype=torch.float32 if ours else getattr(torch, dtype))
    with torch.inference_mode():
        if device == "cpu":
            needed = memory_beside(lambda: decoder.decode(x))
        else:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            decoder.decode(x)
            needed = torch.cuda.max_memory_allocated() - before
        work = {program: lambda: decoder.decode(x)}
        again = compare("decode", work, 3, torch.device(device), warm_up=device != "cpu")
    return again.timings[program].median, needed


def draw_with_diffusers(dtype: str, device: str, model: str, steps: int, side: int, to: str) -> None:
    """What the documentation of diffusers says, on its own folder; in half precision with its advice on the layout."""
    import torch

    if find_spec("torchvision"):
        from ldm.models.text import import_torchvision

        import_torchvision()  # which diffusers does too, and cannot by itself beside a CPU-only PyTorch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        model, torch_dtype=getattr(torch, dtype), local_files_only=True, safety_checker=None
    ).to(device)
    if dtype != "float32":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(1)
    made = pipe(PROMPT, num_inference_steps=steps, width=side, height=side, generator=generator)
    made.images[0].save(to)


def show(what: str, found: Mapping[str, Any]) -> None:
    """Print the figures of one contest as a table."""
    print(f"\n{what}" + ("" if found["quiet"] else " (other programs had part of the machine)"))
    print("| | seconds | spread | of the roofline | peak memory | takes, of the first | pictures |")
    print("|---|---|---|---|---|---|---|")
    for name, one in found["contenders"].items():
        seconds = one["seconds"]
        spread = f"{min(seconds):.4g} to {max(seconds):.4g}"
        roofline = f"{100 * one['of_roofline']:.0f} %" if one.get("of_roofline") else ""
        memory = f"{one['peak'] / 1e6:,.0f} MB" if "peak" in one else ""
        ratio = found["times_as_fast"].get(name)
        takes = "" if ratio is None else f"{ratio[0]:.2f} times ({ratio[1]:.2f} to {ratio[2]:.2f})"
        other = found["differs"].get(name)
        off = "latents {:.1%} off, {:.1f} dB, SSIM {:.4f}"
        pictures = off.format(other["latent"], other["psnr"], other["ssim"]) if other else ""
        cells = (name, f"{one['median']:.4g}", spread, roofline, memory, takes, pictures)
        print(f"| {' | '.join(cells)} |", flush=True)


def plot(figures: Figures) -> str:
    """A bar for each contender, as long as it takes, of what the first one takes."""
    from ldm.evaluation.plots import bars

    ratios = {what: found.get("times_as_fast") for what, found in figures.items()}
    return bars({what: {name: tuple(ratio) for name, ratio in row.items()} for what, row in ratios.items() if row})


def read_figures(path: Path) -> Figures:
    """The figures of an earlier run. Raises DataError."""
    try:
        found: Figures = json.loads(path.read_text(encoding="utf-8"))
        assert all(isinstance(one, dict) for one in found.values())
    except (OSError, ValueError, AttributeError, AssertionError):
        raise DataError(f"{path}: not the figures of an earlier run; give the FILE of its --out") from None
    return found


def show_change(before: Figures, now: Figures) -> None:
    """Print how our figures differ from an earlier run's: as shares of each run's roofline where there is one.

    Seconds also say what else the machine did, and how warm it was; a share of what it could do then says less of that.
    """
    print("\n| ours | before | now | change |\n|---|---|---|---|")
    for what in now.keys() & before.keys():
        if "contenders" not in now[what] or "contenders" not in before[what]:
            continue
        old, new = (next(iter(run[what]["contenders"].values())) for run in (before, now))
        if old.get("of_roofline") and new.get("of_roofline"):
            a, b = old["of_roofline"], new["of_roofline"]
            print(f"| {what} | {100 * a:.1f} % of the roofline | {100 * b:.1f} % | {b / a:.2f} times as fast |")
        else:
            a, b = old["median"], new["median"]
            print(f"| {what} | {a:.4g} s | {b:.4g} s | {a / b:.2f} times as fast |")


if __name__ == "__main__":
    run(main)
