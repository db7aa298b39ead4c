"""Preparing data: every source gives the same samples, what is left out is said, and no interruption shows."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import SCRIPTS, environment
from PIL import Image

from ldm.data.cleaning import Cleaned, Rules, clean, resized
from ldm.data.decoding import read_picture, upright_rgb
from ldm.data.duplicates import Seen, fingerprint
from ldm.data.importing import read_manifest
from ldm.data.records import Record, Reject
from ldm.data.shards import read_samples, write_shard
from ldm.data.tally import BadSample
from ldm.errors import DataError, MachineError, SettingError

SCRIPT = SCRIPTS / "prepare_data.py"
SMALL = ("--resolution", 16, "--min-side", 8, "--shard-size", 4, "--format", "png", "--workers", 1)


def picture(number: int, width: int = 24, height: int = 20) -> Image.Image:
    """Another picture for each number: noise, enlarged."""
    noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def file(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with ten good pictures, one in a folder of its own, and one fault of every kind."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(10):
        path = folder / ("more" if number == 9 else "") / f"{number}.dotted.png"
        picture(number).save(path)
        path.with_suffix(".txt").write_text(f"picture {number}\n", encoding="utf-8")
    faults = {
        "copy.png": (file(picture(3)), b"the third again"),
        "tiny.png": (file(picture(20, 6, 6)), b"tiny"),
        "narrow.png": (file(picture(21, 100, 10)), b"narrow"),
        "torn.jpg": (file(picture(22), "JPEG")[:200], b"torn"),
        "text.png": (b"no picture at all", b"text"),
        "silent.png": (file(picture(23)), None),
        "blank.png": (file(picture(24)), b" \n"),
        "latin.png": (file(picture(25)), "café".encode("latin-1")),
        "moving.gif": (file(picture(26), "GIF", save_all=True, append_images=[picture(27)]), b"moving"),
    }
    for name, (data, caption) in faults.items():
        (folder / name).write_bytes(data)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_bytes(caption)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def captions(folder: Path) -> list[str]:
    return [sample.caption for sample in read_samples(folder, seed=0, shuffle=False, epochs=1)]


def test_a_folder_becomes_shards_and_what_is_left_out_is_said(
    photos: Path, prepare: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare("--source", "folder", "--input", photos, "--output", out, *SMALL)
    assert captions(out) == [f"picture {number}" for number in range(10)]
    samples = list(read_samples(out, seed=0, shuffle=False, epochs=1))
    assert all(sample.image.size == (19, 16) for sample in samples)
    assert samples[9].facts["origin"] == "more/9.dotted.png" and samples[9].facts["width"] == 24
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {row["origin"]: row["reason"] for row in rejects} == {
        "copy.png": "duplicate",
        "tiny.png": "too small",
        "narrow.png": "too narrow",
        "torn.jpg": "torn picture",
        "text.png": "torn picture",
        "silent.png": "no caption",
        "blank.png": "empty caption",
        "latin.png": "caption not UTF-8",
        "moving.gif": "animated",
    }
    assert "19 read, 10 taken, left out: 1 animated, 1 caption not UTF-8" in capsys.readouterr().out
    prepare("--verify", out)
    assert "10 samples in 3 shards, all good" in capsys.readouterr().out


def test_verify_finds_what_is_not_as_it_was_written(photos: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare("--source", "folder", "--input", photos, "--output", out, *SMALL)
    shard = out / "folder-00001.tar"
    whole = shard.read_bytes()
    at = whole.index(b"picture 5")
    shard.write_bytes(whole[:at] + b"picture 6" + whole[at + 9 :])
    with pytest.raises(DataError, match="1 faults"):
        prepare("--verify", out)
    shard.unlink()
    with pytest.raises(DataError, match="2 faults"):
        prepare("--verify", out)


def test_tables_give_what_the_folder_gives(photos: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    rows = [{"file_name": path.relative_to(photos).as_posix(), "text": path.with_suffix(".txt").read_text().strip()}
            for path in sorted(photos.rglob("*.dotted.png"))]  # fmt: skip
    with (photos / "table.csv").open("w", newline="", encoding="utf-8-sig") as table:  # with a BOM
        writer = csv.DictWriter(table, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
    bom = b"\xef\xbb\xbf"
    (photos / "table.jsonl").write_bytes(bom + b"\r\n".join(json.dumps(row).encode() for row in rows))
    for source in ("csv", "jsonl"):
        out = tmp_path / source
        prepare("--source", source, "--input", photos / f"table.{source}", "--output", out, *SMALL)
        assert captions(out) == [f"picture {number}" for number in range(10)]
    again = tmp_path / "again"
    prepare("--source", "shards", "--input", tmp_path / "csv", "--output", again, *SMALL)
    assert captions(again) == captions(tmp_path / "csv")


def test_rows_that_cannot_be_used_are_counted(photos: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    good = {"file_name": "0.dotted.png", "text": ["first", "second"], "style": "flat"}
    lines = [
        json.dumps(good),
        json.dumps(good),  # listed twice
        "{torn",
        "[1]",
        json.dumps({"file_name": "gone.png", "text": "gone"}),
        json.dumps({"file_name": "https://example.org/a.png", "text": "far"}),
        json.dumps({"file_name": "1.dotted.png", "text": 3}),
        json.dumps({"file_name": "2.dotted.png", "text": "x" * 20_000}),
    ]
    (photos / "metadata.jsonl").write_text("\n".join(lines))  # which a folder is read by, if it is there
    prepare("--source", "folder", "--input", photos, "--output", tmp_path / "out", *SMALL)
    (sample,) = read_samples(tmp_path / "out", seed=0, shuffle=False, epochs=1)
    assert sample.caption == "first"
    assert sample.facts["captions"] == ["first", "second"] and sample.facts["style"] == "flat"
    rejects = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert rejects == [
        *("listed twice", "bad row", "bad row", "missing file", "remote picture", "no caption", "caption too long")
    ]


def test_reading_goes_on_behind_rows_that_are_no_csv(
    photos: Path, prepare: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "file_name,text",
        "0.dotted.png,first",
        '1.dotted.png,"the "big" one"',
        "2.dotted.png,third",
        f"3.dotted.png,{'x' * 140_000}",
        "4.dotted.png,fifth",
        '5.dotted.png,"two',
        'lines"',
        '6.dotted.png,"never closed',
        "7.dotted.png,and so within it",
    ]
    (photos / "t.csv").write_text("\n".join(lines) + "\n")
    prepare("--source", "csv", "--input", photos / "t.csv", "--output", tmp_path / "out", *SMALL)
    assert captions(tmp_path / "out") == ["first", "third", "fifth", "two\nlines"]
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(row["origin"], row["reason"]) for row in rejects] == [(f"t.csv:{line}", "bad row") for line in (3, 5, 10)]
    assert rejects[2]["words"].startswith("no CSV in lines 9 to 10 (")
    assert "7 read, 4 taken, left out: 3 bad row" in capsys.readouterr().out
    (photos / "t.csv").write_text('file_name,"te"xt\n0.dotted.png,first\n')
    with pytest.raises(DataError, match="no names of columns"):
        prepare("--source", "csv", "--input", photos / "t.csv", "--output", tmp_path / "other", *SMALL)


def test_a_table_without_a_known_column_is_refused(photos: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    (photos / "t.csv").write_text("file,words\n0.dotted.png,a\n")
    asked = ("--source", "csv", "--input", photos / "t.csv", "--output", tmp_path / "out", *SMALL)
    with pytest.raises(DataError, match="--caption-column"):
        prepare(*asked)
    prepare(*asked, "--caption-column", "words")
    assert captions(tmp_path / "out") == ["a"]


def parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    """A Parquet file of these columns."""
    pyarrow = pytest.importorskip("pyarrow", reason="reading Parquet needs pyarrow: pip install '.[parquet]'")
    tables = pytest.importorskip("pyarrow.parquet")
    tables.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def test_parquet_gives_what_the_folder_gives(photos: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    names = [path.relative_to(photos).as_posix() for path in sorted(photos.rglob("*.dotted.png"))]
    data = [(photos / name).read_bytes() for name in names]
    columns: dict[str, list[object]] = {"text": [f"picture {number}" for number in range(10)], "score": [0.5] * 10}
    pictures: dict[str, list[object]] = {
        "files": list(names),
        "bytes": list(data),
        "hugging face": [{"bytes": one, "path": None} for one in data],
    }
    for kind, column in pictures.items():
        table = parquet(photos / f"{kind}.parquet", {"image": column, **columns})
        out = tmp_path / kind
        prepare("--source", "parquet", "--input", table, "--output", out, *SMALL)
        samples = list(read_samples(out, seed=0, shuffle=False, epochs=1))
        assert [sample.caption for sample in samples] == columns["text"], kind
        assert all(sample.facts["score"] == 0.5 for sample in samples)
        expected = [resized(picture(number), Rules(resolution=16)).tobytes() for number in range(10)]
        assert [sample.image.tobytes() for sample in samples] == expected


def test_parquet_rows_that_cannot_be_used_are_counted(
    photos: Path, prepare: Callable[..., None], tmp_path: Path
) -> None:
    columns: dict[str, list[object]] = {
        "image": ["0.dotted.png", None, "gone.png", "1.dotted.png"],
        "captions": [["first", "second"], ["none"], ["gone"], None],
    }
    table = parquet(photos / "t.parquet", columns)
    prepare("--source", "parquet", "--input", table, "--output", tmp_path / "out", *SMALL)
    (sample,) = read_samples(tmp_path / "out", seed=0, shuffle=False, epochs=1)
    assert sample.caption == "first" and sample.facts["captions"] == ["first", "second"]
    rejects = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert rejects == ["bad row", "missing file", "no caption"]


def test_parquet_that_is_none_is_said(photos: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    table = parquet(photos / "t.parquet", {"image": ["0.dotted.png"], "words": ["a"]})
    asked = ("--source", "parquet", "--input", table, "--output", tmp_path / "out", *SMALL)
    with pytest.raises(DataError, match=r"got columns image, words, expected captions or caption .*--caption-column"):
        prepare(*asked)
    data = table.read_bytes()
    for torn in (data[: len(data) // 2], b"", b"PAR1", b"noise" * 40):
        table.write_bytes(torn)
        with pytest.raises(DataError, match="no whole Parquet file"):
            prepare(*asked, "--resume")


def test_parquet_without_pyarrow_says_what_to_install(
    prepare: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MachineError, match="pyarrow"):
        prepare("--source", "parquet", "--input", tmp_path / "t.parquet", "--output", tmp_path / "out", *SMALL)


def test_flags_that_make_no_sense_are_refused(photos: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    asked = ("--source", "folder", "--input", photos, "--output", tmp_path / "out")
    for flags in (("--quality", 0), ("--ground", "no colour"), ("--near-bits", 8), ("--max-aspect", 0.5)):
        with pytest.raises(SettingError, match=str(flags[0]).strip("-").replace("-", "_")):
            prepare(*asked, *flags)
    with pytest.raises(SettingError, match="multiple of the buckets' step"):
        prepare(*asked, "--resize", "bucket", "--resolution", 100)
    with pytest.raises(SettingError, match="--resolution: got 0, expected 1 to 4096"):
        prepare(*asked, "--resolution", 0)
    with pytest.raises(SettingError, match="--input"):
        prepare("--source", "folder", "--output", tmp_path / "out")
    with pytest.raises(DataError, match="no such folder"):
        prepare("--source", "folder", "--input", tmp_path / "gone", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Interruptions -------------------------------------------------------------------------------------------------

KILLED = """
import os, runpy, signal, sys
at, name = int(sys.argv[1]), sys.argv[2]
calls, real = 0, getattr(os, name)
def deadly(*arguments):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
setattr(os, name, deadly)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed_at(call: int, name: str, *arguments: object) -> int:
    """Run the script in a process that kills itself at its so-manyth call of os.<name>; its exit code."""
    command = [sys.executable, "-c", KILLED, str(call), name, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=environment(), timeout=120, check=False).returncode


