"""Every sampler of the table walks a known distribution from noise to its known answer."""

import pytest
import torch
from torch import Tensor

from ldm.diffusion.noise import KeyedNoise
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.samplers.ddim import ddim
from ldm.diffusion.samplers.ddpm import ddpm
from ldm.diffusion.samplers.euler import euler, euler_ancestral
from ldm.diffusion.schedule import GRIDS, scaled_linear

SD = scaled_linear(0.00085, 0.012, 1000)
MEAN, STD = 0.8, 0.5


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """The exact clean estimate where the data are N(MEAN, STD²)."""
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def draw(name: str, steps: int, n: int = 64, grid: str = "trailing") -> Tensor:
    sigmas = GRIDS[grid](SD, steps)
    shape = (1, n, n)
    noise = KeyedNoise([1], shape)
    x = noise(-1, "initial").double() * (STD**2 + sigmas[0] ** 2) ** 0.5 + MEAN
    return list(SAMPLERS[name](gaussian, x, sigmas, noise=noise))[-1].x


@pytest.mark.parametrize("name", SAMPLERS)
def test_reproduces_mean_and_spread(name: str) -> None:
    result = draw(name, steps=1000)
    assert result.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert result.std().item() == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize("name", SAMPLERS)
def test_yields_one_step_per_level_and_one_call_each(name: str) -> None:
    calls: list[float] = []

    def counted(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return gaussian(x, sigma)

    sigmas = GRIDS["karras"](SD, 7)
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    steps = list(SAMPLERS[name](counted, x, sigmas, noise=KeyedNoise([1], (1, 2, 2))))
    assert calls == sigmas[:-1]
    assert [step.index for step in steps] == list(range(7)) and {step.total for step in steps} == {7}
    assert [step.sigma for step in steps] == sigmas[1:]
    assert steps[-1].x.dtype == torch.float64
    assert torch.allclose(steps[-1].x, steps[-1].denoised), "the last step arrives at the clean estimate"


def exact(x: float, sigma: float, sigma_next: float) -> float:
    """The probability-flow ODE of the Gaussian, solved: distances to the mean scale with the total spread."""
    return MEAN + (x - MEAN) * ((STD**2 + sigma_next**2) / (STD**2 + sigma**2)) ** 0.5


@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_deterministic_samplers_converge_with_order_one(name: str) -> None:
    errors = []
    for steps in (64, 128):
        ratio = (0.1 / 10.0) ** (1 / steps)
        sigmas = [10.0 * ratio**i for i in range(steps + 1)]
        x = torch.full((1, 1, 1, 1), 5.0, dtype=torch.float64)
        result = list(SAMPLERS[name](gaussian, x, sigmas))[-1].x.item()
        errors.append(abs(result - exact(5.0, 10.0, 0.1)))
    order = torch.log2(torch.tensor(errors[0] / errors[1])).item()
    assert order == pytest.approx(1.0, abs=0.15)


def test_ddim_without_noise_is_euler_and_with_all_of_it_is_ddpm() -> None:
    sigmas, shape = GRIDS["leading"](SD, 20), (1, 4, 4)
    noise = KeyedNoise([1], shape)
    x = noise(-1, "initial").double() * sigmas[0]

    def last(steps: object) -> Tensor:
        return list(steps)[-1].x  # type: ignore[call-overload]

    assert torch.allclose(last(ddim(gaussian, x, sigmas)), last(euler(gaussian, x, sigmas)))

    def same(step: int, purpose: str) -> Tensor:
        return noise(step, "same")

    full = last(ddim(gaussian, x, sigmas, same, eta=1.0))
    assert torch.allclose(full, last(ddpm(gaussian, x, sigmas, same)))
    assert torch.allclose(full, last(euler_ancestral(gaussian, x, sigmas, same)))


def test_ddpm_takes_the_posterior_of_its_paper() -> None:
    """Against Ho et al. 2020, Equations 6 and 7, written in their own coordinate x_t = √ᾱ_t (x0 + σ·noise)."""
    alphas, betas = SD.alphas_cumprod, SD.betas
    t, x0, z = 400, 0.3, 1.7
    x_t = 0.9
    mean = (
        alphas[t - 1] ** 0.5 * betas[t] / (1 - alphas[t]) * x0
        + (1 - betas[t]) ** 0.5 * (1 - alphas[t - 1]) / (1 - alphas[t]) * x_t
    )
    variances = {"posterior": betas[t] * (1 - alphas[t - 1]) / (1 - alphas[t]), "beta": betas[t]}
    for variance, value in variances.items():
        x = torch.full((1, 1, 1, 1), x_t / alphas[t] ** 0.5, dtype=torch.float64)
        step = next(
            ddpm(
                lambda x, sigma: torch.full_like(x, x0),
                x,
                [float(SD.sigmas[t]), float(SD.sigmas[t - 1]), 0.0],
                lambda step, purpose: torch.full((1, 1, 1, 1), z, dtype=torch.float64),
                variance=variance,  # type: ignore[arg-type]
            )
        )
        assert step.x.item() * alphas[t - 1] ** 0.5 == pytest.approx(mean + value**0.5 * z, rel=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral"])
def test_stochastic_samplers_ask_for_a_noise_source(name: str) -> None:
    with pytest.raises(ValueError, match="noise"):
        list(SAMPLERS[name](gaussian, torch.zeros(1, 1, 1, 1), [1.0, 0.5, 0.0]))
