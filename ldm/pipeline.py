"""The engine that draws every picture: a request becomes a stream of steps, and the last step becomes images.

Every caller is a loop of this shape:

    for step in pipeline.stream(request):   # progress, preview, stop (`break`), recording (`list`)
        ...
    images = pipeline.images(request, step.x)
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from einops import repeat
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from ldm.bundle import Bundle
from ldm.diffusion.conventions import route, sampler_of
from ldm.diffusion.denoiser import Denoise, Denoiser, Network, one_by_one
from ldm.diffusion.guidance import guided, prompted
from ldm.diffusion.noise import NOISE_SOURCES
from ldm.diffusion.route import Route, listed, walk
from ldm.diffusion.samplers import SAMPLERS, Step
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import MachineError, NotFiniteError
from ldm.images import to_image
from ldm.models.autoencoder import KLAutoencoder
from ldm.models.merging import MergingUNet
from ldm.models.model_config import ModelConfig, build
from ldm.models.reuse import ReusingUNet
from ldm.nn.memory import peak_of
from ldm.request import GenerationRequest, resolve, resolve_seed


@dataclass(frozen=True)
class GeneratedImage:
    """One picture: its place in the request, its own seed, and the settings that draw it again, as JSON values."""

    index: int
    seed: int
    image: Image.Image
    settings: dict[str, object]


class TextToImage:
    """Draws pictures from prompts with the networks of one bundle, where and in the dtype that they are."""

    def __init__(self, bundle: Bundle, device: str | None = None) -> None:
        """With a `device`, networks are on it only while they are asked; else all stay where the bundle is."""
        self.bundle = bundle
        self.device = bundle.device if device is None else torch.device(device)
        self._states: dict[str, Tensor] = {}
        self._asked: tuple[tuple[str, ...], Tensor] | None = None

    def ready(self, request: GenerationRequest) -> GenerationRequest:
        """`request` with the model's settings where it has none, and a seed. Raises SettingError if it does not fit."""
        request = resolve(request, self.bundle.config)
        return request.model_copy(update={"seed": resolve_seed(request.seed)})

    def __call__(self, request: GenerationRequest) -> Iterator[GeneratedImage]:
        """The images of `request`, drawn `batch_size` at a time."""
        first = 0
        for batch in self.ready(request).batches():
            yield from self.images(batch, _last(self.stream(batch)).x, first)
            first += batch.num_images

    def stream(self, request: GenerationRequest) -> Iterator[Step]:
        """The steps of all images of `request` at once; give it one of `request.batches()` to limit the memory."""
        request = self.ready(request)
        self.route(request)
        return self._walk([request.prompt] * request.num_images, request.seeds, request)

    def route(self, request: GenerationRequest) -> Route:
        """Where a resolved request goes. Raises SettingError where its convention cannot."""
        return route_of(request, self.bundle.schedule)

    def images(
        self, request: GenerationRequest, latent: Float[Tensor, "b c h w"], first: int = 0
    ) -> list[GeneratedImage]:
        """The pictures of the last step of `stream(request)`; they are numbered from `first`."""
        made = []
        for offset, (seed, image) in enumerate(zip(request.seeds, self._decode(latent, request), strict=True)):
            alone = request.model_copy(update={"seed": seed, "num_images": 1, "batch_size": 1})
            settings = {**alone.settings(), "model": self.bundle.name, "model_sha256": self.bundle.sha256}
            made.append(GeneratedImage(first + offset, seed, image, settings))
        return made

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], request: GenerationRequest) -> list[Image.Image]:
        """One picture for each of many prompts, each from its own seed; everything else is as in `request`."""
        request = self.ready(request)
        assert request.batch_size is not None
        drawn: list[Image.Image] = []
        for first in range(0, len(prompts), request.batch_size):
            part = slice(first, first + request.batch_size)
            drawn += self._decode(_last(self._walk(prompts[part], seeds[part], request)).x, request)
        return drawn

    @torch.inference_mode()
    def preview(self, step: Step, index: int = 0) -> Image.Image:
        """The clean estimate of one image of a batch: as small as the latent, and almost free."""
        return to_image(self.bundle.autoencoder.preview(step.denoised[index : index + 1])[0])

    @torch.inference_mode()
    def decode(self, latent: Float[Tensor, "b c h w"]) -> list[Image.Image]:
        """Pictures of clean latents; once more in fp32 where half precision overflows. Raises NotFiniteError."""
        if not torch.isfinite(latent).all():
            raise NotFiniteError("latent: the sampler's result is not finite; use --dtype float32 or another sampler")
        with self._lent(self.bundle.autoencoder):
            image = self.bundle.autoencoder.decode(latent)
            if not torch.isfinite(image).all():
                assert isinstance(self.bundle.autoencoder, nn.Module)
                image = copy.deepcopy(self.bundle.autoencoder).float().decode(latent.float())
        if not torch.isfinite(image).all():
            raise NotFiniteError(
                "autoencoder: the picture is not finite, also in fp32; the model is damaged, copy it again"
            )
        return [to_image(one) for one in image]

    def _decode(self, latent: Float[Tensor, "b c h w"], request: GenerationRequest) -> list[Image.Image]:
        """Pictures of clean latents, with `batch_exact` each in a call of its own."""
        with enough_memory(request, len(latent)):
            return [self.decode(one)[0] for one in latent.split(1)] if request.batch_exact else self.decode(latent)

    @torch.inference_mode()
    def _walk(self, prompts: Sequence[str], seeds: Sequence[int], request: GenerationRequest) -> Iterator[Step]:
        """From noise to clean latents, one image for each prompt and seed. `request` is resolved."""
        assert request.width and request.height and request.sampler and request.convention
        factor = self.bundle.autoencoder.factor
        shape = (self.bundle.autoencoder.latent_channels, request.height // factor, request.width // factor)
        there = self.route(request)
        denoise = self._denoise(prompts, request, there)
        noise = NOISE_SOURCES[request.rng](seeds, shape)
        sampler = sampler_of(request.convention, request.sampler, request.schedule, self.bundle.schedule)
        with enough_memory(request, len(prompts)), self._lent(self.bundle.unet):
            yield from walk(sampler, denoise, noise.initial().to(self.device), there, noise)

    def _denoise(self, prompts: Sequence[str], request: GenerationRequest, there: Route) -> Denoise:
        """The clean estimate of a batch, guided; with `batch_exact` of each image in a call of its own."""
        told = dict(zip(there.sigmas, there.timesteps, strict=False))

        def denoiser() -> Denoiser:
            network: Network = self.bundle.unet
            if request.reuse > 1:  # what is reused belongs to these images alone
                network = ReusingUNet(self.bundle.unet, request.reuse)
            if request.merge_tokens > 0.0:
                network = MergingUNet(network, self.bundle.unet, request.merge_tokens)
            return replace(self.bundle.denoiser, network=network, told=told)

        if not request.batch_exact:
            return self._guided(denoiser(), self._encode(prompts), request)
        return one_by_one([self._guided(denoiser(), self._encode([prompt]), request) for prompt in prompts])

    def _guided(self, denoiser: Denoiser, positive: Float[Tensor, "b l d"], request: GenerationRequest) -> Denoise:
        """The clean estimate of images with these prompts, and the guidance that is asked for."""
        assert request.guidance_scale is not None
        if request.guidance_scale == 1.0:
            return prompted(denoiser, positive)
        return guided(
            denoiser,
            positive,
            self._states_of(request.negative_prompt, len(positive)),
            request.guidance_scale,
            rescale=request.guidance_rescale,
            interval=request.guidance_interval,
            perp_neg=request.perp_neg,
            empty=self._states_of("", len(positive)) if request.perp_neg > 0.0 else None,
        )

    def _encode(self, prompts: Sequence[str]) -> Float[Tensor, "b l d"]:
        """The states of every prompt; a prompt that comes again, also in the next batch, is encoded once."""
        different = tuple(dict.fromkeys(prompts))
        if self._asked is None or self._asked[0] != different:
            self._asked = different, self._read(different)
        return self._asked[1][[different.index(prompt) for prompt in prompts]]

    def _read(self, texts: Sequence[str]) -> Float[Tensor, "b l d"]:
        """The states of texts."""
        with self._lent(self.bundle.text):
            return self.bundle.text.encode(texts).tokens

    @contextmanager
    def _lent(self, network: object) -> Iterator[None]:
        """A network on the device that computes, and back where it was."""
        home = self.bundle.device
        if self.device == home:
            yield
            return
        assert isinstance(network, nn.Module)
        network.to(self.device)
        try:
            yield
        finally:
            network.to(home)

    def _states_of(self, text: str, count: int) -> Float[Tensor, "b l d"]:
        """The states of the negative or the empty prompt, kept for the next batch: they seldom change."""
        if text not in self._states:
            self._states = {known: self._states[known] for known in self._states if known == ""}
            self._states[text] = self._read([text])
        return repeat(self._states[text], "1 l d -> b l d", b=count)


def route_of(request: GenerationRequest, schedule: NoiseSchedule) -> Route:
    """Where a resolved request goes. Raises SettingError for steps that its convention cannot run."""
    assert request.convention and request.sampler and request.steps
    if request.schedule is None:
        return listed(schedule, request.sigmas, request.timesteps)
    return route(request.convention, request.sampler, request.schedule, schedule, request.steps)


@contextmanager
def enough_memory(request: GenerationRequest, count: int) -> Iterator[None]:
    """Raises MachineError where the device's memory is not enough for `count` images."""
    try:
        yield
    except torch.OutOfMemoryError:
        what = "a picture" if count == 1 else f"{count} pictures"
        otherwise = "a smaller model, or close other programs" if count == 1 else "or a smaller batch_size"
        raise MachineError(
            f"memory: not enough for {what} of {request.width}x{request.height}; use a smaller size, {otherwise}"
        ) from None


def memory_plan(
    request: GenerationRequest, config: ModelConfig, dtype: torch.dtype, lent: bool = False, sparing: bool = False
) -> dict[str, int]:
    """Bytes that drawing a batch of a resolved request needs: weights, states of a step and of decoding, and in all.

    `lent`: of the networks only the one that is asked is on the device; `sparing`: it decodes in bands.
    """
    assert request.width and request.height and request.batch_size
    count, factor = min(request.num_images, request.batch_size), config.autoencoder.factor
    with torch.device("meta"):
        autoencoder, text, unet = build(config)
        if sparing and isinstance(autoencoder, KLAutoencoder):
            autoencoder.spare_memory()
        assert isinstance(autoencoder, nn.Module) and isinstance(text, nn.Module)
        unet, autoencoder = unet.to(dtype), autoencoder.to(dtype)
        shape = (count, autoencoder.latent_channels, request.height // factor, request.width // factor)
        latent = torch.empty(shape, dtype=dtype)
        states = torch.empty(request.passes * count, 77, config.unet.context_width, dtype=dtype)
        step = peak_of(lambda: unet(latent, torch.empty(count), states))
        decode = peak_of(lambda: autoencoder.decode(latent))
    parts = [sum(t.nbytes for t in network.state_dict().values()) for network in (text, unet, autoencoder)]
    text_bytes, unet_bytes, decoder_bytes = parts
    whole = max(text_bytes, unet_bytes + step, decoder_bytes + decode) if lent else sum(parts) + max(step, decode)
    return {"weights": sum(parts), "step": step, "decode": decode, "whole": whole}


class Silence:
    """No noise at all, for a walk that only counts."""

    def __call__(self, step: int, purpose: str) -> Tensor:
        """A zero."""
        return torch.zeros(1)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """A zero."""
        return torch.zeros(1)


def network_calls(request: GenerationRequest, schedule: NoiseSchedule) -> int | None:
    """How often the network is asked for all images of a resolved request, counted by a walk that costs nothing.

    None where it depends on the picture.
    """
    assert request.sampler and request.convention
    if SAMPLERS[request.sampler].calls is None:
        return None
    calls = 0

    def count(x: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    sampler = sampler_of(request.convention, request.sampler, request.schedule, schedule)
    _last(walk(sampler, count, torch.zeros(1), route_of(request, schedule), Silence()))
    return calls * (request.num_images if request.batch_exact else len(list(request.batches())))


def _last(steps: Iterator[Step]) -> Step:
    for step in steps:
        last = step
    return last
