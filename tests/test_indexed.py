"""Indexed reading: batches follow from (seed, step) alone, each sample comes once per epoch; cached latents too."""

import io
import itertools
import json
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from ldm.data import index
from ldm.data.buckets import BucketConfig
from ldm.data.captions import CaptionConfig
from ldm.data.index import Reader, open_table, scan
from ldm.data.indexed import IndexedShards
from ldm.data.latents import LatentBatch, LatentShards, MadeFrom, describe, latent_sample, npy, weights_digest
from ldm.data.order import Permutation, Plan
from ldm.data.pictures import PictureBatch
from ldm.data.settings import LatentsConfig, PicturesConfig
from ldm.data.shapes import shard_sample
from ldm.data.shards import write_shards
from ldm.data.transforms import PictureConfig
from ldm.errors import DataError, SettingError

SAMPLES, BATCH = 22, 8
FOR_EVER = [2, 7, 5, 3, 4, 6, 8, 0, 1, 9]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "shards"
    write_shards([shard_sample(index, seed=0, resolution=16) for index in range(SAMPLES)], made, 5, "shapes")
    return made


def config(folder: Path, **changes: object) -> PicturesConfig:
    settings: dict[str, object] = {"batch_size": BATCH, "pictures": PictureConfig(side=8, crop="random", mirror=0.5)}
    captions = CaptionConfig(dropout=0.3)
    return PicturesConfig.model_validate({**settings, "shards": str(folder), "captions": captions, **changes})


def taken(source: IndexedShards, steps: int, start: int = 0, **how: int) -> list[PictureBatch]:
    return list(itertools.islice(source.batches(start, **how), steps))


def same(one: list[PictureBatch], other: list[PictureBatch]) -> bool:
    return all(
        a.step == b.step and a.keys == b.keys and a.captions == b.captions and torch.equal(a.images, b.images)
        for a, b in zip(one, other, strict=True)
    )


# Order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
def test_a_permutation_is_one(n: int) -> None:
    orders = [Permutation(n, key)(np.arange(n)) for key in ("a", "b")]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 8 or not np.array_equal(*orders)


def test_a_permutation_is_the_same_for_ever() -> None:
    assert Permutation(10, "a")(np.arange(10)).tolist() == FOR_EVER


def test_a_permutation_favours_no_place() -> None:
    places = np.array([Permutation(10, str(key))(np.arange(10)) for key in range(2000)])
    counts = np.stack([np.bincount(places[:, i], minlength=10) for i in range(10)])
    assert ((counts - 200) ** 2 / 200).sum() < 130  # chi square with 81 degrees of freedom: 130 at p = 4e-4
    ups = (np.diff(places, axis=1) > 0).mean()
    assert abs(ups - 0.5) < 0.02


