"""Tokens that are alike attend as one: nothing changes where they are the same, and nothing at all when it is off."""

import pytest
import torch
from einops import repeat
from torch import Tensor, nn

from ldm.bundle import Bundle
from ldm.models.merging import MergingUNet
from ldm.models.unet import UNet, UNetConfig
from ldm.nn.attention import Attention
from ldm.nn.merging import among_fewer, partition
from ldm.pipeline import TextToImage
from ldm.request import GenerationRequest


def windows(height: int, width: int) -> Tensor:
    """Two states of 2×2 windows, each of which is one vector four times."""
    made = torch.randn(2, height // 2, width // 2, 16, generator=torch.Generator().manual_seed(0))
    return repeat(made, "b h w c -> b (h s) (w t) c", s=2, t=2).flatten(1, 2)


def identity(x: Tensor) -> Tensor:
    return x


def test_one_pixel_of_every_window_stays() -> None:
    stay, rest = partition(15, 5, torch.device("cpu"))
    assert stay.tolist() == [0, 2, 4, 10, 12, 14]
    assert sorted([*stay.tolist(), *rest.tolist()]) == list(range(15))


@pytest.mark.parametrize("share", [0.25, 0.75, 1.0])
def test_merging_equal_tokens_and_parting_them_is_the_identity(share: float) -> None:
    x = windows(4, 6)
    assert torch.allclose(among_fewer(identity, x, 6, share), x, atol=1e-6)
    halves = x.bfloat16()
    assert torch.allclose(among_fewer(identity, halves, 6, share), halves, atol=0.05)


def test_tokens_that_are_equal_lose_nothing_by_attending_as_one() -> None:
    torch.manual_seed(0)
    layer, x, asked = Attention(16, heads=2), windows(6, 4), list[int]()
    layer.register_forward_pre_hook(lambda _, given: asked.append(given[0].shape[1]))
    known = layer(x)
    assert torch.allclose(among_fewer(layer, x, 4, 0.75), known, atol=1e-5)
    assert asked == [24, 6], "a quarter of the questions, and of the answers to choose from"


def test_those_most_like_one_that_stays_go_first_and_get_its_answer() -> None:
    # One window of what stays at 0, and three that point nearly there, elsewhere, and exactly there.
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [3.0, 0.0]]])
    known = torch.tensor([[[2.0, 0.0], [1.0, 0.2], [0.0, 1.0], [2.0, 0.0]]])
    assert torch.allclose(among_fewer(identity, x, 2, 0.25), known)


def test_each_image_merges_by_itself() -> None:
    x = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    together = among_fewer(identity, x, 6, 0.5)
    alone = torch.cat([among_fewer(identity, one, 6, 0.5) for one in x.split(1)])
    assert torch.equal(together, alone) and not torch.allclose(together, x, atol=1e-2)


@pytest.mark.parametrize(("attention", "found"), [((True, True), 3), ((False, True), 3), ((False, False), 1)])
@torch.no_grad()
def test_finest_attention_merges_and_only_when_asked_that_way(attention: tuple[bool, bool], found: int) -> None:
    torch.manual_seed(0)
    shape = {"channels": 16, "multipliers": (1, 2), "res_blocks": 1, "heads": 2, "context_width": 8, "groups": 4}
    unet = UNet(UNetConfig(**shape, attention=attention))
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, t, texts = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(4, 5, 8)
    known, merging = unet(x, t, texts), MergingUNet(unet, unet, 0.5)
    assert len(merging.transformers) == found
    assert {one.norm.num_channels for one in merging.transformers} == {16 if attention[0] else 32}
    assert 0 < float((merging(x, t, texts) - known).norm() / known.norm()) < 0.5
    assert torch.equal(unet(x, t, texts), known), "asked otherwise, it merges nothing"
    assert torch.equal(MergingUNet(unet, unet, 0.0)(x, t, texts), known)


def test_pictures_with_merged_tokens_are_others_and_without_the_same(tiny_bundle: Bundle) -> None:
    def drawn(**settings: object) -> bytes:
        request = GenerationRequest(prompt="a", seed=3, steps=2, **settings)
        return next(iter(TextToImage(tiny_bundle)(request))).image.tobytes()

    plain = drawn()
    assert drawn(merge_tokens=0.0) == plain
    assert drawn(merge_tokens=0.5) != plain
    assert drawn(merge_tokens=0.5, reuse=2) != drawn(reuse=2)
    assert drawn() == plain
