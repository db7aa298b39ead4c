"""Make a data set as WebDataset shards, from nothing or from pictures with captions, or check one that exists."""

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, run
from ldm.errors import DataError, SettingError
from ldm.files import save_text

if TYPE_CHECKING:
    from ldm.data.cleaning import Rules
    from ldm.data.importing import Progress
    from ldm.data.records import Records

EPILOG = """examples:
  python scripts/prepare_data.py --source shapes --count 20000 --resolution 256 --output data/shapes
  python scripts/prepare_data.py --source emoji --input clones --output data/emoji
  python scripts/prepare_data.py --source folder --input photos --resolution 512 --output data/photos
  python scripts/prepare_data.py --source csv --input table.csv --resize bucket --duplicates near --output data/table
  python scripts/prepare_data.py --verify data/shapes
Emoji come from a folder with clones of cldr-json and of fluentui-emoji-unicode, noto-emoji, twemoji-assets, emojitwo,
fxemoji, as many as there are. Captions of a folder: NAME.txt beside each picture, or metadata.jsonl. What is not taken
stands in rejects.jsonl with its reason. Every byte follows from the input and the settings, which are kept in
dataset.json, whatever the number of workers; --resume goes on behind the last finished shard.
exit codes: 0 done, 2 bad setting, 3 bad data, 5 machine, 130 stopped"""
Sample = dict[str, object]
SETTINGS_FILE = "dataset.json"
COUNT = "count"  # of pictures, in dataset.json; for emoji it is known only when they have been looked at
LINE_EVERY_SECONDS = 10.0
SAMPLES_AT_ONCE = 32  # a worker's portion
RECORDS_AT_ONCE = 8
LARGEST = {"count": 100_000_000, "resolution": 4096, "shard_size": 1_000_000, "workers": 1024}
TABLES = ("csv", "jsonl", "parquet")
RESOLUTION = {"shapes": 256}
RESOLUTION_OF_PICTURES = 512


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=__doc__, epilog=EPILOG, prog="prepare_data.py")
    sources = ("shapes", "emoji", "folder", *TABLES, "shards")
    made.add_argument("--source", choices=sources, default="shapes", help="what the pictures are (shapes)")
    made.add_argument("--input", type=Path, metavar="PATH", help="the folder, table, clones or shards with pictures")
    made.add_argument("--count", type=int, default=20000, metavar="N", help="number of shapes pictures (20000)")
    made.add_argument("--resolution", type=int, metavar="PIXELS", help="side of the pictures (512; shapes 256)")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="where the shards go")
    made.add_argument("--shard-size", type=int, default=1000, metavar="N", help="pictures in a shard (1000)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="which shapes, which pairs are held out (0)")
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one per core)")
    made.add_argument("--resume", action="store_true", help="go on after the shards that are whole already")
    made.add_argument("--verify", type=Path, metavar="FOLDER", help="only check the shards of a folder")
    rules = made.add_argument_group("what becomes of pictures that are imported")
    rules.add_argument("--resize", choices=("short", "exact", "bucket", "keep"), help="what becomes RESOLUTION (short)")
    rules.add_argument("--bucket-step", type=int, metavar="PIXELS", help="sides of --resize bucket (64)")
    rules.add_argument("--format", choices=("png", "webp", "jpg"), help="of the files in the shards (jpg)")
    rules.add_argument("--quality", type=int, metavar="N", help="1 to 100; 100 is lossless for WebP (95)")
    rules.add_argument("--min-side", type=int, metavar="PIXELS", help="smaller pictures are left out (64)")
    rules.add_argument("--max-aspect", type=float, metavar="RATIO", help="narrower pictures are left out (3)")
    rules.add_argument("--max-pixels", type=int, metavar="N", help="larger pictures are left out unread (32000000)")
    rules.add_argument("--animated", choices=("first", "reject"), help="take the first picture of several (reject)")
    rules.add_argument("--ground", metavar="COLOUR", help="what lies under transparent parts (white)")
    rules.add_argument("--empty-captions", action="store_true", default=None, help="take pictures without words")
    rules.add_argument("--duplicates", choices=("keep", "exact", "near"), help="which later pictures go (exact)")
    rules.add_argument("--near-bits", type=int, metavar="N", help="of 64, in which near pictures may differ (3)")
    rules.add_argument("--image-column", default="", metavar="NAME", help="of a table (file_name, image, path, …)")
    rules.add_argument("--caption-column", default="", metavar="NAME", help="of a table (caption, text, prompt, …)")
    return made


def main() -> None:
    """Check the flags; then prepare, or verify."""
    args = parser().parse_args()
    if args.verify is not None:
        verify(args.verify)
        return
    if args.output is None:
        raise SettingError("--output: not given, expected a folder for the shards; name one")
    if args.resolution is None:
        args.resolution = RESOLUTION.get(args.source, RESOLUTION_OF_PICTURES)
    for name, largest in LARGEST.items():
        if not 1 <= getattr(args, name) <= largest:
            flag = f"--{name.replace('_', '-')}"
            raise SettingError(
                f"{flag}: got {getattr(args, name)}, expected 1 to {largest}; choose a number in that range"
            )
    if args.source == "shapes":
        draw_shapes(args)
    elif args.source == "emoji":
        draw_emoji(args)
    else:
        import_pictures(args)


