"""Runs that read shards, in their own process or by workers, resume bit for bit, twice within an epoch too."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from helpers import few
from tiny_training import SETTINGS, state_digest, trained
from torch import Tensor

from ldm.data.captions import CaptionConfig
from ldm.data.shapes import shard_sample
from ldm.data.shards import write_shards
from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.training.diffusion import DiffusionTraining, encoded_batches
from ldm.training.latents import LatentCache
from ldm.training.loop import Batches
from ldm.training.source import DataConfig, Pictures, pictures

SHORT: dict[str, Any] = {"steps": 7, "save_every": 1}
PICTURES = 22  # an epoch is two batches and three quarters of one


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data") / "shards"
    write_shards([shard_sample(index, seed=0, resolution=32) for index in range(PICTURES)], made, 5, "shapes")
    return made


def condition(captions: Sequence[str]) -> Tensor:
    """States of captions that are as good as a tower's, (captions 8 16)."""
    seeds = [int.from_bytes(caption.encode()[-7:], "big") for caption in captions]
    return torch.stack([torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def encoded(source: Pictures) -> Callable[..., Batches]:
    """What stands for `latent_batches`: pictures of shards, encoded when they are used."""

    def batches(_: LatentCache, config: DiffusionTraining, seed: int) -> Batches:
        shape = tiny_training.model().autoencoder
        assert isinstance(shape, AutoencoderConfig)
        return encoded_batches(source, config, KLAutoencoder(shape), condition, torch.device("cpu"))

    return batches


def digest(kind: str, folder: Path, until: int | None = None) -> str:
    """Train, leaving off after step `until` as a killed process would; the digest of the newest state."""
    for report in trained(kind, folder, **SHORT):
        if report.step == until:
            break
    return state_digest(folder)


@pytest.mark.parametrize("kind", ["vae", "clip", "unet", "lora"])
@pytest.mark.parametrize("readers", few([0, 2], 2))
def test_what_reads_shards_resumes_bit_for_bit(
    kind: str, readers: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(workers: int) -> None:
        data = DataConfig(
            shards=str(shards), workers=workers, crop="random", mirror=0.5, captions=CaptionConfig(choice="any")
        )
        source = pictures(data, SETTINGS["batch_size"], 32, seed=3)
        monkeypatch.setattr("tiny_training.pictures", source)
        monkeypatch.setattr("tiny_training.latent_batches", encoded(source))

    reading(0)
    whole = digest(kind, tmp_path / "whole")
    reading(readers)
    # Twice in the second epoch, which begins within step 3 and ends within step 6.
    for until in (4, 5):
        digest(kind, tmp_path / "parts", until)
    assert digest(kind, tmp_path / "parts") == whole