def test_each_sample_comes_once_per_epoch() -> None:
    plan = Plan(SAMPLES, BATCH, seed=3)
    samples = np.concatenate([plan.batch(step).samples for step in range(11)])  # 88 places are four epochs
    epochs = [samples[i : i + SAMPLES] for i in range(0, 88, SAMPLES)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = np.concatenate([Plan(SAMPLES, BATCH, seed=4).batch(step).samples for step in range(11)])
    assert not np.array_equal(samples, other)


def test_the_rest_of_an_epoch_counts_for_the_next() -> None:
    plan = Plan(SAMPLES, BATCH, seed=3)
    assert [plan.epoch(step) for step in range(12)] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]  # step 2 is 16 to 23 of 22


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_same_global_batches(world_size: int) -> None:
    plan = Plan(SAMPLES, BATCH, seed=0)
    for step in range(5):
        parts = [plan.part(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate([part.samples for part in parts]), plan.batch(step).samples)
        assert [place for part in parts for place, _ in part.places()] == list(range(BATCH))


def test_a_batch_that_cannot_be_shared_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(SettingError, match="batch_size: 8 cannot be shared by 3"):
        IndexedShards(config(folder)).batches(0, rank=0, world_size=3)


def test_buckets_do_not_mix_and_nothing_is_dropped() -> None:
    buckets = np.array([0] * 11 + [1] * 30 + [3] * 3)  # bucket 3 is smaller than a batch, bucket 2 is empty
    plan = Plan(len(buckets), 8, seed=0, buckets=buckets)
    counts: Counter[int] = Counter()
    labels = []
    for step in range(8 * 44 // 8):  # eight epochs of 44 samples
        part = plan.batch(step)
        assert set(buckets[part.samples]) == {part.bucket} and len(part.samples) == 8
        given = [sum(epoch * size // 8 for size in (11, 30, 3)) for epoch in range(10)]  # before each epoch
        assert given[plan.epoch(step)] <= step < given[plan.epoch(step) + 1]
        labels.append(part.bucket)
        counts.update(part.samples.tolist())
    for bucket, size in ((0, 11), (1, 30), (3, 3)):
        members = np.flatnonzero(buckets == bucket).tolist()
        assert labels.count(bucket) == 8 * size // 8
        assert {counts[sample] for sample in members} == {8}, bucket
    assert labels[: len(labels) // 2] != sorted(labels[: len(labels) // 2])


# Batches -------------------------------------------------------------------------------------------------------


def test_workers_and_ranks_change_nothing(folder: Path) -> None:
    alone = taken(IndexedShards(config(folder)), 6)
    assert [batch.keys for batch in alone] == [IndexedShards(config(folder)).keys(step) for step in range(6)]
    assert same(alone, taken(IndexedShards(config(folder)), 6, workers=2))
    ranks = [taken(IndexedShards(config(folder)), 6, rank=rank, world_size=2, workers=rank) for rank in range(2)]
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert whole.keys == first.keys + second.keys and whole.captions == first.captions + second.captions
        assert torch.equal(whole.images, torch.cat([first.images, second.images]))
        assert (first.first, second.first) == (0, 4)
    assert "" in {caption for batch in alone for caption in batch.captions}


def test_reading_goes_on_at_any_step(folder: Path) -> None:
    whole = taken(IndexedShards(config(folder)), 7)
    for start in (1, 3, 5):
        assert same(whole[start:], taken(IndexedShards(config(folder)), 7 - start, start=start))


def test_two_epochs_and_two_seeds_differ(folder: Path) -> None:
    source = IndexedShards(config(folder))
    keys = [key for step in range(11) for key in source.keys(step)]
    assert keys[:SAMPLES] != keys[SAMPLES : 2 * SAMPLES] and set(keys[:SAMPLES]) == set(keys[SAMPLES : 2 * SAMPLES])
    assert source.keys(0) != IndexedShards(config(folder, seed=1)).keys(0)


def test_batches_of_buckets_have_one_size(tmp_path: Path) -> None:
    def sample(number: int) -> dict[str, object]:
        buffer = io.BytesIO()
        Image.new("RGB", ((64, 32), (32, 64), (48, 48))[number % 3]).save(buffer, "PNG")
        return {"__key__": f"{number:03d}", "png": buffer.getvalue(), "txt": "a"}

    write_shards(map(sample, range(12)), tmp_path, 12, "a")
    buckets = BucketConfig(step=16)
    source = IndexedShards(config(tmp_path, batch_size=2, pictures=PictureConfig(side=48), buckets=buckets))
    sizes = Counter(tuple(batch.images.shape[2:]) for batch in taken(source, 6))
    assert sizes == {(48, 48): 2, (64, 32): 2, (32, 64): 2}


# Faults --------------------------------------------------------------------------------------------------------


def spoil(folder: Path, number: int, name: str, data: bytes) -> None:
    """Replace the content of one file in a shard by bytes of the same number."""
    path = sorted(folder.glob("*.tar"))[number]
    whole = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmember(name)
    whole[member.offset_data : member.offset_data + len(data)] = data
    path.write_bytes(whole)


def test_the_next_good_sample_stands_in_for_a_bad_one(folder: Path) -> None:
    before = taken(IndexedShards(config(folder)), 3)
    spoil(folder, 1, "00000007.png", b"no picture")
    for how in ({}, {"workers": 2}):
        source = IndexedShards(config(folder, max_bad_fraction=0.2))
        after = taken(source, 3, **how)
        swapped = [tuple("00000008" if key == "00000007" else key for key in batch.keys) for batch in before]
        assert [batch.keys for batch in after] == swapped
        assert source.tally.counts == {"torn picture": 1} and source.tally.seen == 24
        (fault,) = [fault for batch in after for fault in batch.faults]
        assert fault.where.endswith("shapes-00001.tar: sample '00000007'")


def test_too_many_bad_samples_end_the_run(folder: Path) -> None:
    spoil(folder, 0, "00000000.png", b"no picture")
    with pytest.raises(DataError, match=r"1 torn picture.*expected at most 1\.0%"):
        taken(IndexedShards(config(folder)), 4)


def test_bad_samples_side_by_side_are_each_one_bad_sample_an_epoch(tmp_path: Path) -> None:
    torn = [shard_sample(index, seed=0, resolution=16) | {"png": b"torn"} for index in range(4)]
    write_shards([*torn, *(shard_sample(index, seed=0, resolution=16) for index in range(4, 40))], tmp_path, 40, "a")
    source = IndexedShards(config(tmp_path, max_bad_fraction=0.1))  # and so many are tolerated, at epochs' borders too
    taken(source, 25)
    assert source.tally.counts == {"torn picture": 20} and source.tally.seen == 200


def test_only_bad_samples_end_the_run_with_and_without_workers(tmp_path: Path) -> None:
    write_shards([{"__key__": str(i), "png": b"torn", "txt": "a"} for i in range(3)], tmp_path, 3, "a")
    for workers in (0, 1):
        with pytest.raises(DataError, match="bad samples in a row"):
            taken(IndexedShards(config(tmp_path, max_bad_fraction=1.0)), 1, workers=workers)


# The index -----------------------------------------------------------------------------------------------------


def test_the_index_is_made_once_and_follows_the_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = IndexedShards(config(folder)).keys(0)
    monkeypatch.setattr(index, "scan", lambda *_: pytest.fail("scanned again"))
    assert IndexedShards(config(folder)).keys(0) == keys
    monkeypatch.undo()
    path = sorted(folder.glob("*.tar"))[0]
    os.utime(path, ns=(1, 1))
    assert len(list(folder.glob(".*.index.npy"))) == 5
    IndexedShards(config(folder))
    assert len(list(folder.glob(f".{path.name}.*.index.npy"))) == 1  # the one that no longer fits is gone
    elsewhere = folder.parent / "indices"
    IndexedShards(config(folder, index=elsewhere))
    assert len(list(elsewhere.iterdir())) == 5


def test_a_shard_that_changes_while_it_is_used_is_noticed(folder: Path) -> None:
    source = IndexedShards(config(folder))
    path = sorted(folder.glob("*.tar"))[0]
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(DataError, match="changed, start again"):
        taken(source, 3)


def test_few_shards_are_open_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "OPEN_AT_ONCE", 2)
    before = len(os.listdir("/proc/self/fd"))
    source = IndexedShards(config(folder))
    taken(source, 6)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    del source
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_reader_travels_without_its_open_files(folder: Path) -> None:
    reader = Reader(open_table(sorted(folder.glob("*.tar")), ("txt",)))
    text = reader.files(3)
    assert pickle.loads(pickle.dumps(reader)).files(3) == text


# Latents -------------------------------------------------------------------------------------------------------

OF = MadeFrom("autoencoder", "text", 32)


def latents(count: int, size: tuple[int, int] = (4, 4)) -> list[dict[str, object]]:
    def sample(number: int) -> dict[str, object]:
        mean, std = np.full((2, *size), number, np.float16), np.full((2, *size), number + 0.5, np.float16)
        text = np.stack([np.full((3, 5), number, np.float16), np.full((3, 5), -number, np.float16)])
        return latent_sample(f"{size[0]}-{number:03d}", mean, std, ("a", "b"), text)

    return [sample(number) for number in range(count)]


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    made = tmp_path / "latents"
    describe(made, OF, "pictures", np.full((3, 5), 1000, np.float16))
    write_shards(latents(SAMPLES), made, 5, "latents")
    return made


def test_latents_come_back_as_they_were_written(cached: Path) -> None:
    source = LatentShards(LatentsConfig(shards=str(cached), batch_size=BATCH, dropout=0.3, choice="any"), OF)
    rows = 0
    for batch in itertools.islice(source.batches(workers=0), 11):
        assert batch.text is not None and batch.mean.dtype == torch.float16
        for key, mean, std, text, dropped in zip(*batch_rows(batch), strict=True):
            number = int(key[-3:])
            assert (mean == number).all() and (std == number + 0.5).all()
            assert (text == 1000).all() if dropped else (text.abs() == number).all()
            rows += 1
    assert rows == 88


@pytest.mark.parametrize(("first", "least", "most"), [(0.0, 0.3, 0.7), (0.6, 0.65, 0.95), (1.0, 1.0, 1.0)])
def test_of_cached_captions_any_is_shown_or_the_first(cached: Path, first: float, least: float, most: float) -> None:
    source = LatentShards(LatentsConfig(shards=str(cached), batch_size=BATCH, choice="any", first=first), OF)
    texts = [text for batch in itertools.islice(source.batches(workers=0), 12) for text in batch_rows(batch)[3]]
    assert least <= sum(bool((text >= 0).all()) for text in texts) / len(texts) <= most


def batch_rows(batch: LatentBatch) -> tuple[Any, ...]:
    return batch.keys, batch.mean, batch.std, batch.text, batch.dropped.tolist()


def test_latents_are_the_same_for_ranks_and_workers(cached: Path) -> None:
    reading = LatentsConfig(shards=str(cached), batch_size=BATCH, dropout=0.3, choice="any")
    whole = list(itertools.islice(LatentShards(reading, OF).batches(2), 3))
    ranks = [itertools.islice(LatentShards(reading, OF).batches(2, r, 2, workers=1), 3) for r in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for name in ("mean", "std", "text", "dropped"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(part, name) for part in parts])), name


def test_latents_made_from_something_else_are_refused(cached: Path) -> None:
    reading = LatentsConfig(shards=str(cached), batch_size=BATCH)
    for other, name in ((MadeFrom("x", "text", 32), "autoencoder"), (MadeFrom("autoencoder", "text", 64), "side")):
        with pytest.raises(DataError, match=f"made from {name}"):
            LatentShards(reading, other)
    assert next(LatentShards(reading, MadeFrom("autoencoder", "", 32)).batches()).text is None
    with pytest.raises(DataError, match="latents of other pictures"):
        describe(cached, OF, "others", None)
    (cached / "latents.json").unlink()
    with pytest.raises(DataError, match="no such file"):
        LatentShards(reading, OF)


def test_latents_of_unlike_sizes_do_not_mix(cached: Path) -> None:
    write_shards(latents(6, (4, 8)), cached, 5, "wide")
    source = LatentShards(LatentsConfig(shards=str(cached), batch_size=2), OF)
    shapes = Counter(batch.mean.shape[1:] for batch in itertools.islice(source.batches(), 14))
    assert shapes == {(2, 4, 4): 11, (2, 4, 8): 3}


def test_a_latent_of_another_form_is_bad(cached: Path) -> None:
    spoil(cached, 0, "4-000.latent.npy", b"\x93NUMPY\x02")
    reading = LatentsConfig(shards=str(cached), batch_size=BATCH, max_bad_fraction=0.5)
    source = LatentShards(reading, OF)
    assert all("4-000" not in batch.keys for batch in itertools.islice(source.batches(), 5))
    assert source.tally.counts["latent of another form"] >= 1


def test_numpy_and_webdataset_read_the_files(cached: Path) -> None:
    array = np.arange(6, dtype=np.float16).reshape(1, 2, 3)
    assert np.array_equal(np.load(io.BytesIO(npy(array))), array)
    shard = sorted(cached.glob("*.tar"))[0].open("rb")
    with shard:
        files = webdataset.tariterators.tar_file_expander([{"url": "x", "stream": shard}])
        sample = next(webdataset.tariterators.group_by_keys(files))
    assert np.load(io.BytesIO(sample["latent.npy"])).shape == (2, 2, 4, 4)
    assert json.loads(sample["json"]) == {"captions": ["a", "b"]}


def test_a_digest_names_numbers_and_not_their_format() -> None:
    weights = {"w": torch.tensor([0.5, 1.5])}
    assert weights_digest(weights, "c") == weights_digest({"w": weights["w"].half()}, "c")
    assert weights_digest(weights, "c") != weights_digest({"w": weights["w"] * 2}, "c")
    assert weights_digest(weights, "c") != weights_digest(weights, "d")


def test_scan_reads_headers_of_any_tar(folder: Path) -> None:
    rows, faults = scan(sorted(folder.glob("*.tar"))[0], ("png", "webp"))
    assert faults == [] and len(rows) == 5
    assert (rows["spans"][:, 1] == (0, -1)).all()
