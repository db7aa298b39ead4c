"""Coarse levels are asked every Nth time; what lies between is what the finest blocks make of their last answer."""

import torch
from torch import nn

from ldm.bundle import Bundle
from ldm.models.reuse import ReusingUNet
from ldm.models.unet import UNet, UNetConfig
from ldm.pipeline import TextToImage
from ldm.request import GenerationRequest


def small(res_blocks: int) -> UNet:
    torch.manual_seed(0)
    shape = {"channels": 16, "multipliers": (1, 2), "heads": 2, "context_width": 8, "groups": 4}
    unet = UNet(UNetConfig(**shape, attention=(True, False), res_blocks=res_blocks))
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    return unet


@torch.no_grad()
def test_same_question_has_the_same_answer_at_less_cost() -> None:
    for res_blocks in (1, 2):
        unet = small(res_blocks)
        asked: list[int] = []
        unet.mid_block.register_forward_hook(lambda *_, asked=asked: asked.append(1))
        x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(4, 5, 8)
        known, reusing = unet(x, t, text), ReusingUNet(unet, every=3)
        asked.clear()
        for _ in range(6):
            assert torch.allclose(reusing(x, t, text), known, atol=1e-5)
        assert len(asked) == 2, "in full at the first and the fourth call"


@torch.no_grad()
def test_another_question_has_nearly_its_answer_and_another_batch_is_asked_in_full() -> None:
    unet = small(2)
    reusing = ReusingUNet(unet, every=2)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([700.0]), torch.randn(2, 5, 8)
    reusing(x, t, text)
    found, known = reusing(x + 0.01, t - 5, text), unet(x + 0.01, t - 5, text)
    assert 0 < float((found - known).norm() / known.norm()) < 0.2
    reusing(x, t, text)
    assert torch.equal(reusing(x, t, text[:1]), unet(x, t, text[:1])), "outside the guidance interval"


def test_pictures_with_reuse_do_not_depend_on_their_batch(tiny_bundle: Bundle) -> None:
    pipeline, asked = TextToImage(tiny_bundle), GenerationRequest(prompt="a", seed=3, steps=4, reuse=2, num_images=2)
    drawn = [picture.image.tobytes() for picture in pipeline(asked.model_copy(update={"batch_exact": True}))]
    alone = next(iter(pipeline(asked.model_copy(update={"num_images": 1, "seed": 4, "batch_exact": True}))))
    assert drawn[1] == alone.image.tobytes()
    plain = next(iter(pipeline(asked.model_copy(update={"num_images": 1, "reuse": 1}))))
    assert drawn[0] != plain.image.tobytes()
    assert plain.settings["reuse"] == 1
