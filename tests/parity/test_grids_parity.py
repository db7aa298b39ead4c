"""Under its convention a walk is the other program's: the timesteps the network is told, and the latent at the end."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion.conventions import route, sampler_of
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import NOISE_SOURCES, NoiseSource
from ldm.diffusion.route import walk
from ldm.diffusion.schedule import scaled_linear
from ldm.models.text import open_clip_module

open_clip_module()  # gives torchvision the operators that a CPU-only torch has not, before diffusers imports it
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.parity

SD = scaled_linear(0.00085, 0.012, 1000)
SHAPE = (4, 8, 8)
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STABLE_DIFFUSION: dict[str, Any] = {**BETAS, "steps_offset": 1}

# Grid of ours → what a scheduler of theirs is told.
SPACED: dict[str, dict[str, Any]] = {name: {"timestep_spacing": name} for name in ("leading", "trailing", "linspace")}
SHAPED: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}
LEADING_KARRAS = {"leading_karras": {"timestep_spacing": "leading", "use_karras_sigmas": True}}
VARIANCE_ONE: dict[str, Any] = {"set_alpha_to_one": False}

# Sampler of ours → scheduler of theirs, its options, and the grids compared.
DETERMINISTIC: list[tuple[str, str, dict[str, Any], dict[str, dict[str, Any]]]] = [
    ("ddim", "DDIMScheduler", {**VARIANCE_ONE, "clip_sample": False}, SPACED),
    ("plms", "PNDMScheduler", {**VARIANCE_ONE, "skip_prk_steps": True}, {"leading": SPACED["leading"]}),
    ("euler", "EulerDiscreteScheduler", {}, {**SPACED, **SHAPED, **LEADING_KARRAS}),
    ("heun", "HeunDiscreteScheduler", {}, {**SPACED, **SHAPED, **LEADING_KARRAS}),
    ("lms", "LMSDiscreteScheduler", {}, {**SPACED, "karras": SHAPED["karras"]}),
    ("dpm_2", "KDPM2DiscreteScheduler", {}, {**SPACED, **SHAPED, **LEADING_KARRAS}),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {}, {**SPACED, **SHAPED}),
    ("deis", "DEISMultistepScheduler", {}, SPACED),
    ("unipc", "UniPCMultistepScheduler", {}, {**SPACED, **SHAPED}),
]
STOCHASTIC: list[tuple[str, str, dict[str, Any], str]] = [
    ("ddpm", "DDPMScheduler", {"clip_sample": False, "timestep_spacing": "leading"}, "leading"),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}, "leading"),
    ("dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler", {"timestep_spacing": "leading"}, "leading"),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "linspace"),
    ("lcm", "LCMScheduler", {**VARIANCE_ONE, "clip_sample": False}, "leading"),
    ("tcd", "TCDScheduler", {**VARIANCE_ONE, "clip_sample": False}, "leading"),
]
CASES = [(*row[:3], grid, options) for row in DETERMINISTIC for grid, options in row[3].items()]


class Mixture:
    """ε of two Gaussian heaps in closed form, as a network of the timestep; it notes the timesteps that it is told."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        timestep = float(t.reshape(-1)[0])
        self.told.append(timestep)
        sigma = SD.sigma(timestep)
        x = x * (1 + sigma**2) ** 0.5
        spread = 0.3**2 + sigma**2
        side = torch.tanh(0.9 * x / spread)  # which of the heaps at ±0.9, weighed by how near they are
        x0 = (0.3**2 * x + sigma**2 * 0.9 * side) / spread
        return (x - x0) / sigma


def ours(sampler: str, grid: str, steps: int, noise: NoiseSource, dtype: torch.dtype) -> tuple[Tensor, list[float]]:
    there = route("diffusers", sampler, grid, SD, steps)
    network = Mixture()
    denoiser = Denoiser(network, SD, dtype=dtype, told=dict(zip(there.sigmas, there.timesteps, strict=False)))
    text = torch.zeros(1, 1, 1, dtype=dtype)
    *_, last = walk(
        sampler_of("diffusers", sampler, grid, SD),
        lambda x, sigma: denoiser(x, sigma, text),
        noise.initial().to(dtype),
        there,
        noise,
    )
    return last.x, network.told


def theirs(scheduler: Any, steps: int, dtype: torch.dtype) -> tuple[Tensor, list[float]]:
    """StableDiffusionPipeline's loop."""
    generator, network = torch.Generator().manual_seed(1), Mixture()
    scheduler.set_timesteps(steps)
    x = torch.randn(1, *SHAPE, generator=generator).to(dtype) * scheduler.init_noise_sigma
    stochastic = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **stochastic).prev_sample
    return x, network.told


@pytest.mark.parametrize("steps", [4, 15, 23])
@pytest.mark.parametrize(("sampler", "scheduler", "fixed", "grid", "options"), CASES)
def test_deterministic_walks_end_where_diffusers_does(
    sampler: str, scheduler: str, fixed: dict[str, Any], grid: str, options: dict[str, Any], steps: int
) -> None:
    made = getattr(diffusers, scheduler)(**{**STABLE_DIFFUSION, **fixed, **options})
    expected, their_timesteps = theirs(made, steps, torch.float64)
    latent, told = ours(sampler, grid, steps, NOISE_SOURCES["stream"]([1], SHAPE), torch.float64)
    assert told == pytest.approx(their_timesteps, abs=2e-3), "what the network is told"
    assert (latent - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("sampler", "scheduler", "options", "grid"), STOCHASTIC)
def test_stochastic_walks_read_one_stream_as_diffusers_does(
    sampler: str, scheduler: str, options: dict[str, Any], grid: str
) -> None:
    config = {**STABLE_DIFFUSION, **options}
    made = getattr(diffusers, scheduler)(**config)
    expected, their_timesteps = theirs(made, 8, torch.float32)
    latent, told = ours(sampler, grid, 8, NOISE_SOURCES["stream"]([1], SHAPE), torch.float32)
    assert told == pytest.approx(their_timesteps, abs=2e-3)
    assert (latent - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_zero_terminal_snr_is_the_same_schedule() -> None:
    made = diffusers.EulerDiscreteScheduler(**BETAS, rescale_betas_zero_snr=True)
    from ldm.diffusion.schedule import zero_terminal_snr

    assert zero_terminal_snr(SD).alphas_cumprod == pytest.approx(
        made.alphas_cumprod.double().numpy(), rel=1e-2, abs=1e-7
    )
    assert np.isclose(zero_terminal_snr(SD).sigma_max, made.sigmas.max().item(), rtol=1e-5)


def test_rescale_is_that_of_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    from ldm.diffusion.guidance import rescaled

    generator = torch.Generator().manual_seed(0)
    with_prompt, output = torch.randn(2, 2, *SHAPE, generator=generator)
    assert torch.allclose(
        rescaled(3 * output, with_prompt, 0.7), rescale_noise_cfg(3 * output, with_prompt, 0.7), atol=1e-6
    )
