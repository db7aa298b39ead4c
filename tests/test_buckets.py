"""Buckets, crops, captions and chance: what happens to one sample on its way into a batch."""

import numpy as np
import pytest
from PIL import Image

from ldm.data.buckets import BucketConfig, assign, bucket_sizes
from ldm.data.captions import CaptionConfig, all_captions, choose_caption
from ldm.data.order import Chance
from ldm.data.tally import BadSample
from ldm.data.transforms import HANDED, PictureConfig, concept, fit, is_mirrored, may_be_mirrored
from ldm.errors import SettingError


def test_sizes_have_about_the_area_of_the_square() -> None:
    sizes = bucket_sizes(512, BucketConfig(step=64, max_aspect=2.0))
    assert (512, 512) in sizes and (384, 640) in sizes and (640, 384) in sizes
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert 0.8 * 512**2 < width * height <= 512**2
        assert 0.5 <= width / height <= 2
    assert bucket_sizes(512, None) == ((512, 512),)
    with pytest.raises(SettingError, match="multiple of the buckets' step 64"):
        bucket_sizes(100, BucketConfig())


def test_a_picture_goes_into_the_bucket_of_its_aspect() -> None:
    sizes = bucket_sizes(512, BucketConfig())
    widths, heights = np.array([1000, 1000, 3000, 100, 640]), np.array([1000, 990, 1000, 900, 384])
    found = [sizes[index] for index in assign(widths, heights, sizes)]
    assert found == [(512, 512), (512, 512), (640, 384), (384, 640), (640, 384)]


def test_a_crop_does_not_stretch() -> None:
    image = Image.new("RGB", (400, 100), "black")
    image.paste("white", (150, 0, 250, 100))
    assert min(low for low, _ in fit(image, (50, 50)).getextrema()) > 230  # the middle; its edges know what is beside
    assert fit(image, (50, 50), x=0.0).getextrema() == ((0, 0),) * 3
    assert fit(image, (50, 50), x=1.0).getpixel((49, 25)) == (0, 0, 0)
    assert fit(image, (400, 100)) is image
    assert fit(Image.new("RGB", (8, 8), "red"), (16, 32)).size == (16, 32)  # enlarged where it must be


def test_left_and_right_stay_where_captions_name_them() -> None:
    assert may_be_mirrored(("a red circle above a star",), HANDED)
    for caption in ("a circle to the LEFT of a star", "flag of Chad", "keycap 3", "the B button", "one o'clock"):
        assert not may_be_mirrored(("a star", caption), HANDED), caption
    config = PictureConfig(side=2, mirror=1.0)
    assert is_mirrored(("a star",), config, Chance("0")) and not is_mirrored(("left",), config, Chance("0"))
    assert not is_mirrored(("a star",), PictureConfig(side=2), Chance("0"))


def test_what_the_facts_name_stays_too() -> None:
    facts = {"cldr": "three o’clock", "group": "travel & places", "keywords": ["left"]}
    assert concept(("a dial",), facts) == ("a dial", "three o’clock", "travel & places")
    assert not may_be_mirrored(concept(("a dial",), facts), HANDED)
    assert not may_be_mirrored(concept(("a spiral",), {"group": "symbols"}), HANDED)
    assert may_be_mirrored(concept(("a cat",), {"group": "animals & nature"}), HANDED)


def test_captions_are_chosen_dropped_and_framed() -> None:
    facts = {"captions": ["b", "a", " "], "style": "flat"}
    assert all_captions("a", facts) == ("a", "b")

    def chosen(**settings: object) -> list[str]:
        config = CaptionConfig.model_validate(settings)
        return [choose_caption("a", facts, config, Chance(str(i)), "here") for i in range(400)]

    assert set(chosen()) == {"a"}
    assert 140 < chosen(choice="any").count("b") < 260
    assert 40 < chosen(choice="any", first=0.6).count("b") < 120
    assert set(chosen(choice="any", first=1.0)) == {"a"}
    assert 15 < chosen(dropout=0.1).count("") < 70
    assert set(chosen(exclude=("a",))) == set(chosen(choice="any", exclude=("x|[Aa]",))) == {"b"}
    assert set(chosen(exclude=(".",))) == {"a"}, "a sample keeps its captions if there are no others"
    assert chosen(choice="any", exclude=("ab?c", "")) == chosen(choice="any"), "an expression matches all of a caption"
    with pytest.raises(ValueError, match=r"'\(a' is not a regular expression: missing \)"):
        CaptionConfig(exclude=("(a",))
    templates = ("{caption} in {style} style", "{caption} by {artist}", "a picture of {caption}")
    assert set(chosen(templates=templates)) == {"a in flat style", "a picture of a"}
    with pytest.raises(ValueError, match="does not have"):
        CaptionConfig(templates=("no place for it",))


def test_a_sample_without_words_is_bad_or_unconditional() -> None:
    with pytest.raises(BadSample, match="empty caption"):
        choose_caption("", {}, CaptionConfig(), Chance("0"), "here")
    assert choose_caption("", {}, CaptionConfig(empty="uncond"), Chance("0"), "here") == ""


def test_chance_is_even_and_does_not_know_what_was_asked_before() -> None:
    one, other = Chance("7 3"), Chance("7 3")
    assert one("crop") == other("crop") and other("mirror") != other("crop") and one("mirror") == other("mirror")
    numbers = np.array([Chance(f"0 {i}")("crop") for i in range(2000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02 and abs(numbers.std() - 12**-0.5) < 0.02
