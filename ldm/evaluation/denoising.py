"""The held-out ε-loss: how well noise is told from picture, level by level, and what the caption is worth for it."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.noise import initial_noise, key
from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.figures import Array

BINS = 10
BATCH = 16
CONTEXTS = ("right", "none", "other")
"""The picture's own caption, the empty text, and the next picture's caption that differs."""

Denoise = Callable[[Tensor, float, Sequence[str]], Tensor]
"""The clean estimate of x = x0 + σ·noise (b c h w) at σ, with a caption for each."""


@dataclass(frozen=True)
class Bin:
    """Errors (contexts, n) at one timestep, which stands for the timesteps from `first` to `last`."""

    first: int
    last: int
    timestep: int
    snr: float
    errors: Array


def other_captions(captions: Sequence[str]) -> list[str]:
    """For each caption the next one that differs, around the end. Raises ValueError where all are the same."""
    if len(set(captions)) < 2:
        raise ValueError("got one caption for all pictures, expected at least two different ones")
    doubled = [*captions, *captions]
    return [next(c for c in doubled[i + 1 :] if c != caption) for i, caption in enumerate(captions)]


def timesteps(total: int, bins: int = BINS) -> list[tuple[int, int, int]]:
    """First, last and middle timestep of equal bins of `total` timesteps."""
    edges = [total * i // bins for i in range(bins + 1)]
    return [(low, high - 1, (low + high) // 2) for low, high in itertools.pairwise(edges)]


def held_out_loss(
    denoise: Denoise, schedule: NoiseSchedule, latents: Float[Tensor, "n c h w"], captions: Sequence[str]
) -> list[Bin]:
    """The errors with each of `CONTEXTS`."""
    return errors_by_level(denoise, schedule, latents, (captions, [""] * len(captions), other_captions(captions)))


@torch.inference_mode()
def errors_by_level(
    denoise: Denoise, schedule: NoiseSchedule, latents: Float[Tensor, "n c h w"], given: Sequence[Sequence[str]]
) -> list[Bin]:
    """Squared error of the noise (Ho et al. 2020, Equation 14) of each picture, in every bin, with each caption.

    The noise of picture i at timestep t is a function of (i, t), so that models are compared on the same questions.
    What the network predicts does not matter: the noise is read off the clean estimate, ε = (x − x0)/σ.
    """
    found = []
    for first, last, t in timesteps(len(schedule)):
        sigma = schedule.sigma(t)
        errors = np.stack([_errors(denoise, sigma, t, latents, texts) for texts in given])
        found.append(Bin(first, last, t, sigma**-2, errors))
    return found


def _errors(denoise: Denoise, sigma: float, t: int, latents: Tensor, captions: Sequence[str]) -> Array:
    """The error of each picture (n)."""
    shape = (latents.shape[1], latents.shape[2], latents.shape[3])
    found = []
    for first in range(0, len(latents), BATCH):
        x0 = latents[first : first + BATCH].float()
        seeds = [key(index, t, "held-out loss") for index in range(first, first + len(x0))]
        noise = initial_noise(seeds, shape).to(x0.device)
        x = x0 + sigma * noise
        guessed = (x - denoise(x, sigma, captions[first : first + BATCH]).float()) / sigma
        found.append((guessed - noise).square().mean(dim=(1, 2, 3)).double().cpu().numpy())
    return np.concatenate(found)
