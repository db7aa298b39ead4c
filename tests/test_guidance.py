"""Guidance rules have their closed forms, and no estimate is computed that none of them needs."""

import pytest
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Prediction, one_by_one
from ldm.diffusion.guidance import guided, perpendicular, rescaled, within
from ldm.diffusion.schedule import scaled_linear

SD = scaled_linear(0.00085, 0.012, 1000)


def text(*values: float) -> Tensor:
    """Texts whose states are these numbers."""
    return torch.tensor(values)[:, None, None]


class Says:
    """A network that says of every latent what its texts are, and counts the texts."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.sizes.append(len(context))
        return context[:, :, :1, None].expand(-1, *x.shape[1:])


def test_guidance_is_one_call_and_skips_the_unprompted_estimate_at_scale_one() -> None:
    network = Says()
    denoiser, x = Denoiser(network, SD, "x0"), torch.zeros(1, 1, 1, 1)
    assert guided(denoiser, text(3.0), text(1.0), 1.0)(x, 1.0).item() == 3.0
    assert guided(denoiser, text(3.0), text(1.0), 2.5)(x, 1.0).item() == 1.0 + 2.5 * 2.0
    assert guided(denoiser, text(3.0), text(1.0), 0.0)(x, 1.0).item() == 1.0
    assert network.sizes == [1, 2, 2]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_guiding_what_the_network_says_is_guiding_the_clean_estimate(prediction: Prediction) -> None:
    denoiser, x = Denoiser(Says(), SD, prediction), torch.full((1, 1, 2, 2), 0.7)
    for sigma in (0.1, 3.0):
        with_prompt, without = denoiser(x, sigma, text(3.0)), denoiser(x, sigma, text(1.0))
        expected = without + 4.0 * (with_prompt - without)
        assert torch.allclose(guided(denoiser, text(3.0), text(1.0), 4.0)(x, sigma), expected, atol=1e-5)


def test_guidance_is_only_within_its_interval() -> None:
    network = Says()
    denoise = guided(Denoiser(network, SD, "x0"), text(3.0), text(1.0), 2.0, interval=(0.5, 2.0))
    x = torch.zeros(1, 1, 1, 1)
    assert [denoise(x, sigma).item() for sigma in (3.0, 2.0, 1.0, 0.5, 0.1)] == [3.0, 5.0, 5.0, 3.0, 3.0]
    assert network.sizes == [1, 2, 2, 1, 1]
    assert within((0.0, 1.0), lambda x, sigma: x + 1, lambda x, sigma: x)(x, 0.5).item() == 1.0


def test_rescale_brings_back_the_spread_that_the_prompt_alone_has() -> None:
    generator = torch.Generator().manual_seed(0)
    with_prompt, output = (
        torch.randn(2, 2, 4, 8, 8, generator=generator) * torch.tensor([1.0, 5.0])[:, None, None, None, None]
    )
    assert torch.equal(rescaled(output, with_prompt, 0.0), output)
    spread = rescaled(output, with_prompt, 1.0).std(dim=(1, 2, 3))
    assert torch.allclose(spread, with_prompt.std(dim=(1, 2, 3)), rtol=1e-5)
    half = (rescaled(output, with_prompt, 1.0) + output) / 2
    assert torch.allclose(rescaled(output, with_prompt, 0.5), half, atol=1e-5)


def test_rescale_is_of_what_the_network_says() -> None:
    """Lin et al. 2024 rescale the prediction, so for ε the clean estimate keeps x − σ·(rescaled ε)."""
    states = torch.randn(2, 1, 1, generator=torch.Generator().manual_seed(0))
    pattern = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return pattern * context[:, :, :1, None]

    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    denoise = guided(Denoiser(network, SD, "eps"), states[:1], states[1:], 5.0, rescale=1.0)
    said = (x - denoise(x, 2.0)) / 2.0
    assert said.std().item() == pytest.approx((pattern * states[0]).std().item(), rel=1e-4)


def test_perpendicular_negative_leaves_the_prompt_alone() -> None:
    vector, direction = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    right_angled = perpendicular(vector, direction)
    assert (right_angled * direction).sum(dim=(1, 2, 3)).abs().max() < 1e-3
    assert torch.allclose(perpendicular(2.5 * direction, direction), torch.zeros(()), atol=1e-5)
    assert torch.equal(perpendicular(vector, torch.zeros_like(direction)), vector), "no direction, nothing to spare"


def test_perp_neg_avoids_only_what_the_prompt_does_not_want() -> None:
    """Two pixels as axes: the prompt wants (1, 0), the negative prompt says (1, 1), of which (0, 1) is avoided."""
    axes = {1.0: (0.0, 0.0), 2.0: (1.0, 1.0), 3.0: (1.0, 0.0)}
    sizes: list[int] = []

    def network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        sizes.append(len(context))
        return torch.stack([torch.tensor(axes[value])[None, None] for value in context.flatten().tolist()])

    denoiser, x = Denoiser(network, SD, "x0"), torch.zeros(1, 1, 1, 2)
    denoise = guided(denoiser, text(3.0), text(2.0), 4.0, perp_neg=0.5, empty=text(1.0))
    assert denoise(x, 1.0).flatten().tolist() == [4.0, -2.0]
    assert sizes == [3]


def test_one_by_one_shows_the_network_one_image_a_call() -> None:
    network = Says()
    denoiser = Denoiser(network, SD, "x0")
    denoise = one_by_one([guided(denoiser, text(value), text(1.0), 2.0) for value in (3.0, 5.0)])
    assert denoise(torch.zeros(2, 1, 1, 1), 1.0).flatten().tolist() == [5.0, 9.0]
    assert network.sizes == [2, 2]


def test_network_is_told_the_timestep_of_its_convention() -> None:
    told: list[float] = []

    def network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        told.append(t.item())
        return x

    denoiser = Denoiser(network, SD, told={5.0: 400.0})
    for sigma in (5.0, SD.sigma(300.5)):
        denoiser(torch.zeros(1, 1, 1, 1), sigma, text(0.0))
    assert told == [400.0, pytest.approx(300.5)]
