"""Distilling: where the answer is known, the loss is least at it; one guidance scale is built in."""

from typing import Literal

import pytest
import torch
from conftest import tiny_model
from pydantic import ValidationError
from torch import Tensor, nn

from ldm.bundle import noise_schedule
from ldm.diffusion.forward import alphas_cumprod_at, diffuse
from ldm.models.model_config import ModelConfig
from ldm.training.batch import Batch, Draws
from ldm.training.consistency import ConsistencyTraining, clean_and_noise, consistency_losses, few_steps

Prediction = Literal["eps", "v", "x0"]
STAGE = {"steps": 10, "batch_size": 64, "learning_rate": 1e-3, "side": 64, "precision": "no"}
SPREAD, GUIDED = 0.6, 3.0
COUNT = 64


def model(prediction: Prediction = "eps") -> ModelConfig:
    return tiny_model().config.model_copy(update={"prediction": prediction})


class Gaussian(nn.Module):
    """What a network says that knows all of x0 ~ N(text, SPREAD²): the mean of x0, or where its trajectory ends."""

    def __init__(self, config: ModelConfig, ends: bool, guidance: float = 1.0) -> None:
        super().__init__()
        self.schedule, self.prediction = noise_schedule(config), config.prediction
        self.ends, self.guidance = ends, guidance

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x, t = (torch.cat([each] * (len(text) // len(x))) for each in (x, t))
        alpha = alphas_cumprod_at(self.schedule, t.long(), x)
        middle = self.guidance * text.mean(dim=(1, 2))[:, None, None, None]
        wide = (alpha * SPREAD**2 + 1 - alpha).sqrt()  # of x_t
        share = SPREAD / wide if self.ends else alpha.sqrt() * SPREAD**2 / wide**2
        x0 = middle + share * (x - alpha.sqrt() * middle)
        noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return {"eps": noise, "x0": x0, "v": alpha.sqrt() * noise - (1 - alpha).sqrt() * x0}[self.prediction]


def batch() -> Batch:
    drawn = torch.Generator().manual_seed(0)
    text = torch.randn(COUNT, 1, 1, generator=drawn).expand(-1, 3, 2)
    mean = text[:, :1, :1, None].expand(-1, 4, 2, 2)
    return Batch((mean, torch.full_like(mean, SPREAD), text), (torch.zeros(1, 3, 2),))


def loss(student: nn.Module, config: ModelConfig, steps: int, guidance: float) -> float:
    stage = ConsistencyTraining(teacher_steps=steps, guidance_scale=guidance, **STAGE)
    objective = consistency_losses(config, noise_schedule(config), stage, Gaussian(config, ends=False))
    found = [objective(student, batch(), Draws(3, step, COUNT))["loss"] for step in range(4)]
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_what_knows_where_trajectories_end_has_the_least_loss(prediction: Prediction) -> None:
    config = model(prediction)
    known = loss(Gaussian(config, ends=True), config, 50, 1.0)
    assert known < 0.1 * loss(Gaussian(config, ends=False), config, 50, 1.0), "the mean is not where it ends"
    assert loss(Gaussian(config, ends=True), config, 500, 1.0) < 0.2 * known, (
        "what is left are the teacher's long steps"
    )


def test_guidance_is_built_in() -> None:
    config = model()
    known = loss(Gaussian(config, ends=True, guidance=GUIDED), config, 50, GUIDED)
    assert known < 0.1 * loss(Gaussian(config, ends=True), config, 50, GUIDED)
    assert loss(Gaussian(config, ends=True), config, 50, 1.0) < 0.1 * loss(
        Gaussian(config, ends=True, guidance=GUIDED), config, 50, 1.0
    )


def test_the_student_learns_and_neither_the_teacher_nor_the_goal_does() -> None:
    config = model()
    stage = ConsistencyTraining(guidance_scale=2, **STAGE)
    torch.manual_seed(0)
    student, teacher = (nn.Conv2d(4, 4, 1) for _ in range(2))
    asked = []

    class Network(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            asked.append((self.conv is student, torch.is_grad_enabled(), len(text)))
            return torch.cat([self.conv(x)] * (len(text) // len(x)))

    made = consistency_losses(config, noise_schedule(config), stage, Network(teacher))
    losses = made(Network(student), batch(), Draws(0, 0, COUNT))
    losses["loss"].backward()
    assert asked == [(False, False, 2 * COUNT), (True, False, COUNT), (True, True, COUNT)]
    assert student.weight.grad is not None and teacher.weight.grad is None
    assert losses["error"].shape == losses["timestep"].shape == (COUNT,)
    assert set((losses["timestep"] % 20).tolist()) == {19} and int(losses["timestep"].max()) <= 999


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_clean_picture_and_noise_are_found_again(prediction: Prediction) -> None:
    config = model(prediction)
    schedule, t = noise_schedule(config), torch.tensor([0, 500, 999])
    x0, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    x, alpha = diffuse(schedule, x0, t, noise), alphas_cumprod_at(schedule, t, x0)
    said = {"eps": noise, "x0": x0, "v": alpha.sqrt() * noise - (1 - alpha).sqrt() * x0}[prediction]
    for found, known in zip(clean_and_noise(prediction, x, said, alpha), (x0, noise), strict=True):
        assert torch.allclose(found, known, atol=1e-8)


def test_a_distilled_model_draws_in_four_steps_with_one_text() -> None:
    config = model()
    sampling = few_steps(config).sampling
    assert (sampling.sampler, sampling.steps, sampling.guidance_scale) == ("lcm", 4, 1.0)
    assert (sampling.width, few_steps(config).unet) == (config.sampling.width, config.unet)


@pytest.mark.parametrize("setting", ["min_snr_gamma", "debiased", "late_share", "offset_noise"])
def test_weights_of_noise_are_refused(setting: str) -> None:
    with pytest.raises(ValidationError, match="for errors of noise"):
        ConsistencyTraining.model_validate(
            {"guidance_scale": 2, **STAGE, setting: 0.5 if setting != "debiased" else True}
        )
