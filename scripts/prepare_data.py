"""Make a data set as WebDataset shards, or check one that exists."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, run
from ldm.errors import DataError, SettingError

EPILOG = """examples:
  python scripts/prepare_data.py --source shapes --count 20000 --resolution 256 --output data/shapes
  python scripts/prepare_data.py --verify data/shapes
Sample i of a seed is the same whatever the number of workers. The settings are kept in dataset.json beside the shards.
exit codes: 0 done, 2 bad setting, 3 bad data, 5 machine, 130 stopped"""
Sample = dict[str, object]
SETTINGS_FILE = "dataset.json"
LINE_EVERY_SECONDS = 10.0
SAMPLES_AT_ONCE = 32  # a worker's portion
LARGEST = {"count": 100_000_000, "resolution": 4096, "shard_size": 1_000_000, "workers": 1024}


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=__doc__, epilog=EPILOG, prog="prepare_data.py")
    made.add_argument("--source", choices=("shapes",), default="shapes", help="what the pictures show")
    made.add_argument("--count", type=int, default=20000, metavar="N", help="number of pictures (20000)")
    made.add_argument("--resolution", type=int, default=256, metavar="PIXELS", help="side of the pictures (256)")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="where the shards go")
    made.add_argument("--shard-size", type=int, default=1000, metavar="N", help="pictures in a shard (1000)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="which data set (0)")
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one per core)")
    made.add_argument("--resume", action="store_true", help="go on after the shards that are whole already")
    made.add_argument("--verify", type=Path, metavar="FOLDER", help="only check the shards of a folder")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def main() -> None:
    """Check the flags; then prepare, or verify."""
    args = parser().parse_args()
    if args.verify is not None:
        verify(args.verify)
        return
    if args.output is None:
        raise SettingError("--output: not given, expected a folder for the shards; name one")
    for name, largest in LARGEST.items():
        if not 1 <= getattr(args, name) <= largest:
            flag = f"--{name.replace('_', '-')}"
            raise SettingError(
                f"{flag}: got {getattr(args, name)}, expected 1 to {largest}; choose a number in that range"
            )
    settings = Settings(args.source, args.count, args.resolution, args.shard_size, args.seed)
    prepare(args.output, settings, args.workers, args.resume)


@dataclass(frozen=True)
class Settings:
    """What decides every byte of a data set."""

    source: str
    count: int
    resolution: int
    shard_size: int
    seed: int


def prepare(folder: Path, settings: Settings, workers: int, resume: bool) -> None:
    """Write the shards that are not there yet, and say how many and how fast."""
    first = start(folder, settings, resume)
    from ldm.data.shapes import shard_sample
    from ldm.data.shards import write_shards

    began = time.monotonic()
    done, count = min(first * settings.shard_size, settings.count), settings.count
    make = partial(shard_sample, seed=settings.seed, resolution=settings.resolution)
    with in_order(workers) as each:
        samples = shown(each(make, range(done, count)), done, count)
        paths = write_shards(samples, folder, settings.shard_size, settings.source, start=first)
    print(f"{folder}: {len(paths)} shards with {count - done} pictures in {time.monotonic() - began:.0f} s")


def start(folder: Path, settings: Settings, resume: bool) -> int:
    """The number of the first shard to write; keeps the settings beside the shards, and refuses to mix two sets."""
    about = folder / SETTINGS_FILE
    shards = list(folder.glob("*.tar"))
    if shards and not resume:
        raise DataError(
            f"{folder}: has {len(shards)} shards already, expected none; add --resume, or name a new folder"
        )
    wanted, kept = asdict(settings), kept_settings(folder)
    if shards and kept and kept != wanted:
        other = ", ".join(f"{name} {kept.get(name)}" for name in wanted if kept.get(name) != wanted[name])
        raise SettingError(f"{folder}: was begun with {other}; give the same settings, or name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = about.with_name(f".{about.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, about)
    return next(n for n in range(len(shards) + 1) if folder / f"{settings.source}-{n:05d}.tar" not in shards)


def kept_settings(folder: Path) -> dict[str, object]:
    """What dataset.json says of the folder's shards; empty where there is none."""
    about = folder / SETTINGS_FILE
    try:
        return json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    except ValueError as error:
        raise DataError(f"{about}: no JSON ({error}), expected a data set's settings; delete it") from error


@contextmanager
def in_order(workers: int) -> Iterator[Callable[..., Iterable[Sample]]]:
    """A `map` that keeps the order, over so many processes."""
    if workers == 1:
        yield map
        return
    # Spawned, since forking is not safe once libraries have started threads; Ctrl-C is for the parent to handle.
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield partial(pool.imap, chunksize=SAMPLES_AT_ONCE)


def shown(samples: Iterable[Sample], done: int, count: int) -> Iterator[Sample]:
    """The samples, with a bar on a terminal and a plain line now and then elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(samples, initial=done, total=count, unit="picture")
        return
    told = time.monotonic()
    for number, sample in enumerate(samples, done + 1):
        yield sample
        if time.monotonic() - told > LINE_EVERY_SECONDS:
            told = time.monotonic()
            print(f"{number} of {count} pictures", file=sys.stderr)


def verify(folder: Path) -> None:
    """Read everything in the folder's shards, print what is wrong, and end with DataError if anything is."""
    from ldm.data.shards import check_shard, find_shards

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with shards; check the path")
    total, faults = 0, []
    paths = find_shards(folder)
    for path in paths:
        good, found = check_shard(path)
        total += good
        faults += found
        print(f"{path}: {good} good samples, {len(found)} faults", file=sys.stderr)
    count = kept_settings(folder).get("count", total)
    if count != total:
        faults.append(
            f"{folder}: got {total} good samples, expected {count} by {SETTINGS_FILE}; resume or prepare again"
        )
    for fault in faults:
        print(fault)
    if faults:
        raise DataError(
            f"{folder}: got {len(faults)} faults in {len(paths)} shards, expected none; see the lines above"
        )
    print(f"{folder}: {total} samples in {len(paths)} shards, all good")


if __name__ == "__main__":
    run(main)
