"""The page draws with the same engine as the command line."""

import threading
from pathlib import Path

import pytest
from PIL import Image

from ldm.bundle import Bundle
from ldm.images import read_settings
from ldm.pipeline import TextToImage
from ldm.request import GenerationRequest

gr = pytest.importorskip("gradio")

from ldm.ui.page import draw, page  # noqa: E402


def test_a_picture_appears_by_previews_and_is_saved_with_its_settings(tiny_bundle: Bundle, tmp_path: Path) -> None:
    engine = TextToImage(tiny_bundle)
    shown = list(draw(engine, tmp_path, threading.Lock(), "a red circle", "", 4, 3.0, 5))
    preview, words, _ = shown[1]
    assert isinstance(preview, Image.Image) and preview.size == (64, 64) and words.startswith("Step 1 of 4")
    path, words, seed = shown[-1]
    assert "seed 5" in words and seed == 5
    request = GenerationRequest(prompt="a red circle", steps=4, guidance_scale=3.0, seed=5)
    (known,) = engine(request)
    with Image.open(str(path)) as saved:
        assert saved.tobytes() == known.image.tobytes()
    settings = read_settings(Path(str(path)))
    assert settings is not None and settings["prompt"] == "a red circle"


def test_bad_input_is_said_in_escaped_words(tiny_bundle: Bundle, tmp_path: Path) -> None:
    engine = TextToImage(tiny_bundle)
    with pytest.raises(gr.Error, match="prompt is empty"):
        list(draw(engine, tmp_path, threading.Lock(), " ", "", 4, 3.0, 5))
    with pytest.raises(gr.Error, match="guidance_scale"):
        list(draw(engine, tmp_path, threading.Lock(), "a", "", 4, float("nan"), 5))
    assert list(tmp_path.iterdir()) == []


def test_page_builds_and_names_its_endpoint(tiny_bundle: Bundle, tmp_path: Path) -> None:
    blocks = page(TextToImage(tiny_bundle), tmp_path)
    assert "txt2img" in str(blocks.config["dependencies"])
