"""The weights that ship are whole, small enough, and draw what they are asked for."""

from pathlib import Path

import numpy as np
import pytest

from ldm.bundle import Bundle, read_config, verify
from ldm.evaluation.scores import score_shapes
from ldm.formats.finding import DEFAULT, FOLDER, SHAPES, bundled_names, find
from ldm.formats.manifest import read_manifest
from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.pipeline import TextToImage
from ldm.request import GenerationRequest

PROMPTS = ("a red circle", "a blue square", "a green triangle above a yellow circle", "a large purple circle")


@pytest.fixture(scope="module", params=[DEFAULT, SHAPES])
def shipped(request: pytest.FixtureRequest) -> Bundle:
    return Bundle.load(request.param)


@pytest.mark.parametrize("name", bundled_names())
def test_bundle_is_whole_and_at_most_45_megabytes(name: str) -> None:
    assert len(verify(find(name))) == 64
    assert sum(path.stat().st_size for path in (FOLDER / name).iterdir()) <= 45e6


@pytest.mark.parametrize("name", bundled_names())
def test_bundle_names_prompts_to_begin_with(name: str) -> None:
    offered = read_config(find(name)).examples
    assert offered and all(offered)


def test_default_bundle_is_256_pixels_at_factor_8_with_a_preview() -> None:
    config = read_config(find(DEFAULT))
    assert (config.sampling.width, config.sampling.height, config.autoencoder.factor) == (256, 256, 8)
    assert isinstance(config.autoencoder, AutoencoderConfig) and config.autoencoder.preview is not None


def test_most_of_a_few_prompts_are_drawn_right(shipped: Bundle) -> None:
    engine = TextToImage(shipped)
    request = GenerationRequest(prompt="any", steps=10, batch_size=4)
    images = engine.draw(PROMPTS, [11, 12, 13, 14], request)
    assert score_shapes(PROMPTS, images).colour_and_shape.right >= 2


def test_few_step_bundle_is_the_default_one_but_for_its_unet_and_draws_what_it_is_asked_for() -> None:
    name = f"{DEFAULT}-lcm"
    assert read_manifest(find(name)).shared == {"autoencoder": DEFAULT, "text": DEFAULT}
    bundle = Bundle.load(name)
    own = bundle.config.sampling
    assert (own.sampler, own.steps, own.guidance_scale) == ("lcm", 4, 1.0)
    images = TextToImage(bundle).draw(PROMPTS, [11, 12, 13, 14], GenerationRequest(prompt="any", batch_size=4))
    assert score_shapes(PROMPTS, images).colour_and_shape.right >= 3


def test_few_step_bundle_is_as_sharp_as_the_default_one() -> None:
    """Undistilled, four looks without guidance leave half of a fox's edges."""
    prompts = ["a flat emoji of a fox on a yellow background", "a cartoon emoji of a tulip"]

    def edges(name: str) -> np.ndarray:
        drawn = TextToImage(Bundle.load(name)).draw(prompts, [12, 13], GenerationRequest(prompt="any", batch_size=2))
        pixels = np.stack([np.asarray(image, dtype=float) for image in drawn])
        return sum(np.abs(np.diff(pixels, axis=axis)).mean((1, 2, 3)) for axis in (1, 2))

    assert (edges(f"{DEFAULT}-lcm") > 0.75 * edges(DEFAULT)).all()


def test_default_bundle_draws_a_red_apple_on_the_ground_that_is_asked_for() -> None:
    grounds = {"": (255, 255, 255), " on a black background": (0, 0, 0)}
    prompts = [f"a 3D emoji of a red apple{ground}" for ground in grounds]
    engine = TextToImage(Bundle.load())
    images = engine.draw(prompts, [1, 1], GenerationRequest(prompt="any", steps=10, batch_size=2))
    for image, ground in zip(images, grounds.values(), strict=True):
        pixels = np.asarray(image, dtype=float)
        red, green, blue = pixels[96:192, 96:160].mean((0, 1))
        assert red > 150 and max(green, blue) < red / 2
        assert np.abs(pixels[:8, -8:].mean((0, 1)) - ground).max() < 40


def test_preview_has_the_colours_of_the_picture(shipped: Bundle) -> None:
    engine = TextToImage(shipped)
    request = engine.ready(GenerationRequest(prompt="a red circle", steps=6, seed=3))
    *_, last = engine.stream(request)
    (picture,) = engine.images(request, last.x)
    small = np.asarray(picture.image.resize((32, 32)), dtype=float)
    assert np.abs(small - np.asarray(engine.preview(last), dtype=float)).mean() < 30


@pytest.mark.parametrize("sparing", [False, True])
def test_a_decoder_that_works_in_bands_is_not_compiled(tiny_folder: Path, sparing: bool) -> None:
    bundle = Bundle.load(str(tiny_folder))
    assert isinstance(bundle.autoencoder, KLAutoencoder)
    if sparing:
        bundle.autoencoder.spare_memory()
    bundle.compile()
    compiled = [network._compiled_call_impl is not None for network in (bundle.unet, bundle.autoencoder.decoder)]
    assert compiled == [True, not sparing]