# Drawn pictures ------------------------------------------------------------------------------------------------


def draw_shapes(args: argparse.Namespace) -> None:
    """Draw the shards that are not there yet, and say how many and how fast."""
    folder, count, size = args.output, args.count, args.shard_size
    names = ("source", "count", "resolution", "shard_size", "seed")
    shards = begin(folder, {name: getattr(args, name) for name in names}, args.resume)
    first = next(n for n in range(len(shards) + 1) if folder / f"shapes-{n:05d}.tar" not in shards)
    from ldm.data.shapes import shard_sample
    from ldm.data.shards import write_shards

    began = time.monotonic()
    done = min(first * size, count)
    make = partial(shard_sample, seed=args.seed, resolution=args.resolution)
    with in_order(args.workers, SAMPLES_AT_ONCE) as each:
        paths = write_shards(shown(each(make, range(done, count)), done, count), folder, size, "shapes", start=first)
    print(f"{folder}: {len(paths)} shards with {count - done} pictures in {time.monotonic() - began:.0f} s")


def draw_emoji(args: argparse.Namespace) -> None:
    """Draw the emoji of public collections: what is left out, the pairs that are held out, then the shards."""
    if args.input is None:
        raise SettingError("--input: not given, expected the folder with the clones; name it")
    from ldm.data.emoji.choice import choose, drawings
    from ldm.data.emoji.drawing import sample, thumbnail
    from ldm.data.emoji.sources import Drawing
    from ldm.data.shards import write_shards

    folder, size, found = args.output, args.shard_size, drawings(args.input)
    names = ("source", "resolution", "shard_size", "seed")
    settings = {**{name: getattr(args, name) for name in names}, "input": str(args.input)}
    refuse_same_folder(args)
    shards = begin(folder, settings, args.resume)
    first = next(n for n in range(len(shards) + 1) if folder / f"emoji-{n:05d}.tar" not in shards)
    drawable = [one for one in found if isinstance(one, Drawing)]
    make = partial(sample, side=args.resolution)
    with in_order(args.workers, SAMPLES_AT_ONCE) as each:
        chosen = choose(drawable, each(thumbnail, drawable), args.seed)
        save_held_out(folder, each(make, chosen.held_out))
        left_out = [one for one in found if not isinstance(one, Drawing)] + chosen.left_out
        rows = [json.dumps({"origin": one.origin, "reason": one.reason, "words": one.words}) for one in left_out]
        save_text(folder / "rejects.jsonl", "".join(f"{row}\n" for row in rows))
        done, count = min(first * size, len(chosen.training)), len(chosen.training)
        keep_settings(folder, {**settings, COUNT: count})
        samples = shown(each(make, chosen.training[done:]), done, count)
        write_shards(samples, folder, size, "emoji", start=first)
    print(f"{folder}: {count} pictures, {len(chosen.held_out)} held out, {len(left_out)} left out (rejects.jsonl)")


