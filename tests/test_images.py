"""Pixels survive the way to tensors and files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images import grid, read_settings, save_png, to_image, to_tensor


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_level_survives_the_round_trip(mode: str) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels] * 3, axis=2) if mode == "RGB" else levels)
    tensor = to_tensor(image)
    assert tensor.min() == -1.0 and tensor.max() == 1.0
    assert np.array_equal(np.asarray(to_image(tensor)), np.asarray(image))


def test_values_are_rounded_half_up_and_clipped() -> None:
    level = torch.tensor([[[-3.0, 99.4 / 127.5 - 1, 99.6 / 127.5 - 1, 3.0]]])
    assert np.asarray(to_image(level)).tolist() == [[0, 99, 100, 255]]


def test_settings_survive_in_the_file(tmp_path: Path) -> None:
    settings = {"prompt": 'ünïcode "quotes"\n😀', "seed": 2**32 - 1, "guidance_scale": 7.5}
    save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", settings)
    save_png(Image.new("RGB", (4, 4)), tmp_path / "b.png")
    assert read_settings(tmp_path / "a.png") == settings
    assert read_settings(tmp_path / "b.png") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"], "no temporary file is left"


def test_settings_are_read_without_the_pixels(tmp_path: Path) -> None:
    path, settings = tmp_path / "a.png", {"prompt": "a red circle"}
    save_png(Image.new("RGB", (64, 64), "red"), path, settings)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"IDAT") + len("IDAT") + 1])
    assert read_settings(path) == settings


def test_a_failed_save_leaves_the_old_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (4, 4), "red"), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_png(Image.new("RGB", (4, 4)), path, {"bad": object()})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_grid_puts_pictures_in_rows() -> None:
    sheet = grid([Image.new("RGB", (2, 2), colour) for colour in ("red", "lime", "blue")], columns=2, gap=1)
    assert sheet.size == (5, 5)
    assert [sheet.getpixel(xy) for xy in ((0, 0), (3, 0), (0, 3), (2, 2))] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255),
    ]  # fmt: skip
