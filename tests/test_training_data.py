"""Training reads what its recipe names, pictures of all shapes among them, and goes on where it was stopped."""

import io
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Script, few
from PIL import Image
from test_distributed import launched
from tiny_training import state_digest

from ldm.data.latents import LatentBatch
from ldm.data.pictures import PictureBatch
from ldm.data.shards import write_shards
from ldm.training import record

ROOT = Path(__file__).resolve().parent.parent
SIZES = ((70, 70), (120, 72), (72, 120))
RECIPE = """
name: tiny-data
data: {shards: nowhere/*.tar}
fine_tune: true
unet_training:
  - {side: 64, steps: 4, batch_size: 4, learning_rate: 1e-3, precision: "no", save_every: 2, warmup_steps: 0}
sample_prompts: [a]
"""
AUTOENCODER = """
  steps: 1
  batch_size: 2
  learning_rate: 1e-4
  precision: "no"
  crop: 32
  sides: [64]
"""
BUCKETS = "data.buckets={step: 16, max_aspect: 2.0}"


def photos() -> Iterator[dict[str, object]]:
    """Noise of three shapes."""
    for number in range(24):
        width, height = SIZES[number % 3]
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        yield {"__key__": f"{number:03d}", "png": file.getvalue(), "txt": f"noise {number}"}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(photos(), tmp_path / "photos", 6, "photos")
    return tmp_path / "photos"


@pytest.fixture
def flags(tmp_path: Path, tiny_folder: Path, shards: Path) -> tuple[str, ...]:
    """Stage, recipe, base and data of a run; its folder and what it changes come behind them."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    given = ("unet", "--config", tmp_path / "recipe.yaml", "--base", tiny_folder, f"data.shards={shards}")
    return tuple(map(str, given))


@pytest.fixture
def latents(
    raising: Callable[[str], Callable[..., None]], tiny_folder: Path, shards: Path, tmp_path: Path
) -> Callable[..., str]:
    """Cache latents with these flags besides; the override that lets a stage read them."""

    def cached(*more: object) -> str:
        given = ("--model", tiny_folder, "--data", shards, "--side", 64, "--device", "cpu", "--output")
        raising("cache_latents.py")(*given, tmp_path / "latents", *more)
        return f"unet_training.0.latents={tmp_path / 'latents'}"

    return cached


def stopped(train: Script, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Train, and be told to stop while the second step is under way."""
    step = record.Record.step

    def signalled(self: record.Record, stage: str, report: Any) -> None:
        step(self, stage, report)
        os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(record.Record, "step", signalled)
        ended = train(*flags)
    assert ended.code == 75, ended.err


