"""Order: the pairs differ in their relation alone, and who knows it is told from who does not."""

from collections.abc import Sequence

import pytest
import tiny_training
import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.data.shapes import parse_caption
from ldm.evaluation import order
from ldm.evaluation.held_out import HeldOut
from ldm.evaluation.order import order_results, pairs
from ldm.evaluation.shapes_oracle import judge, read
from ldm.models.model_config import build


def test_a_picture_is_as_its_caption_says_and_not_as_the_mirrored_one() -> None:
    found = list(pairs(12))
    assert len({pair.picture.caption for pair in found}) == 12
    for pair in found:
        seen = read(pair.picture.image)
        own, mirrored = judge(seen, parse_caption(pair.picture.caption)), judge(seen, parse_caption(pair.mirrored))
        assert own.right and not mirrored.relation and mirrored.colour and mirrored.shape
        words = [set(text.split()) for text in (pair.picture.caption, pair.mirrored)]
        assert len(words[0] ^ words[1]) == 2  # left and right, or above and below
    assert [pair.mirrored for pair in pairs(3)] == [pair.mirrored for pair in found[:3]]


@pytest.fixture
def bundle() -> Bundle:
    config = tiny_training.model()
    return Bundle("tiny", config, *build(config))


def seen(count: int) -> HeldOut:
    latents = torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    return HeldOut(tuple(f"a {i} above b" for i in range(count)), latents, (), (), (), "")


@pytest.mark.parametrize(("knows", "share"), [("order", 1.0), ("words", 0.0), ("the opposite", 0.0), ("some", 0.75)])
def test_who_knows_the_order_is_told_from_who_does_not(
    knows: str, share: float, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = seen(20)
    mirrored = [caption.replace("above", "below") for caption in of.captions]

    def denoise(x: Tensor, sigma: float, texts: Sequence[str]) -> Tensor:
        found = []
        for text in texts:
            index, right = int(text.split()[1]), "above" in text
            asked = {"order": right, "words": True, "the opposite": not right, "some": right or index % 4 == 3}[knows]
            found.append(of.latents[index] if asked else torch.zeros_like(x[0]))
        return torch.stack(found)

    monkeypatch.setattr(order, "reading", lambda _: denoise)
    (result,), table = order_results(bundle, of, mirrored)
    assert result.figure.value == share and result.figure.count == 20 and result.unit == "%"
    bins = result.details["bins"]
    assert isinstance(bins, list) and [one["preferred"] for one in bins] == [share] * 10
    assert table.splitlines()[0] == "| t | SNR | right | mirrored | right is preferred |"
    assert table.splitlines()[-1].endswith(f"| {100 * share:.0f} % |") and len(table.splitlines()) == 12
