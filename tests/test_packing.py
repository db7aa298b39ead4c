"""Packed weights give the same numbers, and are given back to whoever asks for weights."""

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderConfig, KLAutoencoder
from ldm.nn import packing
from ldm.nn.layers import ResBlock, channels_last
from ldm.nn.packing import Conv2d

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small convolutions are packed too."""
    monkeypatch.setattr(packing, "MANY_WEIGHTS", 0)


def made(*shape: int, dtype: torch.dtype = torch.float32, **more: int) -> Conv2d:
    torch.manual_seed(0)
    return channels_last(Conv2d(*shape, **{"padding": 1, **more})).to(dtype).requires_grad_(False)


def state(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return drawn.contiguous(memory_format=torch.channels_last)


def plain(conv: Conv2d, x: Tensor) -> Tensor:
    conv.unpack()
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_works_here(dtype: torch.dtype) -> None:
    assert packing.works(dtype), "PyTorch for CPUs has these operators; without them every step is slower"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("more", [{}, {"stride": 2}, {"padding": 0}])
@pytest.mark.parametrize("size", [(2, 48, 8, 8), (1, 48, 5, 7), (3, 48, 16, 16)])
def test_numbers_are_the_same(dtype: torch.dtype, more: dict[str, int], size: tuple[int, ...]) -> None:
    conv, x = made(48, 64, 3, dtype=dtype, **more), state(*size, dtype=dtype)
    known = plain(conv, x)
    with torch.inference_mode():
        first, second, smaller = conv(x), conv(x), conv(x[:1, :, :4, :4])
    assert conv._packed is not None
    assert torch.equal(first, second) and torch.allclose(first, known, rtol=0, atol=1e-5)  # bf16: bit for bit
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(smaller, plain(conv, x[:1, :, :4, :4]), atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_an_enlarged_picture_is_convolved_with_packed_sums(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.nn.cpu.BAND", rows * 32 * 5)
    conv, x = made(32, 32, 3, dtype=dtype), state(2, 32, 6, 5, dtype=dtype)
    with torch.inference_mode():
        known = plain(conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))
        found = conv.doubled(x)
        assert conv._folded is not None
        assert torch.equal(conv.doubled(x), found)
    assert torch.allclose(found, known, atol=0.03 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("how", [torch.inference_mode, torch.no_grad])
def test_what_has_drawn_can_be_trained(how: type) -> None:
    conv, x = made(32, 80, 3), state(1, 32, 8, 8)
    weight = conv.weight.clone()
    with how():
        conv(x)
    assert conv._packed is not None
    network = nn.Sequential(conv).train().requires_grad_(True)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    network(x).sum().backward()
    optimizer.step()
    assert not conv.weight.is_meta and difference(conv.weight, weight) > 0.1


def test_weights_that_are_asked_to_learn_while_they_are_packed_do() -> None:
    conv, x = made(32, 80, 3), state(1, 32, 8, 8)
    with torch.inference_mode():
        conv(x)
    conv.requires_grad_(True)
    assert conv(x).requires_grad and conv.weight.requires_grad and not conv.weight.is_meta


def test_other_work_on_weights_begins_with_unpacking() -> None:
    network, x = nn.Sequential(made(32, 80, 3)), state(1, 32, 8, 8)
    with torch.inference_mode():
        network(x)
        packing.unpack(network)
        network[0].weight.zero_()
        assert network(x).abs().max() == network[0].bias.abs().max()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def test_weights_come_back_as_they_were() -> None:
    conv, x = made(32, 80, 3), state(1, 32, 8, 8)
    weight = conv.weight.clone()

    def drawn() -> Conv2d:
        with torch.inference_mode():
            conv(x)
        assert conv._packed is not None and conv.weight.is_meta and conv.weight.shape == weight.shape
        return conv

    assert torch.equal(drawn().state_dict()["weight"], weight)
    assert torch.equal(copy.deepcopy(drawn()).state_dict()["weight"], weight)
    assert torch.equal(drawn().to(torch.float64).weight, weight.double())
    conv.to(torch.float32)
    other = torch.randn_like(weight)
    drawn().load_state_dict({"weight": other, "bias": conv.bias})
    assert torch.equal(conv.weight, other)
    with torch.inference_mode():
        assert torch.allclose(conv(x), F.conv2d(x, other, conv.bias, padding=1), atol=1e-5)
    restored = drawn().state_dict()["weight"]
    assert restored.is_contiguous(memory_format=torch.channels_last) and not restored.is_inference()


def test_sums_are_packed_for_the_size_they_are_used_at(monkeypatch: pytest.MonkeyPatch) -> None:
    # 192 channels, bf16: packed for another size they are turned round at every call, which took 30 of a step's 152 ms.
    asked: list[tuple[int, ...]] = []

    def packed(weight: Tensor, shape: tuple[int, ...], *rest: Sequence[int]) -> Tensor:
        asked.append(tuple(shape))
        return pack(weight, shape, *rest)

    pack = packing.pack
    monkeypatch.setattr(packing, "pack", packed)
    conv = made(16, 16, 3)
    with torch.inference_mode():
        for batch, side in ((2, 4), (1, 4), (2, 6), (2, 4)):
            x = state(batch, 16, side, side)
            known = F.conv2d(F.interpolate(x, scale_factor=2.0), conv.weight, conv.bias, padding=1)
            assert torch.allclose(conv.doubled(x), known, atol=1e-5)
    assert asked == 4 * [(1, 16, 5, 4)] + 4 * [(1, 16, 7, 6)] + 4 * [(1, 16, 5, 4)]


def test_new_weights_are_summed_anew() -> None:
    conv, x = made(16, 16, 3), state(1, 16, 4, 4)
    with torch.inference_mode():
        conv.doubled(x)
        conv.load_state_dict({"weight": conv.weight * 2, "bias": conv.bias})
        known = F.conv2d(F.interpolate(x, scale_factor=2.0), conv.weight, conv.bias, padding=1)
        assert torch.allclose(conv.doubled(x), known, atol=1e-5)


@pytest.mark.parametrize(
    "why", ["gradient", "other format", "trained", "many pixels", "few weights", "no operator", "two layouts"]
)
def test_where_it_cannot_be_or_does_not_pay_nothing_is_packed(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = made(32, 96 if why == "two layouts" else 32, 3), state(1, 32, 8, 8)
    if why == "trained":
        conv.requires_grad_(True)
    elif why == "many pixels":
        monkeypatch.setattr(packing, "FEW_PIXELS", 63)
    elif why == "few weights":
        monkeypatch.setattr(packing, "MANY_WEIGHTS", 32 * 32 * 9 + 1)
    elif why == "no operator":
        monkeypatch.setattr(packing, "works", lambda dtype: False)
    known = F.conv2d(x, conv.weight, conv.bias, padding=1)
    other = why == "other format"
    with torch.set_grad_enabled(why == "gradient"), torch.autocast("cpu", torch.bfloat16, enabled=other):
        found = conv(x.bfloat16() if other else x)
    assert conv._packed is None and not conv.weight.is_meta
    assert torch.allclose(found.float(), known, atol=0.05 if other else 1e-6)


def test_a_gradient_brings_the_weights_back() -> None:
    conv, x = made(32, 32, 3), state(1, 32, 8, 8)
    with torch.inference_mode():
        known = conv(x)
    x.requires_grad_(True)
    found = conv(x)
    found.sum().backward()
    assert conv._packed is None and torch.allclose(found, known, atol=1e-5) and x.grad is not None


def test_bands_find_the_weights_that_a_small_picture_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    block = channels_last(ResBlock(16, 16, groups=4, eps=1e-6)).requires_grad_(False)
    nn.init.normal_(block.conv2.weight, std=0.1)
    with torch.inference_mode():
        small, large = state(1, 16, 8, 8), state(1, 16, 40, 40)
        known = block(large)
        block(small)
        assert block.conv1._packed is not None
        block.sparing = True
        assert torch.allclose(block(large), known, atol=1e-4)


def test_a_decoder_that_has_drawn_is_saved_whole() -> None:
    torch.manual_seed(0)
    shape = AutoencoderConfig(channels=8, multipliers=(1, 2), res_blocks=1, mid_attention=False, groups=4)
    model = channels_last(KLAutoencoder(shape)).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        model.decode(torch.randn(1, 4, 8, 8))
    assert any(isinstance(one, Conv2d) and one._packed is not None for one in model.modules())
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()) and len(after) == len(before)
