"""Two sets in one stream of batches, and pictures that stay in memory: a function of (seed, step) either way."""

import io
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ldm.data import resident as resident_pictures
from ldm.data.captions import CaptionConfig
from ldm.data.indexed import IndexedShards
from ldm.data.order import Mixture
from ldm.data.pictures import PictureBatch
from ldm.data.resident import ResidentShards
from ldm.data.settings import MixConfig, PicturesConfig
from ldm.data.shards import write_shards
from ldm.data.transforms import PictureConfig
from ldm.errors import DataError, SettingError

FIRST, SECOND, BATCH = 70, 9, 8
CPU = torch.device("cpu")


def sample(kind: str, number: int) -> dict[str, object]:
    """A disc on white that lies a little more to the right for each number."""
    image = Image.new("RGB", (20, 20), "white")
    ImageDraw.Draw(image).ellipse([3 + number % 5, 4, 13 + number % 5, 14], fill=(10 * (number % 20), 40, 90))
    file = io.BytesIO()
    image.save(file, "PNG")
    facts = {"captions": [f"{kind} {number}, round", f"a disc of {kind}"], "source": kind}
    return {"__key__": f"{kind}-{number}", "png": file.getvalue(), "txt": f"{kind} {number:03d}", "json": facts}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sets")
    for kind, count in (("main", FIRST), ("other", SECOND)):
        write_shards([sample(kind, number) for number in range(count)], root / kind, 40, kind)
    return root / "main", root / "other"


def config(folders: tuple[Path, Path], share: float = 0.4, **changes: object) -> PicturesConfig:
    settings: dict[str, object] = {
        "shards": str(folders[0]),
        "mix": MixConfig(shards=str(folders[1]), share=share),
        "batch_size": BATCH,
        "seed": 5,
        "pictures": PictureConfig(side=16, mirror=0.5, grounds=0.6),
        "captions": CaptionConfig(choice="any", dropout=0.1),
    }
    return PicturesConfig.model_validate({**settings, **changes})


def taken(source: IndexedShards | ResidentShards, steps: int, start: int = 0, **how: int) -> list[PictureBatch]:
    return list(itertools.islice(source.batches(start, **how), steps))


def same(one: list[PictureBatch], other: list[PictureBatch]) -> bool:
    return all(
        a.step == b.step
        and (a.keys, a.captions, a.facts) == (b.keys, b.captions, b.facts)
        and torch.equal(a.images, b.images)
        for a, b in zip(one, other, strict=True)
    )


def is_other(batch: PictureBatch) -> list[bool]:
    return [key.startswith("other") for key in batch.keys]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.37, 0.5, 1.0])
def test_the_second_set_has_its_share_of_every_stretch(share: float) -> None:
    plan = Mixture(FIRST, SECOND, share, BATCH, seed=1)
    places = np.concatenate([plan.batch(step).samples for step in range(200)]) >= FIRST
    assert set(places) <= {False, True}
    for length in (10, 100, 1000):
        counts = np.convolve(places, np.ones(length), "valid")
        assert np.abs(counts - share * length).max() <= 1.0 + 1e-6


def test_each_set_goes_round_in_an_order_of_its_own() -> None:
    plan = Mixture(FIRST, SECOND, 0.3, BATCH, seed=1)
    samples = np.concatenate([plan.batch(step).samples for step in range(40)])
    first, second = samples[samples < FIRST], samples[samples >= FIRST]
    assert sorted(first[:FIRST]) == list(range(FIRST)) and sorted(first[FIRST : 2 * FIRST]) == list(range(FIRST))
    assert sorted(second[:SECOND]) == list(range(FIRST, FIRST + SECOND))
    assert first[:FIRST].tolist() != first[FIRST : 2 * FIRST].tolist()
    assert list(plan.from_on(0, FIRST + 3))[:3] == [FIRST + 3, FIRST + 4, FIRST + 5]
    assert all(sample < FIRST for sample in plan.from_on(0, 3))


def test_a_later_step_and_other_numbers_of_processes_see_the_same(folders: tuple[Path, Path]) -> None:
    whole = taken(IndexedShards(config(folders)), 9)
    assert same(taken(IndexedShards(config(folders)), 4, start=5), whole[5:])
    for world in (2, 4):
        parts = [taken(IndexedShards(config(folders)), 9, rank=rank, world_size=world) for rank in range(world)]
        for step, batch in enumerate(whole):
            assert batch.keys == tuple(key for part in parts for key in part[step].keys)
            assert batch.captions == tuple(caption for part in parts for caption in part[step].captions)
            assert torch.equal(batch.images, torch.cat([part[step].images for part in parts]))
    shares = [sum(is_other(batch)) for batch in whole]
    assert set(shares) == {3, 4} and sum(shares) == 28  # ⌊72 · 0.4⌋


