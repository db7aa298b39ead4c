"""Measure how many samples a second one core reads: indexed, streaming, and plain WebDataset, on the same shards."""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, run
from ldm.errors import SettingError

if TYPE_CHECKING:
    from PIL.Image import Image

EPILOG = """examples:
  taskset -c 0 python scripts/benchmark_data.py
  python scripts/benchmark_data.py --per-gpu 110 --side 512 --out data.json
The shards are made in a temporary folder, from a seed, and read once before they are measured, so that they lie in the
page cache. A sample is decoded, brought to a tensor, and put into a batch. Rates are by processor time of this process
(and by the clock): other work on the machine slows the second, not the first."""
BATCH = 64
SHARDS = 4
Reader = Callable[[], Iterator[int]]
"""Gives the number of samples of each batch, without end."""


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=__doc__, epilog=EPILOG, prog="benchmark_data.py")
    made.add_argument("--side", type=int, default=512, metavar="PIXELS", help="of the pictures; latents: half (512)")
    made.add_argument("--pictures", type=int, default=256, metavar="N", help="pictures in the shards (256)")
    made.add_argument("--latents", type=int, default=4096, metavar="N", help="cached latents in the shards (4096)")
    made.add_argument("--seconds", type=float, default=5.0, metavar="S", help="processor time for each reader (5)")
    made.add_argument(
        "--per-gpu", type=float, default=36.0, metavar="RATE", help="images/s that one GPU trains on (36)"
    )
    made.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs that are to be fed (8)")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    return made


def main() -> None:
    """Make the shards, read them in every way, print a table."""
    args = parser().parse_args()
    for name in ("side", "pictures", "latents", "seconds", "per_gpu", "gpus"):
        if not 0 < getattr(args, name) <= 1e6:
            raise SettingError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected a number above 0")
    import torch

    torch.set_num_threads(1)
    need = args.per_gpu * args.gpus
    print(f"{args.gpus} GPUs that train on {args.per_gpu:g} images/s each need {need:,.0f} samples/s")
    print(f"{'shards':22} {'reader':18} {'samples/s of a core':>20} {'by the clock':>13} {'cores for the need':>19}")
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for shards, reader, read in readers(Path(folder), args):
            rate, clock = measured(read, args.seconds)
            print(f"{shards:22} {reader:18} {rate:20,.0f} {clock:13,.0f} {need / rate:19.1f}", flush=True)
            figures.append({"shards": shards, "reader": reader, "per_core": round(rate), "by_clock": round(clock)})
    if args.out:
        args.out.write_text(json.dumps({"need": need, "cpus": os.cpu_count(), "figures": figures}, indent=2) + "\n")


def measured(read: Reader, seconds: float) -> tuple[float, float]:
    """Samples a second, by processor time and by the clock, once everything was read once."""
    batches = read()
    for _ in range(2 * SHARDS):
        next(batches)
    samples, began, clock = 0, time.process_time(), time.perf_counter()
    while time.process_time() - began < seconds:
        samples += next(batches)
    return samples / (time.process_time() - began), samples / (time.perf_counter() - clock)


def readers(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, str, Reader]]:
    """What the shards hold, how they are read, and the reader."""
    from ldm.data.settings import PicturesConfig
    from ldm.data.source import open_pictures
    from ldm.data.transforms import PictureConfig

    for format_ in ("jpg", "webp"):
        make_pictures(folder / format_, format_, args)
        name = f"{args.side} px {format_}"
        # mypy infers no lambda with a default
        yield name, "plain WebDataset", lambda f=format_: plain_pictures(folder / f, f)  # type: ignore[misc]
        for mode in ("streaming", "indexed"):
            config = PicturesConfig(
                shards=str(folder / format_),
                mode=mode,
                batch_size=BATCH,
                pictures=PictureConfig(side=args.side),
                shuffle_buffer=args.pictures,
            )
            yield name, mode, lambda c=config: map(len, open_pictures(c).batches())  # type: ignore[misc]
    yield from latent_readers(folder, args)


