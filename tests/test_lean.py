"""Less memory and the same pictures: networks on the device only while they are asked, and decoding in bands."""

from typing import Any

import pytest
import torch
from torch import nn

from ldm.bundle import Bundle
from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.nn.memory import peak_of
from ldm.pipeline import TextToImage, memory_plan
from ldm.request import GenerationRequest, resolve

REQUEST = GenerationRequest(prompt="a red circle", seed=5, steps=2)


def test_peak_is_what_is_alive_at_once() -> None:
    def chain() -> None:
        x = torch.empty(100, dtype=torch.uint8, device="meta")
        for _ in range(5):
            x = x + 1
        kept = x.view(10, 10)
        del x
        kept.clone()

    assert peak_of(chain) == 200, "a view keeps what it looks at, and nothing else is kept"
    held: list[torch.Tensor] = []
    assert peak_of(lambda: held.extend(torch.empty(7, dtype=torch.int16, device="meta") for _ in range(3))) == 42


def test_decoding_in_bands_needs_two_thirds_of_the_memory() -> None:
    with torch.device("meta"):
        model, latent = KLAutoencoder(AutoencoderConfig()), torch.empty(1, 4, 64, 64)
    plain = peak_of(lambda: model.decode(latent))
    model.spare_memory()
    assert peak_of(lambda: model.decode(latent)) < 0.7 * plain


def test_decoding_in_bands_is_decoding(tiny_bundle: Bundle) -> None:
    torch.manual_seed(0)
    shape = {"channels": 8, "multipliers": (1, 2), "res_blocks": 1, "mid_attention": True, "groups": 4}
    model, latent = KLAutoencoder(AutoencoderConfig(**shape)), torch.randn(2, 4, 6, 10)
    known = model.decode(latent)
    with torch.no_grad():
        assert torch.allclose(model.decode(latent), known, atol=1e-4)
        model.spare_memory()
        assert torch.allclose(model.decode(latent), known, atol=1e-4)
    assert model.decode(latent).requires_grad, "training is not spared"


def test_networks_are_lent_one_at_a_time_and_draw_the_same(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = next(iter(TextToImage(tiny_bundle)(REQUEST))).image.tobytes()
    lent: list[tuple[str, Any]] = []
    there = torch.device("cpu", 0)  # not `cpu` by its name, and the same

    def spy(module: nn.Module, device: torch.device) -> nn.Module:
        lent.append((type(module).__name__, device))
        return module

    monkeypatch.setattr(nn.Module, "to", spy)
    drawn = next(iter(TextToImage(tiny_bundle, "cpu:0")(REQUEST))).image.tobytes()
    assert drawn == known
    names = [name for name, _ in lent]
    assert names[::2] == names[1::2], "each goes home before the next one comes"
    assert [device == there for _, device in lent] == [True, False] * (len(lent) // 2)
    assert {"ClipTextEncoder", "UNet", "KLAutoencoder"} == set(names)


def test_plan_adds_up(tiny_bundle: Bundle) -> None:
    request, config = resolve(REQUEST, tiny_bundle.config), tiny_bundle.config
    plan = memory_plan(request, config, torch.float32)
    parts = (tiny_bundle.autoencoder, tiny_bundle.text, tiny_bundle.unet)
    assert plan["weights"] == sum(t.nbytes for part in parts for t in part.state_dict().values())
    assert plan["whole"] == plan["weights"] + max(plan["step"], plan["decode"])
    assert memory_plan(request, config, torch.float32, lent=True)["whole"] < plan["whole"]
    large = request.model_copy(update={"width": 768, "height": 768})  # bands of a small picture spare nothing
    whole, bands = (memory_plan(large, config, torch.float32, sparing=sparing)["decode"] for sparing in (False, True))
    assert bands < whole
    twice = request.model_copy(update={"num_images": 2, "batch_size": 2})
    assert memory_plan(twice, config, torch.float32)["step"] > 1.8 * plan["step"]
