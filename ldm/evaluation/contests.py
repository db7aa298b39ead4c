"""The contests of a benchmark: the same work for our networks and for those of diffusers, with the same weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import guided
from ldm.diffusion.schedule import scaled_linear
from ldm.evaluation import stand_in
from ldm.evaluation.speed import Comparison, Operations, Roofline, Work, compare, operations
from ldm.evaluation.stand_in import StandIn, Theirs, shapes
from ldm.machine import keep_freed_memory
from ldm.models.unet import UNet, UNetConfig
from ldm.nn import cpu
from ldm.nn.attention import attention as our_attention
from ldm.nn.layers import GEGLU, Module, ResBlock, Upsample, channels_last, silu
from ldm.nn.packing import Conv2d

OURS, DEFAULT, BEST = "ldm", "diffusers, default", "diffusers, best"
PLAIN = "plain"
# Anew for each size: code for any size would be slower, and CUDA graphs have one each.
COMPILED: dict[str, Any] = {"mode": "max-autotune", "fullgraph": True, "dynamic": False}
PROMPT = "a red circle to the left of a blue square"
SIGMA, GUIDANCE = 3.0, 7.5


@dataclass
class Bench:
    """What is measured on: the machine, the size of the work, and networks, made when they are first asked for."""

    device: torch.device
    dtype: torch.dtype
    side: int
    batch: int
    repeat: int
    compiled: bool
    with_theirs: bool
    rooflines: dict[str, Roofline] = field(default_factory=dict)

    @cached_property
    def ours(self) -> StandIn:
        """Our networks in the number format that `auto` is."""
        return stand_in.ours(self.dtype, self.device)

    @cached_property
    def theirs(self) -> dict[str, Theirs]:
        """The same networks as diffusers loads them by default, and at the best that its documentation says."""
        if not self.with_theirs:
            return {}
        full = stand_in.ours(torch.float32, self.device)
        return {
            DEFAULT: stand_in.theirs(full, torch.float32, nchw=True),
            BEST: stand_in.theirs(self.ours, self.dtype, nchw=False),
        }

    def dtype_of(self, name: str) -> torch.dtype:
        """In which number format a contender computes."""
        return torch.float32 if name == DEFAULT else self.dtype

    def given(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Numbers from a seed, in a contender's number format and layout."""
        made = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype_of(name))
        return made if name == DEFAULT else made.contiguous(memory_format=torch.channels_last)

    def latent(self, name: str) -> Tensor:
        """Latents in a contender's number format and layout."""
        return self.given(name, (self.batch, 4, self.side // 8, self.side // 8))

    def compare(
        self,
        what: str,
        contenders: Mapping[str, Work],
        work: Operations,
        dtype: torch.dtype | None = None,
        settle: bool = False,
    ) -> Comparison:
        """Measure, and set every contender beside the roofline of its number format, or of `dtype`."""
        with torch.inference_mode():
            made = compare(what, contenders, self.repeat, self.device, work, settle=settle)
        for name, timing in made.timings.items():
            limit = self.rooflines.get(str(dtype or self.dtype_of(name)))
            if limit is not None and work.total:
                made.of_roofline[name] = limit.floor(work) / timing.median
        return made


def unet(bench: Bench) -> Iterator[Comparison]:
    """One guided step: what the sampler asks for."""
    schedule, count = scaled_linear(0.00085, 0.012, 1000), bench.batch
    width = bench.ours.config.unet.context_width
    texts = torch.randn(2, count, 77, width, generator=torch.Generator().manual_seed(1)).to(bench.device)
    plain, size = shapes().unet, bench.side // 8
    with torch.device("meta"):
        asked = torch.empty(2 * count, 4, size, size), torch.empty(2 * count), torch.empty(2 * count, 77, width)
    work = operations(lambda: plain(*asked))

    def our_step(network: Any) -> Work:
        denoise = guided(Denoiser(network, schedule, "eps", bench.dtype), texts[0], texts[1], GUIDANCE)
        x = bench.latent(OURS).float()
        return lambda: denoise(x, SIGMA)

    def their_step(network: Any, name: str) -> Work:
        x, states = bench.latent(name), torch.cat([texts[1], texts[0]]).to(bench.dtype_of(name))

        def step() -> object:
            scaled = x / (1.0 + SIGMA * SIGMA) ** 0.5
            asked = torch.cat([scaled, scaled])
            said = network(asked, schedule.timestep(SIGMA), encoder_hidden_states=states, return_dict=False)[0]
            without, with_prompt = said.chunk(2)
            return x - SIGMA * (without + GUIDANCE * (with_prompt - without))

        return step

    contenders = {OURS: our_step(bench.ours.unet)}
    contenders |= {name: their_step(networks.unet, name) for name, networks in bench.theirs.items()}
    yield bench.compare(f"guided step, batch {count}", contenders, work)
    if bench.compiled:
        contenders = {OURS: our_step(torch.compile(bench.ours.unet, **COMPILED))}
        if BEST in bench.theirs:
            network = torch.compile(bench.theirs[BEST].unet, **COMPILED)
            contenders[BEST] = their_step(network, BEST)
        yield bench.compare(f"guided step, batch {count}, compiled", contenders, work)


def decode(bench: Bench) -> Iterator[Comparison]:
    """Latents to pictures."""
    plain = shapes().autoencoder
    with torch.device("meta"):
        asked = torch.empty(bench.batch, 4, bench.side // 8, bench.side // 8)

    def their(networks: Theirs, name: str) -> Work:
        x = bench.latent(name)
        return lambda: networks.autoencoder.decode(x / 0.18215)

    x = bench.latent(OURS).float()
    contenders: dict[str, Work] = {OURS: lambda: bench.ours.autoencoder.decode(x)}
    contenders |= {name: their(networks, name) for name, networks in bench.theirs.items()}
    # Ours gives back what is free, also the gigabyte that another left, and that one has to ask for it again.
    work = operations(lambda: plain.decode(asked))
    yield bench.compare(f"decode, batch {bench.batch}", contenders, work, settle=True)


def encode(bench: Bench) -> Iterator[Comparison]:
    """Pictures to latents."""
    plain, shape = shapes().autoencoder, (bench.batch, 3, bench.side, bench.side)
    with torch.device("meta"):
        asked = torch.empty(shape)

    def their(networks: Theirs, name: str) -> Work:
        x = bench.given(name, shape)
        return lambda: networks.autoencoder.encode(x).latent_dist.mode()

    x = bench.given(OURS, shape)
    contenders: dict[str, Work] = {OURS: lambda: bench.ours.autoencoder.encode(x)}
    contenders |= {name: their(networks, name) for name, networks in bench.theirs.items()}
    yield bench.compare(f"encode, batch {bench.batch}", contenders, operations(lambda: plain.encode(asked)))


def text(bench: Bench) -> Iterator[Comparison]:
    """The states of a prompt and of the empty one; ours stay in fp32."""
    ids = bench.ours.text.tokenize(["", PROMPT]).to(bench.device)
    contenders: dict[str, Work] = {OURS: lambda: bench.ours.text(ids)}
    for name, networks in bench.theirs.items():
        contenders[name] = partial(networks.text, ids)
    yield bench.compare("text, 2 prompts", contenders, Operations())


def attention(bench: Bench) -> Iterator[Comparison]:
    """The attention of Stable Diffusion 1.5 alone, for a guided step: ours, and PyTorch's fused kernel."""
    unet = shapes().config.unet
    heads = unet.heads or 1
    for level, channels in enumerate(unet.widths):
        rows, width = (bench.side // 8 // 2**level) ** 2, channels // heads
        for columns in (rows, 77) if unet.attention[level] else ():
            lengths = (rows, columns, columns)
            # As the projections leave them: the heads of a token lie behind one another.
            states = [bench.given(DEFAULT, (2 * bench.batch, n, heads, width)).transpose(1, 2) for n in lengths]
            q, k, v = (state.to(bench.dtype) for state in states)
            contenders: dict[str, Work] = {
                OURS: partial(our_attention, q, k, v),
                "PyTorch": partial(F.scaled_dot_product_attention, q, k, v),
            }
            work = Operations(product=4.0 * 2 * bench.batch * heads * rows * columns * width)
            yield bench.compare(f"attention {rows} to {columns}, {heads} heads {width} wide", contenders, work)
    for rows, columns in ((256, 256), (256, 77), (64, 64)):
        lengths = (rows, columns, columns)
        q, k, v = (bench.given(DEFAULT, (16, n, 4, 32)).transpose(1, 2).to(bench.dtype) for n in lengths)
        contenders = {
            OURS: partial(with_gradients, our_attention, q, k, v),
            "PyTorch": partial(with_gradients, F.scaled_dot_product_attention, q, k, v),
        }
        # Two products there and four back.
        work = Operations(product=12.0 * 16 * 4 * rows * columns * 32)
        yield bench.compare(f"attention {rows} to {columns}, with gradients, 4 heads 32 wide", contenders, work)


def with_gradients(compute: Any, *inputs: Tensor) -> None:
    """Attention as in training: there and back."""
    with torch.inference_mode(False), torch.enable_grad():
        asked = [tensor.clone().requires_grad_() for tensor in inputs]
        compute(*asked).sum().backward()


def layers(bench: Bench) -> Iterator[Comparison]:
    """What layers compute otherwise for pictures on a CPU, each beside the plain computation, as large as in SD 1.5."""
    batch, size, side = bench.batch, bench.side // 8, bench.side

    def put(module: Module) -> Module:
        return channels_last(module.to(bench.device, bench.dtype).eval().requires_grad_(False))

    states, deep = (bench.given(OURS, (n, c, size, size)) for n, c in ((2 * batch, 320), (batch, 512)))
    large, pixels = bench.given(OURS, (batch, 128, side, side)), rearrange(states, "b c h w -> b (h w) c")
    conv, turned = put(nn.Conv2d(320, 320, 3, padding=1)), nn.Conv2d(320, 320, 3, padding=1).to(states)
    turned.load_state_dict(conv.state_dict())
    up, gate, block = put(Upsample(512)), put(GEGLU(320, 1280)), put(ResBlock(128, 128, groups=32, eps=1e-6))
    block.sparing = True
    few, unpacked = (put(Conv2d(2560, 1280, 3, padding=1)) for _ in range(2))
    unpacked.load_state_dict(few.state_dict())
    coarse = bench.given(OURS, (2 * batch, 2560, 8, 8))

    def gated() -> Tensor:
        value, gates = gate.proj(pixels).chunk(2, dim=-1)
        return value * F.gelu(gates)

    def whole() -> Tensor:
        return large + block.conv2(silu(block.norm2(block.conv1(silu(block.norm1(large))))))

    tasks: dict[str, tuple[Work, Work, Operations]] = {
        "weights channels_last": (
            lambda: conv(states), lambda: turned(states), Operations(18.0 * 320 * states.numel())
        ),
        "enlarging, four 2x2 convolutions": (
            lambda: up.conv.doubled(deep), lambda: up.conv(F.interpolate(deep, scale_factor=2.0)),
            Operations(4 * 18.0 * 512 * deep.numel()),
        ),
        "packed weights, 2560 to 1280 at 8x8": (
            lambda: few(coarse), lambda: nn.Conv2d.forward(unpacked, coarse), Operations(18.0 * 1280 * coarse.numel())
        ),
        "GEGLU, a product for each half": (
            lambda: cpu.gated(pixels, gate.proj), gated, Operations(product=2.0 * 2560 * pixels.numel())
        ),
        "decoder's block in bands": (lambda: block(large), whole, Operations(2 * 18.0 * 128 * large.numel())),
    }  # fmt: skip
    for what, (ours, plain, work) in tasks.items():
        yield bench.compare(f"{what}, batch {batch}", {OURS: ours, PLAIN: plain}, work)


def networks(bench: Bench) -> Iterator[Comparison]:
    """What a whole step and a whole decoding do otherwise: what both texts share, and memory that is kept."""
    unet, x, width = bench.ours.unet, bench.latent(OURS), bench.ours.config.unet.context_width
    texts, t = bench.given(DEFAULT, (2 * bench.batch, 77, width)).to(x.dtype), x.new_full((bench.batch,), 500.0).float()
    shared: dict[str, Work] = {
        OURS: lambda: unet(x, t, texts),
        PLAIN: lambda: unet(torch.cat([x, x]), torch.cat([t, t]), texts),
    }
    yield bench.compare(f"states before the texts once, batch {bench.batch}", shared, Operations())

    def decoded(largest: int) -> object:
        keep_freed_memory(largest, largest)
        return bench.ours.autoencoder.decode(x.float())

    kept: dict[str, Work] = {OURS: partial(decoded, 2**30), PLAIN: partial(decoded, 2**25)}
    yield bench.compare(f"decode, freed memory kept, batch {bench.batch}", kept, Operations())
    keep_freed_memory()


def train(bench: Bench) -> Iterator[Comparison]:
    """A training step of the UNet in mixed precision: loss, gradients and AdamW; on CPUs it is a fifth as wide."""
    cuda = bench.device.type == "cuda"
    config = UNetConfig() if cuda else UNetConfig(channels=64, heads=4, context_width=256)
    side, count = (64, 16) if cuda else (32, 4)
    torch.manual_seed(0)
    networks: dict[str, Any] = {OURS: channels_last(UNet(config).to(bench.device))}
    if bench.with_theirs:
        import diffusers

        networks[DEFAULT] = diffusers.UNet2DConditionModel(
            block_out_channels=tuple(config.widths), cross_attention_dim=config.context_width,
            attention_head_dim=config.heads,
        )  # fmt: skip
        networks[DEFAULT].to(bench.device).load_state_dict(networks[OURS].state_dict())
    x = torch.randn(count, 4, side, side, device=bench.device)
    t, states = torch.full((count,), 500.0, device=bench.device), torch.randn(count, 77, config.context_width).to(x)

    def step(name: str, network: Any) -> Work:
        optimizer = torch.optim.AdamW(network.parameters(), fused=name == OURS)
        given = x.contiguous(memory_format=torch.channels_last) if name == OURS else x

        def once() -> Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                with torch.autocast(bench.device.type, torch.bfloat16):
                    said = network(given, t, states)
                loss = ((said if name == OURS else said.sample).float() - x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return once

    contenders = {name: step(name, network) for name, network in networks.items()}
    with torch.device("meta"):
        plain = UNet(config)
    forward = operations(lambda: plain(*(tensor.to("meta") for tensor in (x, t, states))))
    # The gradients of what went in and of the weights cost as much as the way forward, each.
    work = Operations(3.0 * forward.convolution, 3.0 * forward.product)
    yield bench.compare(f"training step, batch {count}", contenders, work, torch.bfloat16)


CONTESTS = {
    "text": text,
    "unet": unet,
    "decode": decode,
    "encode": encode,
    "attention": attention,
    "layers": layers,
    "networks": networks,
    "train": train,
}
