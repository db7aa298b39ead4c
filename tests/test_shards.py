"""Shards: what goes in comes out, in an order the seed decides, and nothing foreign is run."""

import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.shapes import shard_sample
from ldm.data.shards import check_shard, find_shards, read_samples, write_shards
from ldm.errors import DataError, SettingError

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "prepare_data.py"


def samples(count: int) -> list[dict[str, object]]:
    return [shard_sample(index, seed=0, resolution=16) for index in range(count)]


def add(shard: Path, files: dict[str, bytes]) -> Path:
    """A copy of a tar file with more members."""
    made = shard.with_name("more.tar")
    with tarfile.open(shard) as old, tarfile.open(made, "w") as new:
        for member in old.getmembers():
            new.addfile(member, old.extractfile(member))
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return made


def png(size: int = 4, mode: str = "RGB", colour: object = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_shards(samples(25), tmp_path, shard_size=10, prefix="shapes")


def test_round_trip(shards: list[Path]) -> None:
    assert [path.name for path in shards] == ["shapes-00000.tar", "shapes-00001.tar", "shapes-00002.tar"]
    read = list(read_samples(shards, seed=0, shuffle=False, epochs=1))
    for (image, caption, facts), sample in zip(read, samples(25), strict=True):
        assert image.tobytes() == Image.open(io.BytesIO(sample["png"])).tobytes()
        assert caption == sample["txt"]
        assert facts == json.loads(json.dumps(sample["json"]))


def test_same_samples_make_the_same_bytes(shards: list[Path], tmp_path: Path) -> None:
    again = write_shards(samples(25), tmp_path / "again", shard_size=10, prefix="shapes")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in shards]


def test_seed_and_epoch_decide_the_order(shards: list[Path]) -> None:
    def order(seed: int, epochs: int = 1) -> list[int]:
        return [sample.facts["index"] for sample in read_samples(shards, seed=seed, epochs=epochs)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == list(range(25))
    two = order(1, epochs=2)
    assert two[:25] == order(1)
    assert two[25:] != two[:25]
    assert sorted(two[25:]) == list(range(25))


def test_without_epochs_there_is_no_end(shards: list[Path]) -> None:
    assert len(list(itertools.islice(read_samples(shards, seed=0), 70))) == 70


def test_parts_share_the_shards(shards: list[Path]) -> None:
    parts = [[s.facts["index"] for s in read_samples(shards, seed=5, epochs=1, part=(i, 2))] for i in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(25))
    with pytest.raises(DataError, match="one for each of the 4 readers"):
        read_samples(shards, seed=5, part=(0, 4))


def test_find_shards_by_folder_pattern_and_braces(shards: list[Path]) -> None:
    folder = shards[0].parent
    assert find_shards(folder) == find_shards(str(folder / "*.tar")) == shards
    assert find_shards(str(folder / "shapes-{00000..00001}.tar")) == shards[:2]
    for source in (folder / "none.tar", folder / "x*.tar", "http://localhost/a.tar", []):
        with pytest.raises(DataError, match="expected"):
            find_shards(source)
    with pytest.raises(SettingError, match="never run"):
        find_shards("pipe:touch ran")


def test_existing_shards_are_not_overwritten(shards: list[Path]) -> None:
    before = shards[0].read_bytes()
    with pytest.raises(DataError, match="exists already"):
        write_shards(samples(5), shards[0].parent, shard_size=5, prefix="shapes")
    assert shards[0].read_bytes() == before
    assert write_shards(samples(5), shards[0].parent, 5, "shapes", start=3)[0].name == "shapes-00003.tar"


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_shards([{"__key__": "0", "png": object}], tmp_path, shard_size=1, prefix="a")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_left_goes_after_a_day(tmp_path: Path) -> None:
    old, new = (tmp_path / f".a-00000.tar.{number}.tmp" for number in (1, 2))
    for left in (old, new):
        left.write_bytes(b"half of it")
    os.utime(old, (0, 0))
    write_shards(samples(1), tmp_path, 1, "a")
    assert not old.exists() and new.exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("ending", ["pickle", "pyd", "pth", "extra.pkl", "pkl.gz"])
def test_pickles_are_refused_unread(shards: list[Path], tmp_path: Path, ending: str) -> None:
    bad = add(shards[0], {f"9999.{ending}": pickle.dumps(Bomb(tmp_path / "ran"))})
    with pytest.raises(DataError, match="can run code"):
        list(read_samples(bad, seed=0, epochs=1))
    assert not (tmp_path / "ran").exists()
    assert any("can run code" in fault for fault in check_shard(bad)[1])


def test_unknown_files_are_not_looked_at(shards: list[Path]) -> None:
    files = {"9999.png": png(), "9999.txt": b"red", "9999.npy": b"nonsense", "9999.cls": b"x"}
    read = list(read_samples(add(shards[0], files), seed=0, shuffle=False, epochs=1))
    assert read[-1].caption == "red"
    assert read[-1].facts == {}


def test_transparent_pictures_lie_on_white(shards: list[Path]) -> None:
    files = {"9999.png": png(mode="RGBA", colour=(0, 0, 0, 0)), "9999.txt": b"nothing"}
    image = list(read_samples(add(shards[0], files), seed=0, shuffle=False, epochs=1))[-1].image
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)


