"""The mathematics has its known answers: schedules, the forward process, and the denoiser."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.forward import diffuse, diffuse_step
from ldm.diffusion.schedule import linear, scaled_linear

SD = scaled_linear(0.00085, 0.012, 1000)


def test_stable_diffusions_schedule_has_its_golden_numbers() -> None:
    assert SD.alphas_cumprod[0] == pytest.approx(0.99915)
    assert SD.alphas_cumprod[999] == pytest.approx(0.00466010, rel=1e-5)
    assert SD.sigma_min == pytest.approx(0.0291672, rel=1e-5)
    assert SD.sigma_max == pytest.approx(14.614641, rel=1e-6)
    assert SD.betas[0] == pytest.approx(0.00085) and SD.betas[999] == pytest.approx(0.012)


def test_ddpms_schedule_is_linear() -> None:
    assert linear(1e-4, 0.02, 1000).betas == pytest.approx(np.linspace(1e-4, 0.02, 1000))


def test_timestep_and_sigma_are_inverse() -> None:
    for t in (0.0, 0.25, 17.0, 500.5, 999.0):
        assert SD.timestep(SD.sigma(t)) == pytest.approx(t, abs=1e-9)
    assert SD.timestep(0.0) == 0.0 and SD.timestep(1e9) == 999.0


def test_one_jump_and_many_small_steps_agree_in_distribution() -> None:
    schedule = linear(1e-4, 0.02, 1000)
    generator = torch.Generator().manual_seed(0)
    n, last = 20_000, 199
    x0 = torch.full((n, 1, 1, 1), 0.7, dtype=torch.float64)
    stepped = x0
    for t in range(last + 1):
        stepped = diffuse_step(schedule, stepped, t, torch.randn(x0.shape, generator=generator, dtype=x0.dtype))
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    jumped = diffuse(schedule, x0, torch.full((n,), last), noise)
    alpha = schedule.alphas_cumprod[last]
    for sample in (stepped, jumped):
        assert sample.mean().item() == pytest.approx(0.7 * alpha**0.5, abs=4 * ((1 - alpha) / n) ** 0.5)
        assert sample.var().item() == pytest.approx(1 - alpha, rel=4 * (2 / n) ** 0.5)
    ranks = torch.linspace(0.01, 0.99, 99, dtype=x0.dtype)
    assert (stepped.flatten().quantile(ranks) - jumped.flatten().quantile(ranks)).abs().max() < 0.05


def exact_network(x0: Tensor, prediction: Prediction) -> object:
    """A network that knows the one clean latent there is."""

    def network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        alpha = torch.from_numpy(SD.alphas_cumprod)[t.round().long()].to(x.dtype)[:, None, None, None]
        noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
        return {"eps": noise, "v": v, "x0": x0.expand_as(x)}[prediction]

    return network


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_every_parameterisation_finds_the_clean_latent(prediction: Prediction) -> None:
    x0, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(exact_network(x0, prediction), SD, prediction, torch.float64)
    text = torch.zeros(1, 1, 1, dtype=torch.float64)
    for t in (0, 10, 500, 999):
        sigma = float(SD.sigmas[t])
        assert torch.allclose(denoiser(x0 + sigma * noise, sigma, text), x0, atol=1e-6)
        assert denoiser.loss(x0, noise, torch.tensor([t]), text).item() < 1e-6


def test_loss_is_the_mean_squared_error_of_epsilon_per_image() -> None:
    x0, noise = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    denoiser = Denoiser(lambda x, t, context: torch.stack([torch.zeros_like(x[0]), 3 * torch.ones_like(x[0])]), SD)
    text = torch.zeros(2, 1, 1)
    assert denoiser.loss(x0, noise, torch.tensor([5, 5]), text).tolist() == [1.0, 4.0]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_and_debiased_weights_are_those_of_their_papers(prediction: Prediction) -> None:
    x0, noise = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    denoiser = Denoiser(lambda x, t, context: torch.ones_like(x), SD, prediction)
    t = torch.tensor([0, 999])
    weights = denoiser.loss(x0, noise, t, torch.zeros(2, 1, 1), min_snr_gamma=5.0)
    snr = SD.alphas_cumprod[[0, 999]] / (1 - SD.alphas_cumprod[[0, 999]])
    divisor = {"eps": snr, "v": snr + 1, "x0": np.ones(2)}[prediction]
    assert weights.tolist() == pytest.approx((np.minimum(snr, 5.0) / divisor).tolist(), rel=1e-4)
    weights = denoiser.loss(x0, noise, t, torch.zeros(2, 1, 1), debiased=True)
    assert weights.tolist() == pytest.approx((np.sqrt(snr) / divisor).tolist(), rel=1e-4)
