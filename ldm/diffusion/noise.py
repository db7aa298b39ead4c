"""Where noise comes from: always fp32 on the CPU, so that an image depends on its own seed and on nothing else."""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Float[Tensor, "b c h w"]:
    """Standard normal noise, image i from a generator seeded with `seeds[i]` alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def key(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed that is a function of (seed, step, purpose)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class KeyedNoise:
    """Noise of a sampler's steps, keyed by (the image's seed, step, purpose): batch and position change nothing."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int]) -> None:
        self.seeds = tuple(seeds)
        self.shape = shape

    def __call__(self, step: int, purpose: str) -> Float[Tensor, "b c h w"]:
        """Standard normal noise for every image of the batch."""
        return initial_noise([key(seed, step, purpose) for seed in self.seeds], self.shape)
