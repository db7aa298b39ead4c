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
    shown = []
    for image, words, seed in draw(engine, tmp_path, threading.Lock(), "a red circle", "", 4, 3.0, 5):
        # A path is good until the next step of the generator: the page has copied it by then.
        shown.append((Image.open(image).copy() if isinstance(image, str) else image, words, seed))
    preview, words, _ = shown[1]
    assert preview is not None and preview.size == (64, 64) and words.startswith("Step 1 of 4")
    picture, words, seed = shown[-1]
    assert "seed 5" in words and seed == 5
    (known,) = engine(GenerationRequest(prompt="a red circle", steps=4, guidance_scale=3.0, seed=5))
    assert picture is not None and picture.tobytes() == known.image.tobytes()
    (path,) = tmp_path.iterdir()
    settings = read_settings(path)
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