FAULTS = {
    "torn png": {"9999.png": png(64)[:60], "9999.txt": b"red"},
    "wrong format": {"9999.webp": png(), "9999.txt": b"red"},
    "no caption": {"9999.png": png()},
    "no picture": {"9999.txt": b"red"},
    "no utf-8": {"9999.png": png(), "9999.txt": b"\xff\xfe"},
    "no json": {"9999.png": png(), "9999.txt": b"red", "9999.json": b"{"},
    "no object": {"9999.png": png(), "9999.txt": b"red", "9999.json": b"[]"},
}


@pytest.mark.parametrize("files", FAULTS.values(), ids=FAULTS.keys())
def test_bad_samples_are_named_and_counted(
    shards: list[Path], caplog: pytest.LogCaptureFixture, files: dict[str, bytes]
) -> None:
    bad = add(shards[0], files)
    with pytest.raises(DataError, match="1 bad samples among 11"):
        list(read_samples(bad, seed=0, shuffle=False, epochs=1))
    assert "sample '9999'" in caplog.text
    good, faults = check_shard(bad)
    assert good == 10
    assert "9999" in faults[0]


def test_one_bad_sample_in_two_hundred_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    many = [*samples(199), {"__key__": "9999", "png": b"torn", "txt": "a torn picture"}]
    path = write_shards(many, tmp_path, 200, "some")
    assert len(list(read_samples(path, seed=0, epochs=1))) == 199
    assert "9999" in caplog.text


@pytest.mark.parametrize("keep", [0, 100, 700, 1536, 9000])
def test_torn_shards_are_refused(shards: list[Path], keep: int) -> None:
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:keep])
    with pytest.raises(DataError, match=r"shapes-00001\.tar: torn"):
        list(read_samples(shards, seed=0, epochs=1))


ASKED = ("--count", 25, "--shard-size", 10, "--resolution", 16, "--output")


def test_script_writes_the_same_with_any_number_of_workers(prepare: Callable[..., None], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    prepare(*ASKED, one, "--workers", 1)
    write_shards(samples(10), two, 10, "shapes")
    (two / "dataset.json").write_bytes((one / "dataset.json").read_bytes())
    command = [sys.executable, SCRIPT, *ASKED, two, "--workers", 2, "--resume"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    for path in find_shards(one):
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_script_verifies(prepare: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(*ASKED, tmp_path, "--workers", 1)
    prepare("--verify", tmp_path)
    assert "25 samples in 3 shards, all good" in capsys.readouterr().out
    (tmp_path / "shapes-00002.tar").unlink()
    with pytest.raises(DataError, match="1 faults"):
        prepare("--verify", tmp_path)
    assert "got 20 good samples, expected 25" in capsys.readouterr().out


def test_script_refuses_to_mix(prepare: Callable[..., None], tmp_path: Path) -> None:
    prepare(*ASKED, tmp_path, "--workers", 1)
    with pytest.raises(DataError, match="--resume"):
        prepare(*ASKED, tmp_path)
    with pytest.raises(SettingError, match="begun with seed 0"):
        prepare(*ASKED, tmp_path, "--seed", 1, "--resume")
    with pytest.raises(SettingError, match="--count"):
        prepare("--count", 0, "--output", tmp_path)