# fsync 2: shard 0 under its temporary name; 3: rejects of shard 0; 4: its line; replace 3: shard 1 before its name.
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("fsync", 2),
        pytest.param("fsync", 3, marks=pytest.mark.slow),
        pytest.param("fsync", 4, marks=pytest.mark.slow),
        pytest.param("replace", 3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_import_goes_on_to_the_same_bytes(
    photos: Path, prepare: Callable[..., None], tmp_path: Path, name: str, call: int
) -> None:
    asked = ("--source", "folder", "--input", photos, *SMALL, "--duplicates", "near")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepare(*asked, "--output", whole)
    assert killed_at(call, name, *asked, "--output", parts) == -9
    assert not (parts / "folder-00002.tar").exists()
    prepare(*asked, "--output", parts, "--resume")
    assert contents(parts) == contents(whole)
    prepare(*asked, "--output", parts, "--resume")  # nothing is left to do
    assert contents(parts) == contents(whole)


def test_lines_that_were_cut_short_do_not_count(photos: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    asked = ("--source", "folder", "--input", photos, *SMALL)
    prepare(*asked, "--output", tmp_path / "whole")
    prepare(*asked, "--output", tmp_path / "parts")
    for name in ("manifest.jsonl", "rejects.jsonl"):
        path = tmp_path / "parts" / name
        os.truncate(path, path.read_bytes().index(b"\n") + 9)
    assert [line.shard for line in read_manifest(tmp_path / "parts")] == ["folder-00000.tar"]
    prepare(*asked, "--output", tmp_path / "parts", "--resume")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_another_input_is_not_mixed_in(photos: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    asked = ("--source", "folder", "--input", photos, *SMALL, "--output", tmp_path / "out")
    prepare(*asked)
    with pytest.raises(DataError, match="--resume"):
        prepare(*asked)
    with pytest.raises(SettingError, match="begun with quality 95"):
        prepare(*asked, "--quality", 90, "--resume")
    (photos / "0.dotted.png").rename(photos / "a.png")
    (photos / "0.dotted.txt").rename(photos / "a.txt")
    with pytest.raises(DataError, match="input has changed"):
        prepare(*asked, "--resume")


def test_shards_of_others_are_neither_removed_nor_mixed_in(
    photos: Path, prepare: Callable[..., None], tmp_path: Path
) -> None:
    theirs = tmp_path / "set"
    theirs.mkdir()
    for name in ("shards-00000.tar", "shards-00007.tar"):
        write_shard([{"__key__": "a", "png": file(picture(0)), "txt": "a"}], theirs / name)
    before = contents(theirs)
    for source, given in (("shards", theirs), ("folder", photos), ("shards", theirs / "shards-{00000,00007}.tar")):
        for more in ((), ("--resume",)):
            with pytest.raises((DataError, SettingError), match="; name a new") as refused:
                prepare("--source", source, "--input", given, "--output", theirs, *SMALL, *more)
            assert "--resume" not in str(refused.value) and contents(theirs) == before
    ours = ("--source", "folder", "--input", photos, *SMALL, "--output", tmp_path / "out")
    prepare(*ours)
    (theirs / "shards-00007.tar").rename(tmp_path / "out" / "shards-00007.tar")
    with pytest.raises(DataError, match=r"shards-00007\.tar: a shard of another set"):
        prepare(*ours, "--resume")


def test_what_is_read_is_not_written_over(photos: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    table = photos / "rejects.jsonl"
    table.write_text(json.dumps({"file_name": "0.dotted.png", "text": "a"}))
    before = contents_of_files(photos)
    for given in (("folder", photos), ("jsonl", table)):
        with pytest.raises(SettingError, match=r"--output: .* is where the input lies"):
            prepare("--source", given[0], "--input", given[1], "--output", photos, *SMALL)
    assert contents_of_files(photos) == before


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_a_full_disk_keeps_the_finished_shards(photos: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    asked = ("--source", "folder", "--input", photos, *SMALL)
    prepare(*asked, "--output", tmp_path / "whole")
    limit = (tmp_path / "whole" / "folder-00000.tar").stat().st_size - 5000
    code = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"  # fmt: skip # noqa: E501
    command = [sys.executable, "-c", code, str(SCRIPT), *map(str, asked), "--output", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, env=environment(), timeout=120, check=False, text=True)
    assert ended.returncode == 5 and ended.stderr.count("error: ") == 1 and "Traceback" not in ended.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dataset.json"]
    prepare(*asked, "--output", tmp_path / "out", "--resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Pictures ------------------------------------------------------------------------------------------------------


def test_colours_of_every_mode_are_right() -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    for mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
        pixel = upright_rgb(red.convert(mode, palette=Image.Palette.ADAPTIVE)).getpixel((3, 3))
        assert np.abs(np.subtract(pixel, (200, 30, 40))).max() <= 2, mode
    for mode, grey in (("1", 255), ("L", 100), ("LA", 100)):
        assert upright_rgb(Image.new("L", (8, 8), grey).convert(mode)).getpixel((3, 3)) == (grey,) * 3
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match="mode"):
            upright_rgb(Image.new(mode, (8, 8)))


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    data = file(Image.fromarray(np.repeat(ramp[None], 8, axis=0)))
    found = np.asarray(read_picture(data, "here", ["PNG"]))[0, :, 0]
    assert np.abs(found.astype(int) - np.arange(256)).max() <= 1


def test_hidden_colours_and_turned_pictures() -> None:
    hidden = file(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))
    assert read_picture(hidden, "here", ["PNG"]).getpixel((0, 0)) == (255, 255, 255)
    assert read_picture(hidden, "here", ["PNG"], ground="#102030").getpixel((0, 0)) == (16, 32, 48)
    upright = Image.new("RGB", (8, 6), "blue")
    upright.paste("yellow", (0, 0, 4, 3))
    made_by = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation: the transpose of Pillow's that leads to it
    for orientation, transpose in made_by.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = upright.transpose(Image.Transpose(transpose))
        found = read_picture(file(turned, exif=exif), "here", ["PNG"])
        assert found.tobytes() == upright.tobytes(), orientation


def test_a_bomb_is_refused_by_its_header() -> None:
    bomb = file(Image.new("1", (13000, 13000)))
    assert len(bomb) < 100_000
    with pytest.raises(BadSample, match="expected at most 32000000"):
        read_picture(bomb, "here", ["PNG"])


def test_what_could_start_another_program_is_no_picture(tmp_path: Path) -> None:
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"%PDF-1.4\n"):
        outcome = clean(Record("x", data, ("a",)), Rules())
        assert isinstance(outcome, Reject) and outcome.reason == "torn picture"


def test_what_is_said_of_a_torn_picture_is_the_same_in_every_run() -> None:
    outcome = clean(Record("x", b"no picture at all", ("a",)), Rules())
    assert isinstance(outcome, Reject)
    assert outcome.words.startswith("UnidentifiedImageError (cannot identify image file), expected a whole PNG or")


def test_sizes_follow_the_rules() -> None:
    image = picture(0, 200, 100)
    assert resized(image, Rules(resolution=64)).size == (128, 64)
    assert resized(image, Rules(resolution=64, resize="exact")).size == (64, 64)
    assert resized(image, Rules(resolution=64, resize="keep")).size == (200, 100)
    assert resized(image, Rules(resolution=64, resize="bucket", bucket_step=16)).size == (80, 48)


def test_text_that_is_none_is_left_out_or_replaced() -> None:
    data = file(picture(0, 80, 80))
    outcome = clean(Record("name\udcff", data, ("a",), {"by": "\udcff"}), Rules())
    assert isinstance(outcome, Cleaned) and outcome.members["json"]["origin"] == "name?"
    assert outcome.members["json"]["by"] == "?"
    outcome = clean(Record("x", data, ("a\udcff",)), Rules())
    assert isinstance(outcome, Reject) and outcome.reason == "caption not UTF-8"
    outcome = clean(Record("x", data, ("",)), Rules(empty_captions=True))
    assert isinstance(outcome, Cleaned) and outcome.members["txt"] == ""


def test_near_pictures_are_found_and_unlike_ones_are_not() -> None:
    original = picture(1, 256, 256)
    smaller = Image.open(io.BytesIO(file(original.resize((200, 200)), "JPEG", quality=80)))
    seen = Seen(distance=3)
    seen.add(fingerprint(original, near=True), "original")
    assert seen.find(fingerprint(smaller, near=True)) == "original"
    assert Seen().find(fingerprint(smaller, near=False)) is None
    assert seen.find(fingerprint(picture(2, 256, 256), near=True)) is None
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    seen.add(fingerprint(red, near=True), "red")
    assert seen.find(fingerprint(blue, near=True)) is None  # flat: no gradients, but other colours


def test_keys_that_would_not_be_read_back_are_not_written(tmp_path: Path) -> None:
    for keys in (("a", "a"), ("a.b",), ("",)):
        with pytest.raises(ValueError, match="expected one that is new and has no dot"):
            write_shard([{"__key__": key, "txt": "a"} for key in keys], tmp_path / "x.tar")
    assert list(tmp_path.iterdir()) == []
