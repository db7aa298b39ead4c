"""The engine that draws every picture: a request becomes a stream of steps, and the last step becomes images.

Every caller is a loop of this shape:

    for step in pipeline.stream(request):   # progress, preview, stop (`break`), recording (`list`)
        ...
    images = pipeline.images(request, step.x)
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from ldm.bundle import Bundle
from ldm.diffusion.guidance import guided
from ldm.diffusion.noise import KeyedNoise, initial_noise
from ldm.diffusion.samplers import SAMPLERS, Step
from ldm.diffusion.schedule import GRIDS, NoiseSchedule
from ldm.errors import MachineError, NotFiniteError
from ldm.images import to_image
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

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._states: dict[str, Tensor] = {}

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
        return self._walk([request.prompt] * request.num_images, request.seeds, request)

    def images(
        self, request: GenerationRequest, latent: Float[Tensor, "b c h w"], first: int = 0
    ) -> list[GeneratedImage]:
        """The pictures of the last step of `stream(request)`; they are numbered from `first`."""
        made = []
        for offset, (seed, image) in enumerate(zip(request.seeds, self.decode(latent), strict=True)):
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
            drawn += self.decode(_last(self._walk(prompts[part], seeds[part], request)).x)
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
        image = self.bundle.autoencoder.decode(latent)
        if not torch.isfinite(image).all():
            assert isinstance(self.bundle.autoencoder, nn.Module)
            image = copy.deepcopy(self.bundle.autoencoder).float().decode(latent.float())
        if not torch.isfinite(image).all():
            raise NotFiniteError(
                "autoencoder: the picture is not finite, also in fp32; the model is damaged, copy it again"
            )
        return [to_image(one) for one in image]

    @torch.inference_mode()
    def _walk(self, prompts: Sequence[str], seeds: Sequence[int], request: GenerationRequest) -> Iterator[Step]:
        """From noise to clean latents, one image for each prompt and seed. `request` is resolved."""
        assert request.width and request.height and request.steps and request.guidance_scale is not None
        assert request.sampler and request.schedule
        factor = self.bundle.autoencoder.factor
        shape = (self.bundle.autoencoder.latent_channels, request.height // factor, request.width // factor)
        sigmas = GRIDS[request.schedule](self.bundle.schedule, request.steps)
        positive = self._encode(prompts)
        negative = repeat(self._null(request.negative_prompt), "1 l d -> b l d", b=len(prompts))
        denoise = guided(self.bundle.denoiser, positive, negative, request.guidance_scale)
        x = initial_noise(seeds, shape).to(self.bundle.device) * sigmas[0]
        try:
            yield from SAMPLERS[request.sampler](denoise, x, sigmas, noise=KeyedNoise(seeds, shape))
        except torch.OutOfMemoryError:
            raise MachineError(
                f"memory: not enough for {len(prompts)} images of {request.width}x{request.height}; "
                "use a smaller size, then a smaller batch_size"
            ) from None

    def _encode(self, prompts: Sequence[str]) -> Float[Tensor, "b l d"]:
        """The states of every prompt; a prompt that comes again is encoded once."""
        different = list(dict.fromkeys(prompts))
        return self.bundle.text.encode(different).tokens[[different.index(prompt) for prompt in prompts]]

    def _null(self, negative_prompt: str) -> Float[Tensor, "1 l d"]:
        """The states of the negative prompt, kept for the next batch: it seldom changes."""
        if negative_prompt not in self._states:
            self._states = {negative_prompt: self._encode([negative_prompt])}
        return self._states[negative_prompt]


def network_calls(request: GenerationRequest, schedule: NoiseSchedule) -> int:
    """How often the network is asked for all images of a resolved request, counted by a walk that costs nothing."""
    assert request.sampler and request.schedule and request.steps
    calls = 0

    def count(x: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    sigmas = GRIDS[request.schedule](schedule, request.steps)
    _last(SAMPLERS[request.sampler](count, torch.zeros(1), sigmas, noise=lambda step, purpose: torch.zeros(1)))
    return calls * len(list(request.batches()))


def _last(steps: Iterator[Step]) -> Step:
    for step in steps:
        last = step
    return last
