"""Encode the pictures and captions of shards once: latents (mean and standard deviation) and text states, as shards."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, run
from ldm.errors import DataError, MachineError, SettingError
from ldm.files import save_text

if TYPE_CHECKING:
    import torch

    from ldm.bundle import Bundle
    from ldm.data.buckets import BucketConfig, Size
    from ldm.data.decoding import Sample
    from ldm.data.latents import MadeFrom
    from ldm.data.tally import Tally

EPILOG = """examples:
  python scripts/cache_latents.py --model runs/mine/mine --data data/shapes --side 256 --output data/shapes-latents
  torchrun --nproc-per-node 8 scripts/cache_latents.py --model sd15 --data 'data/set-{00000..00999}.tar' ...
Shard i of the pictures becomes shard i of the latents, which rank i mod the number of ranks writes. A shard appears
whole or not at all; the same command, given again, goes on with those that are missing, with any number of ranks.
Bad samples, those without a caption among them, are left out, named and counted; more than 1 % end it with exit code 3.
exit codes: 0 done, 2 bad setting, 3 bad data, 4 bad model, 5 machine, 130 stopped"""
LARGEST = {"side": 4096, "batch_size": 4096, "bucket_step": 1024}
Encoded = dict[str, object]


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=__doc__, epilog=EPILOG, prog="cache_latents.py")
    made.add_argument("--model", required=True, metavar="NAME|PATH", help="whose autoencoder and text tower are used")
    made.add_argument("--data", required=True, metavar="SHARDS", help="a folder or pattern of shards with pictures")
    made.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the shards of latents go")
    made.add_argument("--side", type=int, default=256, metavar="PIXELS", help="side of the pictures (256)")
    made.add_argument(
        "--bucket-step", type=int, default=0, metavar="PIXELS", help="sizes by aspect; 0: square only (0)"
    )
    made.add_argument("--max-aspect", type=float, default=2.0, metavar="RATIO", help="of the sizes by aspect (2)")
    made.add_argument("--batch-size", type=int, default=16, metavar="N", help="pictures encoded at once (16)")
    made.add_argument("--empty-captions", action="store_true", help="keep pictures without words, as the null prompt's")
    made.add_argument("--no-text", action="store_true", help="keep captions only, no text states")
    made.add_argument("--rank", type=int, default=int(os.environ.get("RANK", 0)), help="this process ($RANK, or 0)")
    made.add_argument(
        "--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", 1)), help="($WORLD_SIZE, or 1)"
    )
    made.add_argument("--device", default="auto", help="cpu, cuda, … (auto)")
    made.add_argument("--dtype", default="float32", help="what the autoencoder computes in (float32)")
    return made


def main() -> None:
    """Check flags and data, then the model; then write the shards that are not there yet."""
    args = parser().parse_args()
    check(args)
    from ldm.data.buckets import BucketConfig, bucket_sizes
    from ldm.data.shards import find_shards

    buckets = BucketConfig(step=args.bucket_step, max_aspect=args.max_aspect) if args.bucket_step else None
    sizes = bucket_sizes(args.side, buckets)
    shards = find_shards(args.data)
    import torch

    from ldm.bundle import Bundle
    from ldm.machine import find_device, find_dtype, keep_freed_memory

    device = own_gpu(find_device(args.device))
    dtype, _ = find_dtype(args.dtype, device)
    keep_freed_memory()
    bundle = Bundle.load(args.model, str(device), dtype)
    # Named by its weights as they are, not as they are cast.
    of = made_from(args, bundle if dtype == torch.float32 else Bundle.load(args.model), buckets)
    for side in {side for size in sizes for side in size}:
        if side % bundle.autoencoder.factor:
            raise SettingError(f"side: {side} is not a multiple of {bundle.autoencoder.factor}; choose another one")
    cache(args, shards, bundle, sizes, of)


def own_gpu(device: "torch.device") -> "torch.device":
    """The device of this process: where torchrun started several on one machine, each has a GPU of its own."""
    import torch

    number = os.environ.get("LOCAL_RANK", "")
    if str(device) != "cuda" or not number:
        return device
    if int(number) >= (there := torch.cuda.device_count()):
        raise MachineError(f"LOCAL_RANK: got {number}, {there} CUDA devices are here; start {there} processes")
    return torch.device("cuda", int(number))


def check(args: argparse.Namespace) -> None:
    """Raise SettingError for numbers out of range, before anything is loaded."""
    from ldm.machine import check_names

    check_names(args.device, args.dtype)
    for name, largest in LARGEST.items():
        if not (0 if name == "bucket_step" else 1) <= getattr(args, name) <= largest:
            flag = f"--{name.replace('_', '-')}"
            raise SettingError(f"{flag}: got {getattr(args, name)}, expected at most {largest}; choose another number")
    if not 1 <= args.max_aspect <= 16:
        raise SettingError(f"--max-aspect: got {args.max_aspect}, expected 1 to 16; choose another number")
    if not 0 <= args.rank < args.world_size:
        raise SettingError(f"--rank: got {args.rank} of {args.world_size} ranks; ranks count from 0")


def cache(
    args: argparse.Namespace, shards: list[Path], bundle: "Bundle", sizes: "tuple[Size, ...]", of: "MadeFrom"
) -> None:
    """Write this rank's shards of latents, and what they are made from."""
    from ldm.data.latents import describe, pictures_name
    from ldm.data.shards import shard_path, write_shard
    from ldm.data.tally import Tally

    null = None if args.no_text else bundle.text.encode([""]).tokens[0].half().cpu().numpy()
    pictures = pictures_name(shards) + (" with empty captions" if args.empty_captions else "")
    describe(args.output, of, pictures, null)
    tally, began, written = Tally(), time.monotonic(), 0
    mine = [number for number in range(len(shards)) if number % args.world_size == args.rank]
    for number in mine:
        path = shard_path(args.output, "latents", number)
        if path.exists():
            count_again(path, tally)
            continue
        written += write_shard(counted(encoded(shards[number], bundle, sizes, args, tally), path, tally), path)
        print(f"{path}: {tally.seen} pictures in {time.monotonic() - began:.0f} s", file=sys.stderr)
    tally.end()
    print(f"{args.output}: {len(mine)} of {len(shards)} shards are this rank's; {written} latents written now")


