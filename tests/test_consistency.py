"""Distilling: where the answer is known, the loss is least at it; one guidance scale is built in."""

from typing import Literal

import pytest
import torch
from helpers import tiny_model
from pydantic import ValidationError
from torch import Tensor, nn

from ldm.bundle import noise_schedule
from ldm.diffusion.forward import alphas_cumprod_at, diffuse
from ldm.errors import SettingError
from ldm.models.model_config import ModelConfig
from ldm.pipeline import route_of
from ldm.request import GenerationRequest, resolve
from ldm.training.batch import Batch, Draws
from ldm.training.consistency import ConsistencyTraining, clean_and_noise, consistency_losses, few_steps, stride

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
    stage = ConsistencyTraining(guidance_scale=guidance, **STAGE)
    objective = consistency_losses(config, noise_schedule(config), stage, Gaussian(config, ends=False), steps)
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


def test_the_last_step_ends_in_what_the_teacher_says_and_not_in_the_student() -> None:
    config = model()
    teacher = Gaussian(config, ends=False)
    assert loss(teacher, config, 1, 1.0) < 1e-7, "of one step the last is the first"
    assert loss(Gaussian(config, ends=True), config, 1, 1.0) > 0.01


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


def test_a_distilled_model_is_asked_in_four_steps_about_what_it_learned() -> None:
    config = model()
    made, schedule = few_steps(config), noise_schedule(config)
    sampling = made.sampling
    assert (sampling.sampler, sampling.steps, sampling.guidance_scale) == ("lcm", 4, 1.0)
    assert (sampling.width, made.unet) == (config.sampling.width, config.unet)
    route = route_of(resolve(GenerationRequest(prompt="any"), made), schedule)
    visited = [schedule.timestep(sigma) for sigma in route.sigmas[:-1]]
    assert visited == pytest.approx([999, 759, 499, 259], abs=1e-3)
    assert all((round(t) + 1) % stride(len(schedule)) == 0 for t in visited)


@pytest.mark.parametrize("timesteps", [30, 999, 1001])
def test_a_schedule_that_cannot_be_gone_in_equal_steps_is_refused(timesteps: int) -> None:
    with pytest.raises(SettingError, match=f"{timesteps} cannot be gone in 50 equal steps"):
        stride(timesteps)


def test_dropout_is_the_same_in_both_looks_and_half_precision_learns_everywhere() -> None:
    config = model()
    stage = ConsistencyTraining(guidance_scale=2, **STAGE)
    torch.manual_seed(0)
    dropped = []

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            rows = torch.cat([x] * (len(text) // len(x))).movedim(1, -1)
            dropped.append(self.dropout(torch.ones_like(rows)) == 0)
            return self.linear(rows).movedim(-1, 1)

    student, teacher = Network(), Network().eval().requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        consistency_losses(config, noise_schedule(config), stage, teacher)(student, batch(), Draws(0, 0, COUNT))[
            "loss"
        ].backward()
    of_teacher, without, with_gradient = dropped
    assert not of_teacher.any() and without.any() and torch.equal(without, with_gradient)
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters())


@pytest.mark.parametrize("setting", ["min_snr_gamma", "debiased", "late_share", "offset_noise"])
def test_weights_of_noise_are_refused(setting: str) -> None:
    with pytest.raises(ValidationError, match="for errors of noise"):
        ConsistencyTraining.model_validate(
            {"guidance_scale": 2, **STAGE, setting: 0.5 if setting != "debiased" else True}
        )
