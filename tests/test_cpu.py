"""What is computed otherwise for pictures on a CPU is the same up to rounding, and is not computed for training."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import environment
from torch import Tensor, nn

from ldm.machine import single_threads
from ldm.models.autoencoder import AutoencoderConfig, Decoder
from ldm.models.unet import UNet, UNetConfig
from ldm.nn import cpu
from ldm.nn.attention import attention
from ldm.nn.layers import GEGLU, ResBlock, Upsample, channels_last
from ldm.nn.packing import Conv2d
from ldm.training.lora import LoraLinear


def difference(found: Tensor, known: Tensor) -> float:
    return float((found.double() - known.double()).norm() / known.double().norm())


@pytest.mark.parametrize("shape", [(2, 3, 300, 200, 40), (1, 2, 5, 130, 16), (1, 1, 512, 512, 64), (2, 8, 129, 128, 7)])
def test_attention_in_blocks_is_attention(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    batch, heads, rows, columns, width = shape
    torch.manual_seed(0)
    query, key, value = (torch.randn(batch, heads, n, width) for n in (rows, columns, columns))
    known = F.scaled_dot_product_attention(query, key, value)
    for scores in (2**21, 1000, 100):  # all at once, some rows of a head, a row at a time
        monkeypatch.setattr(cpu, "SCORES", scores)
        assert difference(cpu.attention_in_blocks(query, key, value), known) < 1e-5
        halves = (tensor.bfloat16() for tensor in (query, key, value))
        assert difference(cpu.attention_in_blocks(*halves), known) < 0.02


def test_blocks_leave_the_number_of_threads_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SCORES", 100)
    before = torch.get_num_threads()
    query = torch.randn(1, 2, 70, 8)
    with torch.inference_mode():
        assert cpu.attention_in_blocks(query, query, query).is_inference()
    with torch.no_grad():
        assert not cpu.attention_in_blocks(query, query, query).is_inference()
    assert single_threads(before + 1).submit(torch.get_num_threads).result() == 1
    pool = single_threads(before)
    assert torch.get_num_threads() == before
    assert set(pool.map(lambda _: torch.get_num_threads(), range(20))) == {1}
    with ThreadPoolExecutor(1) as another:
        assert another.submit(torch.get_num_threads).result() == before


@pytest.mark.parametrize("scores", [1000, 100])
def test_only_many_blocks_have_a_thread_each(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SCORES", scores)
    monkeypatch.setattr(cpu, "MANY_BLOCKS", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    asked = list[int]()
    monkeypatch.setattr(cpu, "single_threads", lambda count: (asked.append(count), ThreadPoolExecutor(count))[1])
    query = torch.randn(1, 2, 70, 8)
    cpu.attention_in_blocks(query, query, query)  # of 14 rows each, or one
    assert asked == ([2] if scores == 100 else [])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_forked_process_gets_threads_of_its_own() -> None:
    assert single_threads(2).submit(int).result() == 0
    child = os.fork()
    if not child:
        signal.alarm(20)  # which ends it
        os._exit(single_threads(2).submit(int).result())
    assert os.waitpid(child, 0)[1] == 0


def test_blocks_are_for_pictures_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def instead(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        used.append(query.dtype)
        return query

    monkeypatch.setattr("ldm.nn.attention.attention_in_blocks", instead)
    full = torch.randn(1, 2, 256, 8)
    for query in (full, full.bfloat16()):
        attention(query, query, query)
        with torch.no_grad():
            attention(query, query, query)
            attention(query, query[:, :, :77], query[:, :, :77])
    assert used == [torch.bfloat16]


def test_products_are_attention_with_its_gradients() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 16, dtype=torch.float64, requires_grad=True) for n in (30, 20, 20))
    weight = torch.randn(2, 3, 30, 16, dtype=torch.float64)
    results = []
    for compute in (F.scaled_dot_product_attention, cpu.attention_as_products):
        out = compute(query, key, value)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (query, key, value))))
    assert all(difference(found, known) < 1e-12 for known, found in zip(*results, strict=True))


def test_products_are_for_few_keys_in_training_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def instead(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        used.append((query.dtype, key.shape[2]))
        return query

    monkeypatch.setattr("ldm.nn.attention.attention_as_products", instead)
    full = torch.randn(1, 2, 300, 8)
    for query in (full, full.bfloat16()):
        for keys in (77, 256, 257):
            attention(query, query[:, :, :keys], query[:, :, :keys])
            with torch.no_grad():
                attention(query, query[:, :, :keys], query[:, :, :keys])
    assert used == [(torch.bfloat16, 77), (torch.bfloat16, 256)]


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("size", [(1, 4, 6), (3, 5, 3)])
def test_convolution_of_an_enlarged_picture_needs_no_enlarged_picture(
    size: tuple[int, int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BAND", rows * 9 * size[2])
    torch.manual_seed(0)
    conv, x = Conv2d(7, 9, 3, padding=1), torch.randn(size[0], 7, *size[1:])
    with torch.no_grad():
        known = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        assert difference(conv.doubled(x), known) < 1e-6
        x = x.contiguous(memory_format=torch.channels_last)
        assert difference(channels_last(conv).doubled(x), known) < 1e-6


@pytest.mark.parametrize("channels", [(8, 8), (8, 16)])
def test_bands_of_a_residual_block_are_the_block(channels: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = ResBlock(*channels, groups=4, eps=1e-6)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    # A large mean and channels that differ: what a careless variance is wrong about.
    x = torch.randn(2, 8, 13, 5) + 30.0 * torch.arange(8.0)[:, None, None]
    known = block(x).detach()
    monkeypatch.setattr(cpu, "LARGE", 0)
    for rows in (1, 4, 13):
        monkeypatch.setattr(cpu, "BAND", rows * 8 * 5)
        with torch.no_grad():
            assert difference(block(x), known) < 1e-5


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("multipliers", [(1, 2, 2), (2, 1, 1), (1,)])
def test_a_decoders_large_states_lie_at_two_ends_of_one_memory(
    multipliers: tuple[int, ...], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    decoder = Decoder(AutoencoderConfig(channels=8, multipliers=multipliers, res_blocks=1, groups=4))
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4, 6, 5)
    known = decoder(x).detach()
    lain: list[int] = []

    def next_of(ends: cpu.TwoEnds, shape: tuple[int, ...]) -> Tensor:
        room = given(ends, shape)
        lain.append(room.untyped_storage().data_ptr())
        return room.fill_(torch.nan)

    given = cpu.TwoEnds.next
    monkeypatch.setattr(cpu.TwoEnds, "next", next_of)
    monkeypatch.setattr(cpu, "MANY_PIXELS", 0)
    layers = 3 * len(multipliers) - 1
    for large, most, least in ((2**24, 0, 0), (1000, layers - 2, 0), (1, layers, layers)):
        monkeypatch.setattr(cpu, "LARGE", large)
        monkeypatch.setattr(cpu, "BAND", 100)
        lain.clear()
        decoder.requires_grad_(packed is False)
        with torch.no_grad():
            assert difference(decoder(x), known) < 1e-5
        assert least <= len(lain) <= most and len(set(lain)) == min(len(lain), 1)


COMPILED = """
import torch
from ldm.models.autoencoder import AutoencoderConfig, Decoder
from ldm.nn import cpu