def save_held_out(folder: Path, samples: Iterable[Sample]) -> None:
    """Write what training must never see: pictures by key, and heldout.json with all that is known of them."""
    (folder / "heldout").mkdir(exist_ok=True)
    rows = []
    for one in samples:
        key, facts = str(one["__key__"]), one["json"]
        assert isinstance(one["webp"], bytes) and isinstance(facts, dict)
        (folder / "heldout" / f"{key}.webp").write_bytes(one["webp"])
        rows.append({"key": key, "image": f"heldout/{key}.webp", "caption": one["txt"], **facts})
    save_text(folder / "heldout.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def begin(folder: Path, wanted: dict[str, Any], resume: bool) -> list[Path]:
    """The shards that are there; keeps the settings beside them, and refuses to mix two sets."""
    shards, kept = list(folder.glob("*.tar")), kept_settings(folder)
    if shards and not kept:
        raise DataError(f"{folder}: has {len(shards)} shards but no {SETTINGS_FILE}, expected none; name a new folder")
    if shards and not resume:
        raise DataError(
            f"{folder}: has {len(shards)} shards already, expected none; add --resume, or name a new folder"
        )
    begun = {name: value for name, value in kept.items() if name in wanted or name != COUNT}
    if shards and begun != wanted:
        other = ", ".join(f"{name} {kept.get(name)}" for name in wanted if kept.get(name) != wanted[name])
        raise SettingError(f"{folder}: was begun with {other}; give the same settings, or name a new folder")
    for path in shards:
        if not re.fullmatch(rf"{wanted['source']}-\d{{5,}}\.tar", path.name):
            raise DataError(f"{path}: a shard of another set; move it elsewhere, or name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".*.tmp"):
        stale.unlink()  # what a killed run was writing
    keep_settings(folder, {**wanted, **kept} if shards else wanted)
    return shards


def refuse_same_folder(args: argparse.Namespace) -> None:
    """Raise SettingError where what is read would be written over."""
    from ldm.data.importing import MANIFEST, REJECTS
    from ldm.data.shards import find_shards

    folders = [path.parent for path in find_shards(args.input)] if args.source == "shards" else []
    read = {path.resolve() for path in (args.input, *folders)}
    output = args.output.resolve()
    if read & {output, *(output / name for name in (SETTINGS_FILE, MANIFEST, REJECTS))}:
        raise SettingError(f"--output: {args.output} is where the input lies, expected another folder; name a new one")


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write dataset.json."""
    save_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")


def kept_settings(folder: Path) -> dict[str, Any]:
    """What dataset.json says of the folder's shards; empty where there is none."""
    about = folder / SETTINGS_FILE
    try:
        kept = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    except ValueError as error:
        raise DataError(f"{about}: no JSON ({error}), expected a data set's settings; delete it") from error
    if not isinstance(kept, dict):
        raise DataError(f"{about}: no object, expected a data set's settings; delete it")
    return kept


@contextmanager
def in_order(workers: int, at_once: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` that keeps the order, over so many processes, with so many items in a portion."""
    if workers == 1:
        yield map
        return
    # Spawned, since forking is not safe once libraries have started threads; Ctrl-C is for the parent to handle.
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield partial(pool.imap, chunksize=at_once)


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


# Imported pictures ---------------------------------------------------------------------------------------------


def import_pictures(args: argparse.Namespace) -> None:
    """Clean what the input holds and write the shards that are not there yet; say what was taken and what was not."""
    if args.input is None:
        raise SettingError(f"--input: not given, expected the {args.source} with the pictures; name it")
    rules = import_rules(args)
    source = open_source(args)
    refuse_same_folder(args)
    settings = {"source": args.source, "input": str(args.input), "shard_size": args.shard_size}
    columns = {name: getattr(args, name) for name in ("image_column", "caption_column")}
    shards = begin(args.output, {**settings, **columns, **rules.model_dump(mode="json")}, args.resume)
    from ldm.data.importing import MANIFEST, REJECTS, Progress, import_records

    for name in (MANIFEST, REJECTS) if not shards else ():
        (args.output / name).unlink(missing_ok=True)  # of a run that left no shard
    progress = Progress(0, 0, {})
    with in_order(args.workers, RECORDS_AT_ONCE) as each:
        reports = import_records(source, each, rules, args.output, args.source, args.shard_size)
        for report in imported(reports):
            progress = report
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(progress.rejects.items())) or "none"
    if not progress.kept:
        raise DataError(f"{args.input}: got {progress.read} pictures, none can be used ({left_out}); see {REJECTS}")
    print(f"{args.output}: {progress.read} read, {progress.kept} taken, left out: {left_out}")


def import_rules(args: argparse.Namespace) -> "Rules":
    """The rules that the flags say; SettingError that names the flag of a value that is not allowed."""
    from ldm.config import validate
    from ldm.data.cleaning import Rules

    given = {name: getattr(args, name, None) for name in Rules.model_fields}
    rules = validate({name: value for name, value in given.items() if value is not None}, Rules, "flags")
    if rules.resize == "bucket":
        _ = rules.sizes  # says now if the resolution does not fit the step
    return rules


def open_source(args: argparse.Namespace) -> "Records":
    """The records of the input, which are read when they are needed."""
    from ldm.data import records

    path = args.input
    if args.source == "shards":
        from ldm.data.shards import find_shards

        find_shards(path)
        return records.from_shards(path)
    wanted = "folder" if args.source == "folder" else "file"
    if not (path.is_dir() if wanted == "folder" else path.is_file()):
        raise DataError(f"{path}: no such {wanted}, expected pictures with captions; check the path")
    if args.source == "folder":
        return records.from_folder(path)
    return records.TABLES[args.source](path, args.image_column, args.caption_column)


def imported(reports: "Iterator[Progress]") -> "Iterator[Progress]":
    """The reports, with a bar on a terminal and a plain line now and then elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(unit="picture") as bar:
            for report in reports:
                bar.update(report.read - bar.n)
                bar.set_postfix(taken=report.kept, left_out=sum(report.rejects.values()), refresh=False)
                yield report
        return
    told = time.monotonic()
    for report in reports:
        yield report
        if time.monotonic() - told > LINE_EVERY_SECONDS:
            told = time.monotonic()
            print(f"{report.read} read, {report.kept} taken", file=sys.stderr)


# Checking ------------------------------------------------------------------------------------------------------


def verify(folder: Path) -> None:
    """Read everything in the folder's shards, print what is wrong, and end with DataError if anything is."""
    from ldm.data.importing import manifest_faults, read_manifest
    from ldm.data.shards import check_shard, find_shards

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with shards; check the path")
    total, faults = 0, manifest_faults(folder)
    paths = find_shards(folder)
    for path in paths:
        good, found = check_shard(path)
        total += good
        faults += found
        print(f"{path}: {good} good samples, {len(found)} faults", file=sys.stderr)
    lines = read_manifest(folder)
    count = sum(line.samples for line in lines) if lines else kept_settings(folder).get(COUNT, total)
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
