"""Measure how long loading a full-size Stable Diffusion 1.5 file takes and how much memory, here and in diffusers.

Each program loads the same fp16 file, made with random weights, in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, run
from ldm.errors import MachineError, SettingError

PROGRAMS = ("ldm", "diffusers")
DTYPES = ("float32", "bfloat16")


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=__doc__, prog="benchmark_loading.py")
    made.add_argument("--folder", type=Path, metavar="FOLDER", help="where the file is made [the temporary folder]")
    made.add_argument("--repeat", type=int, default=3, metavar="N", help="loads of each kind; the fastest counts [3]")
    made.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)  # one load, in a process of its own
    return made


def main() -> None:
    """Make the file, load it in each program and number format, and print a table in Markdown."""
    args = parser().parse_args()
    if args.measure:
        program, dtype, model, config = args.measure
        print(json.dumps(measured(LOADERS[program], dtype, model, config)))
        return
    if args.repeat < 1:
        raise SettingError(f"repeat: {args.repeat} is not at least 1; use 3")
    if not Path("/proc/self/status").is_file():
        raise MachineError("system: memory is measured with Linux's /proc; run this on Linux")
    from ldm.evaluation.stand_in import write

    with tempfile.TemporaryDirectory(prefix="ldm-", dir=args.folder) as folder:
        model, config = write(Path(folder))
        print("| loads an fp16 file of SD 1.5 | in | seconds | memory added, MB | of what the weights need |")
        print("|---|---|---|---|---|")
        for dtype in DTYPES:
            for program in PROGRAMS:
                runs = [one(program, dtype, model, config) for _ in range(args.repeat)]
                seconds, (peak, needed) = min(run[0] for run in runs), min(run[1:] for run in runs)
                print(
                    f"| {program} | {dtype} | {seconds:.1f} | {peak / 1e6:,.0f} | {peak / needed:.2f} times |",
                    flush=True,
                )


def one(program: str, dtype: str, model: Path, config: Path) -> list[float]:
    """Seconds, peak of added memory in bytes and bytes of the weights, of one load in a fresh process."""
    command = [sys.executable, __file__, "--measure", program, dtype, str(model), str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"{program}: does not load the file; {done.stderr.strip().splitlines()[-1:]}")
    found: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def load_ours(model: str, config: str, dtype: str) -> int:
    """Load with this program; returns the bytes of the weights."""
    import torch

    from ldm.bundle import Bundle

    bundle = Bundle.load(model, dtype=getattr(torch, dtype))
    parts = (bundle.autoencoder, bundle.text, bundle.unet)
    return sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())  # type: ignore[union-attr]  # parts are modules


def load_theirs(model: str, config: str, dtype: str) -> int:
    """Load with diffusers, which takes the shapes from a folder of configs; returns the bytes of the weights."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_single_file(
        model, config=config, torch_dtype=getattr(torch, dtype), local_files_only=True, safety_checker=None
    )
    parts = (pipeline.vae, pipeline.text_encoder, pipeline.unet)
    return sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())


LOADERS: dict[str, Callable[[str, str, str], int]] = {"ldm": load_ours, "diffusers": load_theirs}


def measured(load: Callable[[str, str, str], int], dtype: str, model: str, config: str) -> list[float]:
    """Seconds, peak of added resident memory with mapped pages, and bytes of the weights; imports do not count."""
    from ldm.models.text import ClipTextConfig, ClipTextEncoder, open_clip_module

    open_clip_module()  # makes torchvision importable beside a CPU-only PyTorch; diffusers imports it too
    ClipTextEncoder(ClipTextConfig(width=8, heads=1, layers=1))
    if load is load_theirs:
        from diffusers import StableDiffusionPipeline  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401
    with open(model, "rb") as file:  # the disk does not count either
        while file.read(2**26):
            pass
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    needed = load(model, config, dtype)
    seconds = time.perf_counter() - began
    return [seconds, resident("VmHWM") - before, needed]


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS is now, VmHWM the highest since it was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    run(main)