def state(run: Path) -> str:
    return state_digest(run / "checkpoints" / "unet-0")


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sizes of what the UNet is given, step by step."""
    from ldm.diffusion.denoiser import Denoiser

    found: list[tuple[int, ...]] = []
    loss = Denoiser.loss

    def noted(self: Denoiser, x0: torch.Tensor, *arguments: Any) -> torch.Tensor:
        found.append(tuple(x0.shape[2:]))
        return loss(self, x0, *arguments)

    monkeypatch.setattr(Denoiser, "loss", noted)
    return found


@pytest.mark.parametrize("kind", few(["pictures", "buckets", "latents", "latents in buckets"], "latents in buckets"))
def test_a_run_stopped_in_the_middle_ends_as_one_that_was_not(
    train: Script,
    flags: tuple[str, ...],
    latents: Callable[..., str],
    sizes: list[tuple[int, ...]],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_buckets = "buckets" in kind
    how = (BUCKETS,) if in_buckets else ()
    if "latents" in kind:
        how += (latents(*(("--bucket-step", 16) if in_buckets else ())),)
    whole = train(*flags, *how, "--run-dir", tmp_path / "whole")
    assert whole.code == 0, whole.err
    assert Counter(sizes).keys() <= ({(8, 8), (10, 6), (6, 10)} if in_buckets else {(8, 8)})
    assert len(sizes) == 4 and (len(set(sizes)) > 1) == in_buckets
    stopped(train, monkeypatch, *flags, *how, "--run-dir", str(tmp_path / "parts"))
    assert steps(tmp_path / "parts") == [1, 2]
    assert train(*flags, *how, "--run-dir", tmp_path / "parts").code == 0
    assert state(tmp_path / "parts") == state(tmp_path / "whole") and sizes[4:] == sizes[:4]


def test_a_streamed_run_goes_on_with_fresh_data(
    train: Script, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, tuple[str, ...]]] = []
    numbered = "ldm.data.streaming.StreamedShards._numbered"
    from ldm.data.streaming import StreamedShards

    real = StreamedShards._numbered

    def noted(self: StreamedShards, *arguments: Any) -> Iterator[PictureBatch]:
        for batch in real(self, *arguments):
            seen.append((batch.step, batch.keys))
            yield batch

    monkeypatch.setattr(numbered, noted)
    how = ("data.mode=streaming", "--run-dir", str(tmp_path / "run"))
    stopped(train, monkeypatch, *flags, *how)
    assert train(*flags, *how).code == 0
    assert [step for step, _ in seen] == [0, 1, 2, 3] and len({keys for _, keys in seen}) == 4
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


def test_latents_of_other_buckets_are_refused(
    train: Script, flags: tuple[str, ...], latents: Callable[..., str]
) -> None:
    cached = latents("--bucket-step", 16)
    run = ("--run-dir", str(Path(flags[2]).parent / "run"))
    refused = train(*flags, cached, *run)
    assert refused.code == 3 and "made from buckets 16 2, expected none" in refused.err


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (("data.shards=nowhere/{0..3}.tar",), 3, "no such shard"),
        (("data.shards=[]",), 3, "0 shards match"),
        (("data.shards=[{shards}, 'https://host/a.tar']", "data.mode=streaming"), 3, "local and remote shards"),
        (("data.shards=pipe:touch ran",), 2, "never run"),
        (("data.mode=streaming", "data.workers=5"), 2, "4 shards for 1 processes × 5 workers = 5 readers"),
        (("data.mode=streaming", "data.mix={shards: nowhere, share: 0.2}"), 2, "mix needs mode: indexed"),
        (("data.resident=true", "data.crop=random"), 2, "resident: needs mode indexed, crop centre"),
        (("unet_training.0.latents=nowhere/*.tar",), 3, "0 shards match"),
        ((BUCKETS.replace("16", "8"),), 2, "data.buckets.step: got 8, expected a multiple of 16"),
        ((BUCKETS.replace("16", "24"),), 2, "64 is not a multiple of the buckets' step 24"),
        ((BUCKETS, "unet_training.0.pictures=8"), 2, "pictures that are encoded once are square"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_read_are_refused_before_a_model_is_opened(
    train: Script, flags: tuple[str, ...], overrides: tuple[str, ...], code: int, words: str, tmp_path: Path
) -> None:
    shards = flags[-1].partition("=")[2]
    given = [override.replace("{shards}", shards) for override in overrides]
    is_of_data = any(override.startswith("data.shards") for override in overrides)
    base = ("--base", str(tmp_path / "no-model")) if is_of_data else ()  # which would be refused with exit code 4
    ended = train(*flags, *base, *given, "--run-dir", tmp_path / "run")
    assert ended.code == code and len(ended.errors) == 1 and words in ended.errors[0], ended.err
    assert not list((tmp_path / "run").rglob("*.safetensors")) and not Path("ran").exists()


def test_a_run_does_not_go_on_with_a_set_that_has_grown(
    train: Script, flags: tuple[str, ...], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("--run-dir", str(tmp_path / "run"))
    stopped(train, monkeypatch, *flags, *run)
    more = shards / "photos-00004.tar"
    more.write_bytes((shards / "photos-00000.tar").read_bytes())
    ended = train(*flags, *run)
    assert ended.code == 3 and "data.shards: these are not the shards that this run began with" in ended.errors[0]
    more.unlink()
    assert train(*flags, *run).code == 0


def test_cached_latents_that_were_made_anew_are_refused_once_they_were_learned_from(
    train: Script, flags: tuple[str, ...], latents: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, run = latents(), ("--run-dir", str(tmp_path / "run"))
    stopped(train, monkeypatch, *flags, cached, *run)
    next(iter((tmp_path / "latents").glob("*.tar"))).unlink()
    assert "unet_training.0.latents: these are not" in train(*flags, cached, *run).errors[0]


def test_the_same_holds_for_an_adaptation(
    train: Script, flags: tuple[str, ...], latents: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents()
    lora = f"lora_training={{side: 64, steps: 4, batch_size: 4, learning_rate: 1e-3, latents: {tmp_path / 'latents'}}}"
    given = ("lora", *flags[1:], lora, "--run-dir", str(tmp_path / "run"))
    stopped(train, monkeypatch, *given)
    next(iter((tmp_path / "latents").glob("*.tar"))).unlink()
    assert "lora_training.latents: these are not" in train(*given).errors[0]


@pytest.mark.slow
def test_pictures_are_encoded_in_parts_of_the_size_that_is_computed_at_once(
    train: Script, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm.models.autoencoder import KLAutoencoder

    encode, counts = KLAutoencoder.encode, list[int]()

    def noted(self: KLAutoencoder, images: torch.Tensor) -> Any:
        counts.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(KLAutoencoder, "encode", noted)
    assert train(*flags, "--run-dir", tmp_path / "whole").code == 0
    part = ("unet_training.0.micro_batch_size=2", "--run-dir", str(tmp_path / "parts"))
    assert train(*flags, *part).code == 0
    assert counts == [4] * 4 + [2] * 8
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    "how", few(["data.mode=indexed", "data.mode=streaming", "data.resident=true"], "data.mode=indexed")
)
def test_samples_that_are_left_out_are_in_the_status_by_reason(
    train: Script, flags: tuple[str, ...], tmp_path: Path, how: str
) -> None:
    samples = list(photos())
    samples[5]["png"] = b"no picture at all"
    samples[17]["txt"] = ""
    write_shards(iter(samples), tmp_path / "bad", 6, "bad")
    bad = (f"data.shards={tmp_path / 'bad'}", how, "data.max_bad_fraction=0.5", "unet_training.0.steps=7")
    ended = train(*flags, *bad, "--run-dir", tmp_path / "run")
    assert ended.code == 0, ended.err
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert status["state"] == "finished" and len(status["bad_samples"]) == 2
    assert all(count >= 1 for count in status["bad_samples"].values())
    assert logged[-1]["bad_samples"] == status["bad_samples"]


def test_what_the_index_left_out_is_in_the_status_too(train: Script, flags: tuple[str, ...], tmp_path: Path) -> None:
    torn = write_shards(photos(), tmp_path / "bad", 6, "bad")[1]
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    bad = (f"data.shards={tmp_path / 'bad'}", "data.max_bad_fraction=0.5")
    assert train(*flags, *bad, "--run-dir", tmp_path / "run").code == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["bad_samples"] == {"torn shard": 1}


@pytest.mark.slow
def test_settings_that_cached_latents_do_not_heed_are_said(
    train: Script, flags: tuple[str, ...], latents: Callable[..., str], tmp_path: Path
) -> None:
    idle = ("data.mirror=0.5", "data.captions={templates: ['a {caption}']}")
    ended = train(*flags, latents(), *idle, "--run-dir", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "data.mirror, data.captions.templates: no effect where cached latents are read" in ended.err
    assert "no effect" not in train(*flags, *idle, "--run-dir", tmp_path / "other").err


@pytest.mark.slow
def test_an_autoencoder_learns_from_pictures_of_all_shapes(
    train: Script, flags: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{RECIPE}autoencoder_training:{AUTOENCODER}")
    ended = train("vae", *flags[1:], BUCKETS, "--run-dir", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "psnr_db" in json.loads((tmp_path / "run" / "autoencoder.json").read_text())


def test_batches_are_pinned_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    images, rest = torch.zeros(1, 3, 2, 2), (("a",), ({},))
    assert PictureBatch(0, 0, ("a",), images, *rest).pin_memory().images.min() == 1
    batch = LatentBatch(0, 0, ("a",), images, images, images[0], torch.tensor([False])).pin_memory()
    assert batch.text is not None and min(t.min() for t in (batch.mean, batch.std, batch.text)) == 1


@pytest.mark.slow
def test_two_processes_train_in_buckets_as_one_does(
    train: Script, flags: tuple[str, ...], sizes: list[tuple[int, ...]], tmp_path: Path
) -> None:
    assert train(*flags, BUCKETS, "--run-dir", tmp_path / "one").code == 0
    assert len(set(sizes)) > 1
    script, how = str(ROOT / "scripts" / "train.py"), (BUCKETS, "--report-to", "none")
    done = launched(script, *flags, *how, "--run-dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line)["loss"] for line in (tmp_path / run / "log.jsonl").open()] for run in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-5) and len(one) == 4
