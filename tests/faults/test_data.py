"""Damaged, hostile and unlike data: named, counted by reason, left out, and refused when there is too much of it."""

import gzip
import io
import itertools
import pickle
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Script
from PIL import Image

from ldm.data import index as index_module
from ldm.data import shards as shards_module
from ldm.data.captions import CaptionConfig
from ldm.data.index import open_table, scan
from ldm.data.settings import PicturesConfig
from ldm.data.shards import check_shard
from ldm.data.source import open_pictures
from ldm.data.tally import Fault, Tally
from ldm.data.transforms import PictureConfig
from ldm.errors import DataError, SettingError

GOOD = 12
MODES = ("indexed", "streaming")
Files = list[tuple[str, bytes]]


def png(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG", **options)
    return buffer.getvalue()


def sample(key: str, picture: bytes | None = None, caption: bytes = b"red") -> Files:
    return [(f"{key}.png", picture or png()), (f"{key}.txt", caption)]


def good(count: int = GOOD) -> Files:
    return [file for number in range(count) for file in sample(f"{number:03d}")]


def tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w") as made:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return path


def config(path: Path | str, mode: str, **changes: object) -> PicturesConfig:
    settings = {"batch_size": 4, "pictures": PictureConfig(side=8), "shuffle_buffer": 1, "max_bad_fraction": 0.5}
    return PicturesConfig.model_validate({**settings, "shards": str(path), "mode": mode, **changes})


def read(path: Path | str, mode: str, batches: int = 6, **changes: object) -> tuple[set[str], dict[str, int]]:
    """The keys that were read, and the faults by reason, while they were and when the shards were indexed."""
    source = open_pictures(config(path, mode, **changes))
    keys = {key for batch in itertools.islice(source.batches(), batches) for key in batch.keys}
    return keys, dict(source.tally.counts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", [600, 1030, 1600, 6000, 8192, 9216, 12000, 24576])
def test_a_shard_cut_anywhere_gives_the_samples_before_the_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, cut: int
) -> None:
    path = tar(tmp_path / "cut.tar", good())
    whole = path.read_bytes()
    assert len(whole) > 24576
    tar(tmp_path / "whole.tar", sample("whole"))
    path.write_bytes(whole[:cut])
    # Each file is a block for its head and one for its data; the sample that a cut between files ends may be half.
    before = {f"{number:03d}" for number in range(max(0, (cut - 1) // 2048))}
    keys, _ = read(tmp_path, mode)
    assert before <= keys | {f"{cut // 2048 - 1:03d}"} and keys <= before | {"whole"}
    assert "cut.tar: torn or no tar file" in caplog.text


@pytest.mark.parametrize("content", [b"", b"<html></html>", bytes(range(256)) * 40], ids=["0", "html", "noise"])
def test_shards_that_are_none_end_at_once(tmp_path: Path, content: bytes) -> None:
    for number in range(4):
        (tmp_path / f"{number}.tar").write_bytes(content)
    for mode in MODES:
        with pytest.raises(DataError, match=r"bad shards in a row"):
            read(tmp_path, mode)


CAPTIONS = {
    "caption not UTF-8": b"caf\xe9",
    "caption too long": b"x" * 100_000,
    "caption is a list": b'["a", "b"]',
    "empty caption": b" \n",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("reason", "caption"), CAPTIONS.items())
def test_captions_that_are_none_are_counted_by_reason(tmp_path: Path, mode: str, reason: str, caption: bytes) -> None:
    tar(tmp_path / "a.tar", [*good(), *sample("bad", caption=caption)])
    keys, counts = read(tmp_path, mode)
    assert "bad" not in keys and set(counts) == {reason}


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_caption_can_be_the_null_prompt(tmp_path: Path, mode: str) -> None:
    tar(tmp_path / "a.tar", [*good(), *sample("bad", caption=b"")])
    keys, counts = read(tmp_path, mode, captions=CaptionConfig(empty="uncond"))
    assert "bad" in keys and not counts


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES: dict[str, Callable[[], bytes]] = {
    "torn picture": lambda: png()[:40],
    "too many pixels": bomb,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("reason", "picture"), PICTURES.items())
def test_pictures_that_are_none_are_counted_by_reason(
    tmp_path: Path, mode: str, reason: str, picture: Callable[[], bytes]
) -> None:
    tar(tmp_path / "a.tar", [*good(), *sample("bad", picture())])
    keys, counts = read(tmp_path, mode)
    assert "bad" not in keys and set(counts) == {reason}


FORMS: dict[str, tuple[Files, str]] = {
    "apart": ([("x.png", png()), *sample("y"), ("x.txt", b"red")], "files apart"),
    "twice": ([("x.png", png()), ("x.png", png()), ("x.txt", b"red")], "file given twice"),
    "dotted": ([("x.b.c.png", png()), ("x.txt", b"red")], "no picture"),
    "no picture": ([("x.txt", b"red")], "no picture"),
    "no caption": ([("x.png", png())], "no caption"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_half_samples_are_counted_and_never_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, form: str
) -> None:
    files, reason = FORMS[form]
    tar(tmp_path / "a.tar", [*good(), *files])
    source = open_pictures(config(tmp_path, mode))
    batches = list(itertools.islice(source.batches(), 6))
    keys = [key for batch in batches for key in batch.keys]
    if not (form == "twice" and mode == "streaming"):  # where the first one is taken
        assert "x" not in keys
    # What the headers show is found when the index is made, and named then; the rest when the sample is read.
    _, faults = scan(tmp_path / "a.tar", ("png", "txt"))
    of_headers = form in ("apart", "twice")
    assert [fault.reason for fault in faults] == [reason] * of_headers
    if of_headers and mode == "indexed":
        assert str(faults[0]) in caplog.text and not source.tally.counts
    else:
        assert reason in source.tally.counts and "left out" in caplog.text


@pytest.mark.parametrize("mode", MODES)
def test_upper_case_and_nested_folders_are_no_fault(tmp_path: Path, mode: str) -> None:
    tar(tmp_path / "a.tar", [("sub/a.PNG", png()), ("sub/a.TXT", b"red"), *sample("sub.d/b")])
    keys, counts = read(tmp_path, mode)
    assert keys == {"sub/a", "sub.d/b"} and not counts


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ending", ["pyd", "pkl", "pth", "PICKLE"])
def test_files_that_could_run_code_are_refused(tmp_path: Path, mode: str, ending: str) -> None:
    flag = tmp_path / "ran"
    tar(tmp_path / "a.tar", [*good(), (f"x.{ending}", pickle.dumps(Bomb(flag))), *sample("y")])
    with pytest.raises(DataError, match="can run code"):
        read(tmp_path, mode)
    assert not flag.exists()


@pytest.mark.parametrize("mode", MODES)
def test_commands_are_no_shards(tmp_path: Path, mode: str) -> None:
    with pytest.raises(SettingError, match="never run"):
        read(f"pipe:touch {tmp_path}/ran", mode)
    assert list(tmp_path.iterdir()) == []


def test_large_files_are_left_out_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "LARGEST_MEMBER", 10_000)
    path = tar(tmp_path / "a.tar", [*good(), ("x.png", bytes(10_001)), ("x.txt", b"red")])
    faults: list[Fault] = []
    with path.open("rb") as file:
        keys = [found["__key__"] for found in shards_module.shard_samples(file, "a", faults.append) if "png" in found]
    assert len(keys) == GOOD and [fault.reason for fault in faults] == ["file too large"]
    monkeypatch.setattr(index_module, "LARGEST_MEMBER", 10_000)
    rows, faults = scan(path, ("png", "txt"))
    assert len(rows) == GOOD and [fault.reason for fault in faults] == ["file too large"]


@pytest.mark.parametrize("mode", MODES)
def test_names_that_are_no_text_are_counted(tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """GNU tar keeps the bytes of names: here those of a file system in Latin-1."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as made:
        for name, data in [*good(), *sample("caf\xe9")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    keys, counts = read(tmp_path, mode)
    assert keys == {f"{number:03d}" for number in range(GOOD)}
    assert set(counts) == ({"name not UTF-8"} if mode == "streaming" else set())  # the index has said it before
    assert "sample 'caf\\udce9': got a name that is not UTF-8" in caplog.text
    count, faults = check_shard(path)
    assert count == GOOD and len(faults) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_streamed_fault_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int) -> None:
    tar(tmp_path / "a.tar", [*sample("bad", b"torn"), *good()])
    source = open_pictures(config(tmp_path, "streaming"))
    next(source.batches(workers=workers))
    lines = [record for record in caplog.records if "sample 'bad'" in record.getMessage()]
    assert len(lines) == (1 if workers == 0 else 0)  # a worker's lines are in its own process
    assert source.tally.counts == {"torn picture": 1}


@pytest.mark.parametrize(
    ("mode", "pattern"),
    [
        ("indexed", "/data/set-{00..3.tar"),
        ("streaming", "/data/set-{00..3.tar"),
        ("streaming", "https://host/set-{00..3.tar"),
    ],
)
def test_open_braces_are_said(mode: str, pattern: str) -> None:
    with pytest.raises(SettingError, match=r"set-\{00\.\.3\.tar: got unbalanced braces, .*; close them"):
        read(pattern, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_compressed_shard_is_not_inflated(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tar"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"compressed ones are not read|1 torn shard"):
        read(path, mode)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000  # KB


@pytest.mark.parametrize("mode", MODES)
def test_five_bad_of_a_hundred_are_too_many(tmp_path: Path, mode: str) -> None:
    bad = [file for number in range(5) for file in sample(f"bad{number}", b"torn")]
    tar(tmp_path / "a.tar", [*good(95), *bad])
    with pytest.raises(DataError, match=r"bad samples among \d+ \(\d+ torn picture\), expected at most 1\.0%"):
        read(tmp_path, mode, batches=200, max_bad_fraction=0.01)


def test_one_bad_of_two_hundred_is_not() -> None:
    tally = Tally(tolerated=0.01, window=100)
    for _ in range(20):
        tally.add(199)
        tally.add(1, [Fault("here", "torn picture", "words")])
    tally.end()
    assert tally.seen == 4000 and tally.bad == 20


def test_faults_are_named_first_and_counted_then(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally(tolerated=1.0)
    for number in range(2000):
        tally.add(1, [Fault(f"sample {number}", "torn picture", "words")])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 12 and "sample 9:" in lines[9] and lines[10].endswith("(bad sample 1000)")


def test_an_index_of_bad_shards_is_made_again(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [*good(), *FORMS["apart"][0]])
    for _ in range(2):
        with pytest.raises(DataError, match="1 files apart"):
            open_table([path], ("png", "txt"))
    assert list(tmp_path.glob(".*")) == []


def test_checking_a_shard_names_every_fault(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [*good(), *FORMS["apart"][0], *sample("bad", b"torn")])
    count, faults = check_shard(path)
    assert count == GOOD + 1 and len(faults) == 3 and all(str(path) in fault for fault in faults)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--source", "shards", "--input", "pipe:touch {}/ran"], 2, "commands in data paths are never run"),
        (["--source", "shards", "--input", "{}/x{{1..3}}.tar"], 3, "no such shard"),
        (["--source", "folder", "--input", "{}"], 3, "no pictures there"),
        (["--verify", "{}"], 3, "0 shards match"),
    ],
    ids=["pipe", "braces", "empty folder", "nothing to verify"],
)
def test_wrong_input_of_the_script_ends_with_one_line(
    in_process: Callable[[str], Script], tmp_path: Path, flags: list[str], code: int, words: str
) -> None:
    given = [flag.format(tmp_path) for flag in flags]
    ended = in_process("prepare_data.py")(*given, "--output", tmp_path / "out", "--workers", "1")
    assert ended.code == code and len(ended.errors) == 1 and words in ended.errors[0], ended.err
    assert "; " in ended.errors[0] and "Traceback" not in ended.err
    assert not list((tmp_path / "out").glob("*.tar")) and not (tmp_path / "ran").exists()