sizes = []
def counted(graph, inputs):
    sizes.append(len(graph.graph.nodes))
    return graph.forward

cpu.LARGE, cpu.BAND = 1, 256  # all its states are large, of several bands
decoder = Decoder(AutoencoderConfig(channels=8, multipliers=(1, 2), res_blocks=1, groups=4))
x = torch.randn(1, 4, 16, 16)
with torch.no_grad():
    made = torch.compile(decoder, backend=counted, fullgraph=True)(x)
    assert len(sizes) == 1 and sizes[0] < 400, sizes
    assert torch.allclose(made, decoder(x), atol=1e-5)
"""


@pytest.mark.slow
def test_a_decoder_is_compiled_as_one() -> None:
    # In a process of its own: the tests' checks of shapes are nothing that could be compiled.
    subprocess.run([sys.executable, "-c", COMPILED], env=environment(), timeout=200, check=True)


def test_gates_with_additions_are_asked_themselves() -> None:
    torch.manual_seed(0)
    layer, x = GEGLU(6, 10), torch.randn(2, 3, 6)
    known = layer(x).detach()
    with torch.no_grad():
        assert difference(layer(x), known) < 1e-6
        layer.proj = LoraLinear(layer.proj, rank=2, alpha=2.0)
        nn.init.normal_(layer.proj.lora_up.weight)
        value, gate = layer.proj(x).chunk(2, dim=-1)
        assert difference(layer(x), value * F.gelu(gate)) < 1e-6
        assert difference(layer(x), known) > 0.1


def test_nothing_of_it_is_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LARGE", 0)
    monkeypatch.setattr(cpu, "MANY_PIXELS", 0)
    for where, name in ((Conv2d, "doubled"), (cpu, "gated"), (cpu, "convolved")):
        monkeypatch.setattr(where, name, lambda *_: pytest.fail("computed for a gradient"))
    x = torch.randn(1, 4, 4, 4, requires_grad=True)
    layers = (Upsample(4), ResBlock(4, 4, groups=2, eps=1e-6), lambda x: GEGLU(4, 4)(x[0]))
    total = sum(layer(x).sum() for layer in layers)
    assert isinstance(total, Tensor)
    total.backward()
    assert x.grad is not None and x.grad.abs().max() > 0


@pytest.mark.parametrize("attention", [(True, True), (False, True), (False, False)])
def test_texts_share_what_comes_before_them(attention: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    shape = {"channels": 16, "multipliers": (1, 2), "res_blocks": 1, "heads": 2, "context_width": 8, "groups": 4}
    unet = UNet(UNetConfig(**shape, attention=attention))
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, t, texts = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(6, 5, 8)
    with torch.no_grad():
        known = unet(torch.cat([x, x, x]), t.repeat(3), texts)
        assert difference(unet(x, t, texts), known) < 1e-5