def counts_path(shard: Path) -> Path:
    """Where it is kept how many samples of the pictures a shard of latents was made from, and how many were bad."""
    return shard.with_name(f".{shard.name}.counts.json")


def counted(samples: Iterator[Encoded], shard: Path, tally: "Tally") -> Iterator[Encoded]:
    """The samples; before the shard of them appears, what was counted on the way is kept."""
    seen, counts = tally.seen, tally.counts.copy()
    yield from samples
    save_text(counts_path(shard), json.dumps({"seen": tally.seen - seen, "counts": tally.counts - counts}) + "\n")


def count_again(shard: Path, tally: "Tally") -> None:
    """Count what was counted when the shard was made, so that a set that was refused is refused again."""
    path = counts_path(shard)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        tally.again(kept["seen"], kept["counts"])
    except FileNotFoundError:
        return  # made before counts were kept
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{path}: no counts, expected those of its shard; delete both") from None


def made_from(args: argparse.Namespace, bundle: "Bundle", buckets: "BucketConfig | None") -> "MadeFrom":
    """What the latents of this call depend on."""
    from torch import nn

    from ldm.data.latents import MadeFrom, weights_digest

    assert isinstance(bundle.autoencoder, nn.Module) and isinstance(bundle.text, nn.Module)
    autoencoder = weights_digest(bundle.autoencoder.state_dict(), bundle.config.autoencoder.model_dump_json())
    text = "" if args.no_text else weights_digest(bundle.text.state_dict(), bundle.config.text.model_dump_json())
    return MadeFrom(autoencoder, text, args.side, buckets.name if buckets is not None else "")


def encoded(
    shard: Path, bundle: "Bundle", sizes: "tuple[Size, ...]", args: argparse.Namespace, tally: "Tally"
) -> Iterator[Encoded]:
    """The samples of one shard as latents, batch by batch, each batch of one size."""
    import numpy as np

    from ldm.data.buckets import assign
    from ldm.data.shards import read_shard

    waiting: dict[int, list[tuple[str, Sample]]] = {}
    for key, sample in read_shard(shard, tally, need_words=not args.empty_captions):
        width, height = np.array([sample.image.width]), np.array([sample.image.height])
        bucket = int(assign(width, height, sizes)[0])
        waiting.setdefault(bucket, []).append((key, sample))
        if len(waiting[bucket]) == args.batch_size:
            yield from encoded_batch(waiting.pop(bucket), bundle, sizes[bucket], not args.no_text)
    for bucket in sorted(waiting):
        yield from encoded_batch(waiting[bucket], bundle, sizes[bucket], not args.no_text)


def encoded_batch(
    batch: "list[tuple[str, Sample]]", bundle: "Bundle", size: "Size", with_text: bool
) -> Iterator[Encoded]:
    """Latents and text states of pictures that are brought to one size."""
    import torch

    from ldm.data.captions import all_captions
    from ldm.data.latents import latent_sample
    from ldm.data.transforms import fit
    from ldm.images import to_tensor

    mode = "L" if bundle.autoencoder.image_channels == 1 else "RGB"
    images = torch.stack([to_tensor(fit(sample.image, size).convert(mode)) for _, sample in batch])
    captions = [all_captions(sample.caption, sample.facts) or ("",) for _, sample in batch]
    with torch.inference_mode():
        posterior = bundle.autoencoder.encode(images.to(bundle.device))
        means, stds = (value.half().cpu().numpy() for value in (posterior.mean, posterior.std))
        distinct = list(dict.fromkeys(caption for several in captions for caption in several))
        states = bundle.text.encode(distinct).tokens.half().cpu().numpy() if with_text else None
    row = {caption: number for number, caption in enumerate(distinct)}
    for (key, _), mean, std, several in zip(batch, means, stds, captions, strict=True):
        text = None if states is None else states[[row[caption] for caption in several]]
        yield latent_sample(key, mean, std, several, text)


if __name__ == "__main__":
    run(main)
