"""Samplers: generators that walk from noise to a clean latent by asking for clean estimates.

A sampler is called as `sampler(denoise, x, sigmas, noise=None)` with x = x0 + σ₀·noise and `sigmas` falling to 0, and
yields a `Step` after each step; the last one has the result as `.x`. Adding one is one generator and one line here.
No file of this package imports torch: a sampler is arithmetic on whatever `denoise` understands.
"""

from ldm.diffusion.samplers.ddim import ddim
from ldm.diffusion.samplers.ddpm import ddpm
from ldm.diffusion.samplers.euler import euler, euler_ancestral
from ldm.diffusion.samplers.step import Denoise, Noise, Sampler, Step

SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
}

__all__ = ["SAMPLERS", "Denoise", "Noise", "Sampler", "Step"]
