"""Cached latents are what the model makes of the pictures, whichever rank writes them, and are refused for others."""

import itertools
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import SCRIPTS, tiny_model

from ldm.bundle import Bundle
from ldm.data.latents import LatentShards, MadeFrom, weights_digest
from ldm.data.settings import LatentsConfig
from ldm.data.shapes import shard_sample
from ldm.data.shards import read_samples, write_shards
from ldm.data.transforms import fit
from ldm.errors import DataError, MachineError, SettingError
from ldm.images import to_tensor
from ldm.machine import find_device


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    write_shards([shard_sample(index, 0, 32) for index in range(7)], tmp_path / "pictures", 3, "shapes")
    return tmp_path / "pictures"


@pytest.fixture
def cache(raising: Callable[[str], Callable[..., None]], tiny_folder: Path, pictures: Path) -> Callable[..., None]:
    """scripts/cache_latents.py's main with the tiny model, called with these flags besides."""
    given = ("--model", tiny_folder, "--data", pictures, "--side", 16, "--batch-size", 2, "--device", "cpu")
    return partial(raising("cache_latents.py"), *given)


def of(bundle: Bundle, side: int = 16) -> MadeFrom:
    digests = (
        weights_digest(part.state_dict(), config.model_dump_json())  # type: ignore[attr-defined]  # parts are modules
        for part, config in ((bundle.autoencoder, bundle.config.autoencoder), (bundle.text, bundle.config.text))
    )
    return MadeFrom(*digests, side)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def test_latents_are_what_the_model_makes_of_the_pictures(
    cache: Callable[..., None], pictures: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    cache("--output", tmp_path / "latents")
    source = LatentShards(LatentsConfig(shards=str(tmp_path / "latents"), batch_size=7), of(tiny_bundle))
    batch = next(source.batches())
    samples = list(read_samples(pictures, seed=0, shuffle=False, epochs=1))
    for key, mean, std, states in zip(batch.keys, batch.mean, batch.std, batch.text, strict=True):
        sample = samples[int(key)]
        with torch.inference_mode():
            posterior = tiny_bundle.autoencoder.encode(to_tensor(fit(sample.image, (16, 16)))[None])
            text = tiny_bundle.text.encode([sample.caption]).tokens[0]
        torch.testing.assert_close(mean.float(), posterior.mean[0], atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(std.float(), posterior.std[0], atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(states.float(), text, atol=5e-3, rtol=5e-3)
    null = tiny_bundle.text.encode([""]).tokens[0]
    torch.testing.assert_close(torch.from_numpy(source.null).float(), null.detach(), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_are_of_their_model_in_whatever_it_computes(
    raising: Callable[[str], Callable[..., None]], pictures: Path, tmp_path: Path, dtype: str
) -> None:
    """Also where the weights lie in fp16, as those of a bundle do, and not in what they were trained."""
    trained = tiny_model()
    given = ("--model", trained.save(tmp_path / "model"), "--data", pictures, "--side", 16, "--device", "cpu")
    raising("cache_latents.py")(*given, "--output", tmp_path / "latents", "--dtype", dtype)
    assert len(LatentShards(LatentsConfig(shards=str(tmp_path / "latents"), batch_size=7), of(trained))) == 7


def test_ranks_share_the_work_and_missing_shards_are_made_again(cache: Callable[..., None], tmp_path: Path) -> None:
    cache("--output", tmp_path / "one")
    for rank in (1, 0):
        cache("--output", tmp_path / "two", "--rank", rank, "--world-size", 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(contents(tmp_path / "one")) == 5
    (tmp_path / "two" / "latents-00001.tar").unlink()
    untouched = (tmp_path / "two" / "latents-00000.tar").stat().st_mtime_ns
    cache("--output", tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (tmp_path / "two" / "latents-00000.tar").stat().st_mtime_ns == untouched


def test_latents_of_something_else_are_not_mixed_in(
    cache: Callable[..., None], pictures: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    cache("--output", tmp_path / "latents")
    with pytest.raises(DataError, match="made from side 16, expected 32"):
        cache("--output", tmp_path / "latents", "--side", 32)
    (pictures / "shapes-00002.tar").unlink()
    with pytest.raises(DataError, match="latents of other pictures"):
        cache("--output", tmp_path / "latents")
    with torch.no_grad():
        other = MadeFrom("0" * 64, of(tiny_bundle).text, 16)
    with pytest.raises(DataError, match="made from autoencoder"):
        LatentShards(LatentsConfig(shards=str(tmp_path / "latents"), batch_size=1), other)


def test_captions_can_be_kept_without_states(cache: Callable[..., None], tiny_bundle: Bundle, tmp_path: Path) -> None:
    cache("--output", tmp_path / "latents", "--no-text", "--bucket-step", 8)
    made_from = MadeFrom(of(tiny_bundle).autoencoder, "", 16, "8 2")
    source = LatentShards(LatentsConfig(shards=str(tmp_path / "latents"), batch_size=7), made_from)
    assert all(batch.text is None for batch in itertools.islice(source.batches(), 2))


@pytest.fixture
def wordless(tmp_path: Path) -> Path:
    """A hundred pictures in two shards, one of which has no caption; it alone is not too many."""
    samples = [shard_sample(index, 0, 32) for index in range(100)]
    samples[7] = {**samples[7], "txt": " \n", "json": {}}
    write_shards(samples, tmp_path / "wordless", 50, "shapes")
    return tmp_path / "wordless"


def test_pictures_without_words_are_left_out_unless_they_are_wanted(
    cache: Callable[..., None], wordless: Path, tiny_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "latents"
    cache("--data", wordless, "--output", out, "--batch-size", 16)
    assert len(LatentShards(LatentsConfig(shards=str(out), batch_size=1), of(tiny_bundle))) == 99
    assert [record.getMessage() for record in caplog.records] == [
        f"{wordless}/shapes-00000.tar: sample '00000007': got an empty caption, expected words; left out"
    ]
    with pytest.raises(DataError, match="latents of other pictures"):
        cache("--data", wordless, "--output", out, "--empty-captions")
    cache("--data", wordless, "--output", tmp_path / "all", "--batch-size", 16, "--empty-captions")
    source = LatentShards(LatentsConfig(shards=str(tmp_path / "all"), batch_size=100), of(tiny_bundle))
    batch = next(source.batches())
    assert batch.text is not None and len(source) == 100
    assert torch.equal(batch.text[batch.keys.index("00000007")], torch.from_numpy(source.null))


def test_a_set_that_was_refused_is_refused_again(cache: Callable[..., None], wordless: Path, tmp_path: Path) -> None:
    (wordless / "shapes-00001.tar").unlink()  # one of fifty is too many
    for _ in range(2):
        with pytest.raises(DataError, match=r"1 bad samples among 50 \(1 empty caption\)"):
            cache("--data", wordless, "--output", tmp_path / "latents", "--batch-size", 16)
    assert len(list((tmp_path / "latents").glob("*.tar"))) == 1
    (kept,) = (tmp_path / "latents").glob(".*.counts.json")
    kept.write_text("[")
    with pytest.raises(DataError, match=r"counts\.json: no counts, expected those of its shard; delete both"):
        cache("--data", wordless, "--output", tmp_path / "latents")


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own_gpu = runpy.run_path(str(SCRIPTS / "cache_latents.py"))["own_gpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_gpu(find_device("auto")) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name, found in (("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        assert own_gpu(find_device(name)) == torch.device(found)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MachineError, match="LOCAL_RANK: got 2, 2 CUDA devices are here; start 2 processes"):
        own_gpu(find_device("cuda"))


def test_the_device_of_the_process_is_the_one_that_computes(
    cache: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")

    def load(_: str, device: str, __: torch.dtype) -> Bundle:
        raise LookupError(device)

    monkeypatch.setattr(Bundle, "load", load)
    with pytest.raises(LookupError, match="cuda:1"):
        cache("--output", tmp_path / "latents", "--device", "cuda")


def test_numbers_that_make_no_sense_are_refused(cache: Callable[..., None], tmp_path: Path) -> None:
    for flags in (("--side", 0), ("--side", 12), ("--rank", 2), ("--max-aspect", 0), ("--batch-size", 0)):
        with pytest.raises(SettingError, match=str(flags[0]).strip("-")[:4]):
            cache("--output", tmp_path / "latents", *flags)
    assert not (tmp_path / "latents").exists()