def test_only_pictures_of_the_main_set_change(folders: tuple[Path, Path]) -> None:
    batches = taken(IndexedShards(config(folders)), 30)
    words = Counter(
        (other, "background" in c) for b in batches for other, c in zip(is_other(b), b.captions, strict=True)
    )
    assert words[True, True] == 0 and words[True, False] == 96 and words[False, True] > 50
    for batch in batches:
        for other, image, caption in zip(is_other(batch), batch.images, batch.captions, strict=True):
            corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
            assert bool((corners == 1.0).all()) == (other or "background" not in caption) or not caption


@pytest.mark.parametrize("at_once", [2**23, 1])
def test_resident_pictures_are_the_same_batches(
    folders: tuple[Path, Path], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_pictures, "BYTES_AT_ONCE", at_once)
    for settings in (config(folders), config(folders, mix=None), config(folders, pictures=PictureConfig(side=8))):
        resident = ResidentShards(settings, CPU, workers=0)
        assert same(taken(resident, 12), taken(IndexedShards(settings), 12))
        assert same(taken(resident, 3, start=7, rank=1, world_size=2), taken(resident, 10, rank=1, world_size=2)[7:])


def test_captions_of_the_mix_are_not_left_out(folders: tuple[Path, Path]) -> None:
    settings = config(folders, captions=CaptionConfig(exclude=(r"(main|other) \d+",)))
    for source in (IndexedShards(settings), ResidentShards(settings, CPU, workers=0)):
        for batch in taken(source, 6):
            for other, caption in zip(is_other(batch), batch.captions, strict=True):
                assert caption.startswith("other 00") if other else "round" in caption, caption


def test_resident_pictures_may_be_decoded_by_others(folders: tuple[Path, Path]) -> None:
    assert same(taken(ResidentShards(config(folders), CPU, workers=2), 3), taken(IndexedShards(config(folders)), 3))


def test_a_bad_sample_of_the_mix_is_stood_in_for_by_its_own_set(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    torn = {**sample("other", 0), "png": b"no picture", "__key__": "other-torn"}
    write_shards([torn, *(sample("other", number) for number in range(8))], tmp_path / "torn", 9, "torn")
    settings = config((folders[0], tmp_path / "torn"), max_bad_fraction=0.5)
    for source in (IndexedShards(settings), ResidentShards(settings, CPU)):
        batches = taken(source, 20)
        assert all(sum(is_other(batch)) in (3, 4) for batch in batches)
        assert "other-torn" not in {key for batch in batches for key in batch.keys}


def test_what_cannot_be_mixed_or_kept_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="mix needs mode: indexed"):
        config(folders, mode="streaming")
    with pytest.raises(SettingError, match="resident: needs"):
        ResidentShards(config(folders, pictures=PictureConfig(side=8, crop="random")), CPU)
    with pytest.raises(DataError, match="no such shard"):
        IndexedShards(config((folders[0], Path("/nowhere"))))


def test_further_captions_are_drawn_like_the_first_and_say_the_same_ground(folders: tuple[Path, Path]) -> None:
    captions = CaptionConfig(choice="any", dropout=0.1, first=0.3)
    one, many = (config(folders, captions=captions, draws=draws) for draws in (1, 4))
    steps = taken(IndexedShards(many), 12)
    for kept, plain, alone in zip(
        taken(ResidentShards(many, CPU), 12), steps, taken(IndexedShards(one), 12), strict=True
    ):
        assert kept.captions == plain.captions == alone.captions and kept.others == plain.others
        assert alone.others == ((),) * BATCH
    drawn = [(caption, *more) for batch in steps for caption, more in zip(batch.captions, batch.others, strict=True)]
    assert {len(each) for each in drawn} == {4}
    for each in drawn:
        grounds = {caption.partition(" on a")[2] for caption in each if caption}
        assert len(grounds) == 1 or not any(each), each
    place = [{each[number] for each in drawn} for number in range(4)]
    assert all("" in captions and len(captions) > 20 for captions in place)
    assert sum(len(set(each)) > 1 for each in drawn) > len(drawn) / 2
