"""Contests of a bundle that ships, whose pictures can be read: what a user waits for, and what options spare."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.data.shapes import held_out_prompts
from ldm.diffusion.guidance import guided
from ldm.evaluation.contests import OURS, PROMPT, Bench
from ldm.evaluation.reconstruction import psnr, ssim
from ldm.evaluation.speed import Comparison, Difference, Operations, Work, operations
from ldm.formats.finding import SHAPES
from ldm.images import to_tensor
from ldm.models.model_config import ModelConfig, build
from ldm.models.text import ClipTextConfig
from ldm.pipeline import TextToImage, network_calls
from ldm.request import GenerationRequest

# Prompts that every option draws: half of them with one object, half with two.
PROMPTS = 8
STEPS = 20
Drawn = tuple[Tensor, Tensor]
"""Latents and pictures."""
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "--guidance-interval 0.3,5": {"guidance_interval": "0.3,5"},
    "--reuse 2": {"reuse": 2},
    "--reuse 3": {"reuse": 3},
    "--merge-tokens 0.5": {"merge_tokens": 0.5},
    "--merge-tokens 0.75": {"merge_tokens": 0.75},
}


def engine(bench: Bench) -> TextToImage:
    """The bundle, ready to draw."""
    return TextToImage(Bundle.load(SHAPES, str(bench.device), bench.dtype))


def work_of(config: ModelConfig, count: int, width: int, height: int) -> tuple[Operations, Operations]:
    """The operations of a guided step and of decoding, for so many pictures of a size in pixels."""
    factor = config.autoencoder.factor
    words = config.text.context_length if isinstance(config.text, ClipTextConfig) else 1
    with torch.device("meta"):
        autoencoder, _, unet = build(config)
        latent = torch.empty(count, config.autoencoder.latent_channels, height // factor, width // factor)
        both, t = torch.empty(2 * count, *latent.shape[1:]), torch.empty(2 * count)
        states = torch.empty(2 * count, words, config.unet.context_width)
    return operations(lambda: unet(both, t, states)), operations(lambda: autoencoder.decode(latent))


def bundle(bench: Bench) -> Iterator[Comparison]:
    """Whole pictures from the prompt on, their first preview, a guided step and decoding, once the program runs."""
    ours = engine(bench)
    request = ours.ready(GenerationRequest(prompt=PROMPT, seed=1, num_images=bench.batch, batch_size=bench.batch))
    assert request.width and request.height and request.steps and request.guidance_scale
    step, decoding = work_of(ours.bundle.config, bench.batch, request.width, request.height)
    calls = network_calls(request, ours.bundle.schedule) or request.steps
    whole = Operations(calls * step.convolution + decoding.convolution, calls * step.product + decoding.product)
    told, empty = (ours.bundle.text.encode([text] * bench.batch).tokens for text in (PROMPT, ""))
    denoise = guided(ours.bundle.denoiser, told, empty, request.guidance_scale)
    x = torch.randn(latent_shape(ours, request), generator=torch.Generator().manual_seed(0)).to(bench.device)

    def picture() -> object:
        *_, last = ours.stream(request)
        return ours.images(request, last.x)

    tasks: dict[str, tuple[Work, Operations]] = {
        f"picture in {request.steps} steps": (picture, whole),
        "first preview": (lambda: ours.preview(next(ours.stream(request))), step),
        "guided step": (lambda: denoise(x, 3.0), step),
        "decode": (lambda: ours.decode(x), decoding),
    }
    for what, (work, amount) in tasks.items():
        yield bench.compare(f"{ours.bundle.name}, batch {bench.batch}: {what}", {OURS: work}, amount)


def latent_shape(ours: TextToImage, request: GenerationRequest) -> tuple[int, int, int, int]:
    """The shape of a batch of latents."""
    assert request.width and request.height
    autoencoder = ours.bundle.autoencoder
    sides = request.height // autoencoder.factor, request.width // autoencoder.factor
    return request.num_images, autoencoder.latent_channels, *sides


def options(bench: Bench) -> Iterator[Comparison]:
    """The same prompts and seeds with every option, one picture at a time, and how far the pictures are from plain."""
    ours = engine(bench)
    tasks = {name: partial(drawn, ours, set_to) for name, set_to in OPTIONS.items()}
    yield differing(bench, f"{ours.bundle.name}, {PROMPTS} pictures with options", tasks)


def precision(bench: Bench) -> Iterator[Comparison]:
    """The same prompts and seeds in 20 steps, computed in fp32 and in bf16, or in fp16 where `auto` is that."""
    formats = torch.float32, torch.bfloat16 if bench.dtype == torch.float32 else bench.dtype
    engines = {str(dtype): TextToImage(Bundle.load(SHAPES, str(bench.device), dtype)) for dtype in formats}
    tasks = {name: partial(drawn, ours, {"steps": STEPS}) for name, ours in engines.items()}
    name = engines[str(torch.float32)].bundle.name
    yield differing(bench, f"{name}, {PROMPTS} pictures of {STEPS} steps in two number formats", tasks)


def drawn(ours: TextToImage, set_to: dict[str, object]) -> Drawn:
    """Pictures of the held-out prompts, half of them with one object, half with two."""
    prompts = [*held_out_prompts(PROMPTS // 2, "one", seed=0), *held_out_prompts(PROMPTS // 2, "two", seed=0)]
    latents, images = [], []
    for seed, prompt in enumerate(prompts):
        request = ours.ready(GenerationRequest(prompt=prompt, seed=seed, **set_to))
        *_, last = ours.stream(request)
        latents.append(last.x)
        images += [to_tensor(made.image) for made in ours.images(request, last.x)]
    return torch.cat(latents), torch.stack(images)


def differing(bench: Bench, what: str, tasks: Mapping[str, Callable[[], Drawn]]) -> Comparison:
    """How long tasks take, and how far what the others draw is from what the first does."""
    results: dict[str, Drawn] = {}

    def keep(name: str) -> None:
        results[name] = tasks[name]()

    found = bench.compare(what, {name: partial(keep, name) for name in tasks}, Operations())
    (latents, images), *_ = results.values()
    for name, (others, pictures) in list(results.items())[1:]:
        error = (others.float() - latents.float()).norm() / latents.float().norm()
        alike = psnr(pictures, images).mean(), ssim(pictures, images).mean()
        found.differs[name] = Difference(float(error), *(float(value) for value in alike))
    return found


BUNDLED = {"bundle": bundle, "options": options, "precision": precision}
