"""Contests of the bundle that ships: what a user waits for, and what is spared by options that change the picture."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.data.shapes import held_out_prompts
from ldm.diffusion.guidance import guided
from ldm.evaluation.contests import OURS, PROMPT, Bench
from ldm.evaluation.reconstruction import psnr
from ldm.evaluation.speed import Comparison, Difference, Operations, Work, operations
from ldm.formats.finding import DEFAULT
from ldm.images import to_tensor
from ldm.models.model_config import ModelConfig, build
from ldm.models.text import ClipTextConfig
from ldm.pipeline import TextToImage, network_calls
from ldm.request import GenerationRequest

# Prompts that every option draws: half of them with one object, half with two.
PROMPTS = 8
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
    return TextToImage(Bundle.load(DEFAULT, str(bench.device), bench.dtype))


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
    prompts = [*held_out_prompts(PROMPTS // 2, "one", seed=0), *held_out_prompts(PROMPTS // 2, "two", seed=0)]
    drawn: dict[str, tuple[Tensor, Tensor]] = {}

    def draw(option: str) -> None:
        latents, images = [], []
        for seed, prompt in enumerate(prompts):
            request = ours.ready(GenerationRequest(prompt=prompt, seed=seed, **OPTIONS[option]))
            *_, last = ours.stream(request)
            latents.append(last.x)
            images += [to_tensor(made.image) for made in ours.images(request, last.x)]
        drawn[option] = torch.cat(latents), torch.stack(images)

    what = f"{ours.bundle.name}, {PROMPTS} pictures with options"
    found = bench.compare(what, {option: partial(draw, option) for option in OPTIONS}, Operations())
    plain, *others = OPTIONS
    latents, images = drawn[plain]
    for option in others:
        error = (drawn[option][0] - latents).norm() / latents.norm()
        found.differs[option] = Difference(float(error), float(psnr(drawn[option][1], images).mean()))
    yield found


BUNDLED = {"bundle": bundle, "options": options}
