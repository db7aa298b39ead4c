"""Where noise comes from: always fp32 on the CPU, so that an image depends on its own seed and on nothing else."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion import philox
from ldm.diffusion.brownian import BrownianPath

Shape = tuple[int, int, int]


class NoiseSource(Protocol):
    """The noise of one batch: unit noise to start from, and a sampler's."""

    def initial(self) -> Tensor:
        """Standard normal noise (b c h w) to start from."""
        ...

    def __call__(self, step: int, purpose: str) -> Tensor:
        """Standard normal noise (b c h w) for one purpose of one step."""
        ...

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """The increment (b c h w) of a Brownian path between two noise levels, at variance one."""
        ...


def initial_noise(seeds: Sequence[int], shape: Shape) -> Float[Tensor, "b c h w"]:
    """Standard normal noise, image i from a generator seeded with `seeds[i]` alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def key(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed that is a function of (seed, step, purpose)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class KeyedNoise:
    """Noise of a sampler's steps, keyed by (the image's seed, step, purpose): batch and position change nothing.

    `between` is keyed by (the image's seed, noise levels): another number of steps meets the same Brownian path.
    """

    def __init__(self, seeds: Sequence[int], shape: Shape) -> None:
        self.seeds = tuple(seeds)
        self.shape = shape
        self.path = BrownianPath(lambda node: self(0, f"brownian {node}"))

    def initial(self) -> Float[Tensor, "b c h w"]:
        """Noise from the image's seed itself."""
        return initial_noise(self.seeds, self.shape)

    def __call__(self, step: int, purpose: str) -> Float[Tensor, "b c h w"]:
        """Standard normal noise for every image of the batch."""
        return initial_noise([key(seed, step, purpose) for seed in self.seeds], self.shape)

    def between(self, sigma: float, sigma_next: float) -> Float[Tensor, "b c h w"]:
        """The increment of each image's own path, at variance one."""
        return self.path.between(sigma, sigma_next)


class StreamNoise:
    """One stream for each image, read on whatever is asked for, as in other programs: a change shifts what follows."""

    def __init__(self, streams: Sequence[Iterator[Tensor]]) -> None:
        self.streams = tuple(streams)

    def initial(self) -> Float[Tensor, "b c h w"]:
        """What comes next of each stream."""
        return torch.stack([next(stream) for stream in self.streams])

    def __call__(self, step: int, purpose: str) -> Float[Tensor, "b c h w"]:
        """What comes next of each stream."""
        return self.initial()

    def between(self, sigma: float, sigma_next: float) -> Float[Tensor, "b c h w"]:
        """What comes next of each stream: no path is kept."""
        return self.initial()


def cpu_stream(seed: int, shape: Shape) -> Iterator[Float[Tensor, "c h w"]]:
    """The draws of one PyTorch generator on the CPU, as diffusers is used and k-diffusion on a CPU."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=generator)


def cuda_stream(seed: int, shape: Shape) -> Iterator[Float[Tensor, "c h w"]]:
    """The draws of one PyTorch generator on CUDA, on any device (AUTOMATIC1111: GPU and NV)."""
    for call in itertools.count():
        yield torch.from_numpy(philox.randn(seed, call, shape))


NOISE_SOURCES: dict[str, Callable[[Sequence[int], Shape], NoiseSource]] = {
    "keyed": KeyedNoise,
    "stream": lambda seeds, shape: StreamNoise([cpu_stream(seed, shape) for seed in seeds]),
    "philox": lambda seeds, shape: StreamNoise([cuda_stream(seed, shape) for seed in seeds]),
}