def latent_readers(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, str, Reader]]:
    """The readers of cached latents: mean and standard deviation, and with text states of 77×768 as in SD 1.x."""
    import numpy as np

    from ldm.data.latents import LatentShards, MadeFrom, describe, latent_sample
    from ldm.data.settings import LatentsConfig
    from ldm.data.shards import write_shards

    side = args.side // 16
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((2, 4, side, side)).astype(np.float16)
    states = rng.standard_normal((1, 77, 768)).astype(np.float16)
    for name, text, count in (("latents", None, args.latents), ("latents and text", states, args.latents // 8)):
        made_from = MadeFrom("benchmark", "" if text is None else "benchmark", args.side // 2)
        describe(folder / name, made_from, "benchmark", None if text is None else text[0])
        samples = (latent_sample(f"{i:08d}", numbers[0], numbers[1], ("words",), text) for i in range(count))
        write_shards(samples, folder / name, max(1, count // SHARDS), "latents")
        config = LatentsConfig(shards=str(folder / name), batch_size=BATCH)
        shards = f"{args.side // 2} px {name}"
        yield shards, "plain WebDataset", lambda f=folder / name, t=text is not None: plain_latents(f, t)  # type: ignore[misc]
        yield shards, "indexed", lambda c=config, m=made_from: map(len, LatentShards(c, m).batches())  # type: ignore[misc]


def make_pictures(folder: Path, format_: str, args: argparse.Namespace) -> None:
    """Shards of pictures with as much detail as photographs have: noise at all scales."""
    from ldm.data.decoding import IMAGE_FORMATS
    from ldm.data.shards import write_shards

    def sample(number: int) -> dict[str, object]:
        file = io.BytesIO()
        noise(number, args.side).save(file, IMAGE_FORMATS[format_], quality=90)
        return {"__key__": f"{number:08d}", format_: file.getvalue(), "txt": "words", "json": {"number": number}}

    write_shards(map(sample, range(args.pictures)), folder, max(1, args.pictures // SHARDS), "pictures")


def noise(number: int, side: int) -> "Image":
    """A picture of noise whose power falls with the square of the frequency, as that of photographs does."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(number)
    total = np.zeros((side, side, 3), dtype=np.float32)
    cells = 4
    while cells <= side:
        layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(layer.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) * (4 / cells)
        cells *= 2
    total -= total.min()
    return Image.fromarray((total * (255 / total.max())).astype(np.uint8))


def plain_pictures(folder: Path, format_: str) -> Iterator[int]:
    """WebDataset's usual pipeline for pictures with captions, to batches of tensors."""
    import torch

    from ldm.images import to_tensor

    samples = plain(folder).shuffle(1000).decode("pil").to_tuple(format_, "txt").map_tuple(to_tensor)
    for batch in samples.batched(BATCH, collation_fn=lambda rows: torch.stack([image for image, _ in rows])):
        yield len(batch)


def plain_latents(folder: Path, with_text: bool) -> Iterator[int]:
    """WebDataset's usual pipeline for arrays."""
    import numpy as np
    import torch

    fields = ("latent.npy", "text.npy") if with_text else ("latent.npy",)
    samples = plain(folder).shuffle(1000).decode(only=list(fields)).to_tuple(*fields)
    for rows in samples.batched(BATCH, collation_fn=list):
        columns = [torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)]
        yield len(columns[0])


def plain(folder: Path) -> Any:
    """An endless WebDataset over the shards of a folder, with its own defaults: it opens its files itself."""
    import webdataset
    import webdataset.utils

    webdataset.utils.enforce_security = False  # which ldm.data sets, and which refuses even local files
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    return webdataset.WebDataset(paths, shardshuffle=False).repeat()


if __name__ == "__main__":
    run(main)
