"""Streaming: an endless, deterministic stream that the readers share, and that ends with words when it cannot go on."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from ldm.data.buckets import BucketConfig
from ldm.data.pictures import PictureBatch
from ldm.data.settings import PicturesConfig
from ldm.data.shapes import shard_sample
from ldm.data.shards import write_shards
from ldm.data.source import open_pictures
from ldm.data.streaming import StreamedShards, stream_addresses
from ldm.data.transforms import PictureConfig
from ldm.errors import DataError, MachineError, SettingError

SAMPLES = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "shards"
    write_shards([shard_sample(index, seed=0, resolution=16) for index in range(SAMPLES)], made, 5, "shapes")
    return made


def config(shards: object, **changes: object) -> PicturesConfig:
    settings = {"mode": "streaming", "batch_size": 4, "pictures": PictureConfig(side=8), "shuffle_buffer": 8}
    return PicturesConfig.model_validate({**settings, "shards": str(shards), **changes})


def taken(settings: PicturesConfig, steps: int, start: int = 0, **how: int) -> list[PictureBatch]:
    return list(itertools.islice(StreamedShards(settings).batches(start, **how), steps))


def keys(batches: list[PictureBatch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_deterministic_and_endless(folder: Path, workers: int) -> None:
    one, other = (taken(config(folder), 12, workers=workers) for _ in range(2))
    assert keys(one) == keys(other) and [batch.step for batch in one] == list(range(12))
    assert all(torch.equal(a.images, b.images) for a, b in zip(one, other, strict=True))
    assert keys(one) != keys(taken(config(folder, seed=1), 12, workers=workers))
    assert keys(one)[:16] != keys(taken(config(folder), 4, start=4, workers=workers))  # fresh data after a stop


def test_all_samples_come_equally_often(folder: Path) -> None:
    counts = Counter(keys(taken(config(folder, shuffle_buffer=1), 10)))  # 40 samples are two rounds
    assert set(counts.values()) == {2} and len(counts) == SAMPLES


def test_readers_share_the_shards_of_a_round(folder: Path) -> None:
    parts = [taken(config(folder, batch_size=10, shuffle_buffer=1), 2, rank=rank, world_size=2) for rank in range(2)]
    assert all(len(batch) == 5 for part in parts for batch in part)
    assert sorted(keys(parts[0]) + keys(parts[1])) == [f"{index:08d}" for index in range(SAMPLES)]


def test_fewer_shards_than_readers_are_refused_with_the_numbers(folder: Path) -> None:
    with pytest.raises(SettingError, match=r"4 shards for 2 processes × 3 workers = 6 readers.*data\.workers=2\)"):
        StreamedShards(config(folder)).batches(world_size=2, workers=3)
    with pytest.raises(SettingError, match="use fewer processes"):
        StreamedShards(config(folder, batch_size=8)).batches(world_size=8)
    with pytest.raises(SettingError, match="cannot be shared by 3"):
        StreamedShards(config(folder)).batches(world_size=3)


def test_batches_of_buckets_have_one_size(folder: Path) -> None:
    buckets = config(folder, pictures=PictureConfig(side=16), buckets=BucketConfig(step=8))
    assert {batch.images.shape for batch in taken(buckets, 4)} == {(4, 3, 16, 16)}


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_counted_and_a_torn_shard_goes_on_with_the_next(folder: Path, workers: int) -> None:
    first = sorted(folder.glob("*.tar"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[: whole.index(b"00000003.png") + 600])
    source = StreamedShards(config(folder, max_bad_fraction=0.5))
    found = set(keys(list(itertools.islice(source.batches(workers=workers), 12))))
    assert {"00000000", "00000001", "00000002", "00000019"} <= found and not {"00000003", "00000004"} & found
    assert source.tally.counts["torn shard"] >= 1


def test_a_reader_that_is_dealt_an_empty_shard_waits_for_the_next_round(folder: Path) -> None:
    paths = sorted(folder.glob("*.tar"))
    paths[0].write_bytes(b"")
    for rank in range(len(paths)):
        source = StreamedShards(config(folder, batch_size=len(paths), max_bad_fraction=1.0))
        assert len(list(itertools.islice(source.batches(rank=rank, world_size=len(paths)), 60))) == 60


@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", bytes(range(256)) * 40], ids=["0", "html", "noise"]
)
def test_only_bad_shards_end_at_once(tmp_path: Path, content: bytes) -> None:
    for number in range(4):
        (tmp_path / f"{number}.tar").write_bytes(content)
    began = time.monotonic()
    for workers in (0, 1):
        with pytest.raises(DataError, match="3 bad shards in a row"):
            taken(config(tmp_path, max_bad_fraction=1.0), 1, workers=workers)
    assert time.monotonic() - began < 30


def test_empty_shards_do_not_hang(tmp_path: Path) -> None:
    write_shards([{"__key__": "0", "npy": b""}], tmp_path, 1, "a")
    (tmp_path / "a-00000.tar").write_bytes(bytes(10240))
    with pytest.raises(DataError, match="no sample in any shard"):
        taken(config(tmp_path), 1)


def test_addresses_that_run_commands_or_nobody_knows_are_refused(folder: Path) -> None:
    with pytest.raises(SettingError, match="never run"):
        stream_addresses("pipe:touch ran")
    with pytest.raises(SettingError, match=r"got smb://"):
        stream_addresses("smb://host/a.tar")
    with pytest.raises(DataError, match="local and remote"):
        stream_addresses((str(folder), "https://host/a.tar"))
    for nothing in (str(folder / "x*.tar"), str(folder / "{5..6}.tar"), ()):
        with pytest.raises(DataError, match="expected"):
            stream_addresses(nothing)
    assert stream_addresses("https://host/{00..02}.tar") == [f"https://host/0{i}.tar" for i in range(3)]


def test_remote_shards_are_streamed(folder: Path) -> None:
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/shapes-{{00000..00003}}.tar"
        batches = taken(config(address, shuffle_buffer=1), 5)
        with pytest.raises(DataError, match="3 bad shards in a row"):
            taken(config(address.replace("shapes", "gone"), max_bad_fraction=1.0), 1)
        server.shutdown()
    assert sorted(keys(batches)) == [f"{index:08d}" for index in range(SAMPLES)]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_the_config_says_which_way_to_read(folder: Path) -> None:
    assert isinstance(open_pictures(config(folder)), StreamedShards)
    indexed = open_pictures(config(folder, mode="indexed"))
    assert not isinstance(indexed, StreamedShards) and len(next(indexed.batches())) == 4


# Workers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["indexed", "streaming"])
def test_a_killed_worker_is_said_and_nothing_hangs(folder: Path, mode: str) -> None:
    batches = open_pictures(config(folder, mode=mode)).batches(workers=2)
    next(batches)
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    for child in children:  # and nothing is raised here, in the middle of other work
        child.join(10)
        assert child.exitcode == -signal.SIGKILL
    with pytest.raises(MachineError, match="a data worker died"):
        list(itertools.islice(batches, 10))
    assert multiprocessing.active_children() == []


def test_workers_leave_signals_to_their_parent(folder: Path) -> None:
    batches = open_pictures(config(folder, mode="indexed")).batches(workers=1)
    next(batches)
    (child,) = multiprocessing.active_children()
    assert child.pid is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(child.pid, number)
    assert [next(batches).step for _ in range(5)] == [1, 2, 3, 4, 5]
    batches.close()
    assert multiprocessing.active_children() == []


def test_a_stalled_reader_ends_in_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stall(*_: object) -> None:
        time.sleep(600)

    monkeypatch.setattr("ldm.data.streaming.opened", stall)
    began = time.monotonic()
    with pytest.raises(DataError, match="no batch in 1 s"):
        taken(config(folder, timeout_s=1), 1, workers=1)
    assert time.monotonic() - began < 30 and multiprocessing.active_children() == []
