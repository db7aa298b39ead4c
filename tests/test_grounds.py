"""Grounds in words: what is white around a thing is exchanged exactly, and nothing else is."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.data.grounds import COLOURS, Ground, choose_ground, colour_of, find_ground, on_ground, said
from ldm.data.order import Chance
from ldm.images import to_image, to_tensor

SIDE, FINE = 64, 16


def drawn(*discs: tuple[float, float, float, str], ground: str = "white") -> Image.Image:
    """Discs (x, y, radius, colour) on a ground, with edges that are smooth to 1/16 of a pixel."""
    large = Image.new("RGB", (SIDE * FINE, SIDE * FINE), ground)
    for x, y, radius, colour in discs:
        box = [FINE * v for v in (x - radius, y - radius, x + radius, y + radius)]
        ImageDraw.Draw(large).ellipse(box, fill=colour)
    return large.resize((SIDE, SIDE), Image.Resampling.BOX)


def moved(image: Image.Image, name: str) -> Tensor:
    found = find_ground(image)
    assert found is not None
    return on_ground(to_tensor(image), found.tensor(), colour_of(name))


def levels_apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) * 127.5


@pytest.mark.parametrize("name", ["light blue", "black", "purple"])
def test_a_thing_on_another_ground_is_as_if_drawn_there(name: str) -> None:
    disc = (32.3, 30.7, 20.0, "#c02020")
    on_colour = drawn(disc, ground="#{:02x}{:02x}{:02x}".format(*COLOURS[name]))
    assert levels_apart(moved(drawn(disc), name), to_tensor(on_colour)) < 6  # what is white but for 5 levels is ground


def test_an_edge_that_is_left_as_it_is_would_be_found() -> None:
    disc = (32.3, 30.7, 20.0, "#c02020")
    found = find_ground(drawn(disc))
    assert found is not None
    hard = on_ground(to_tensor(drawn(disc)), (found.tensor() > 0.99).float(), colour_of("black"))
    assert levels_apart(hard, to_tensor(drawn(disc, ground="#101012"))) > 100


def test_white_inside_of_a_thing_stays_white() -> None:
    eye = drawn((32, 32, 24, "#203060"), (32, 32, 10, "white"))
    image = to_image(moved(eye, "yellow"))
    assert image.getpixel((32, 32)) == (255, 255, 255) and image.getpixel((1, 1)) == COLOURS["yellow"]
    assert image.getpixel((32, 14)) == (0x20, 0x30, 0x60)


def test_what_cannot_be_told_from_the_ground_keeps_its_picture() -> None:
    assert find_ground(drawn((32, 32, 20, "#f4f4f2"))) is None  # an egg
    assert find_ground(Image.new("RGB", (SIDE, SIDE), "white")) is None
    assert find_ground(Image.new("RGB", (SIDE, SIDE), "navy")) is None
    assert find_ground(drawn((32, 32, 60, "navy"))) is None  # white in the corners only
    half = drawn((20, 32, 14, "#c02020"), (44, 32, 14, "#fafaf8"))
    assert find_ground(half) is None


def test_noise_of_lossy_files_is_ground() -> None:
    rng = np.random.default_rng(0)
    pixels = np.asarray(drawn((32, 32, 20, "#208040"))).astype(int)
    noisy = Image.fromarray(np.clip(pixels + rng.integers(-4, 5, pixels.shape), 0, 255).astype(np.uint8))
    found = find_ground(noisy)
    assert found is not None and (found.share == 255).mean() > 0.6


def test_a_ground_is_never_the_colour_of_the_thing() -> None:
    yellow, black = find_ground(drawn((32, 32, 20, "#ffd640"))), find_ground(drawn((32, 32, 20, "#101010")))
    assert yellow is not None and black is not None
    assert "yellow" not in yellow.fits and "blue" in yellow.fits
    assert "black" not in black.fits and "dark blue" not in black.fits and "light grey" in black.fits


def test_chance_alone_decides_the_ground() -> None:
    fits = ("blue", "red", "grey")
    names = [choose_ground(fits, 0.5, Chance(str(i))) for i in range(600)]
    assert names == [choose_ground(fits, 0.5, Chance(str(i))) for i in range(600)]
    assert 250 < names.count(None) < 350 and all(60 < names.count(name) < 140 for name in fits)
    assert choose_ground((), 1.0, Chance("0")) is None and choose_ground(fits, 0.0, Chance("0")) is None


def test_captions_say_the_ground() -> None:
    assert said("a 3D emoji of a cat", "orange") == "a 3D emoji of a cat on an orange background"
    assert said("a cat, 3D emoji style", "blue") == "a cat, 3D emoji style, on a blue background"
    assert said("a 3D icon of a cat on a white background", "red") == "a 3D icon of a cat on a red background"
    assert said("", "red") == ""


def test_shares_are_numbers_of_a_byte() -> None:
    share = np.full((2, 2), 255, np.uint8)
    assert torch.equal(Ground(share, ("red",)).tensor(), torch.ones(1, 2, 2))
