"""Reconstruction and ε-loss of held-out pictures, where the answer is known beforehand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion.schedule import scaled_linear
from ldm.evaluation.denoising import held_out_loss, other_captions, timesteps
from ldm.evaluation.reconstruction import IDENTICAL, psnr, ssim

SCHEDULE = scaled_linear(0.00085, 0.012, 1000)


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 16, 16)
    b = torch.stack([torch.full((3, 16, 16), 0.2), torch.zeros(3, 16, 16)])
    assert psnr(a, b).tolist() == pytest.approx([20.0, IDENTICAL])  # an error of a tenth of the range


def test_ssim_of_flat_images_is_the_closed_form() -> None:
    a, b = torch.full((1, 3, 16, 16), 0.0), torch.full((1, 3, 16, 16), 0.6)  # 0.5 and 0.8 in [0, 1]
    assert ssim(a, b).item() == pytest.approx((2 * 0.5 * 0.8 + 1e-4) / (0.25 + 0.64 + 1e-4))
    assert ssim(a, a).item() == pytest.approx(1.0)


def test_ssim_is_its_formula_pixel_by_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 1, 12, 13, generator=generator) * 2 - 1 for _ in range(2))
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    x, y = ((image[0, 0].double().numpy() + 1) / 2 for image in (a, b))
    found = []
    for row in range(2):
        for column in range(3):
            p, q = (image[row : row + 11, column : column + 11] for image in (x, y))
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            varied = [
                (window * (u - v) * (w - z)).sum()
                for u, v, w, z in [(p, mean_p, p, mean_p), (q, mean_q, q, mean_q), (p, mean_p, q, mean_q)]
            ]
            top = (2 * mean_p * mean_q + 1e-4) * (2 * varied[2] + 9e-4)
            found.append(top / ((mean_p**2 + mean_q**2 + 1e-4) * (varied[0] + varied[1] + 9e-4)))
    assert ssim(a, b).item() == pytest.approx(np.mean(found), rel=1e-9)
    assert ssim(a, -a).item() < 0


def test_bins_cover_all_timesteps_once() -> None:
    bins = timesteps(1000)
    assert [t for _, _, t in bins] == [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]
    assert [t for first, last, _ in timesteps(37) for t in range(first, last + 1)] == list(range(37))


def test_other_caption_is_the_next_that_differs() -> None:
    assert other_captions(["a", "a", "b"]) == ["b", "b", "a"]
    with pytest.raises(ValueError, match="at least two different"):
        other_captions(["a", "a"])


def test_loss_of_known_denoisers() -> None:
    latents = torch.randn(20, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    captions = [f"picture {i}" for i in range(20)]

    def denoise(x: Tensor, sigma: float, texts: Sequence[str]) -> Tensor:
        """Knows every picture by its caption, and says nothing without one."""
        return torch.stack([latents[captions.index(text)] if text else torch.zeros_like(x[0]) for text in texts])

    bins = held_out_loss(denoise, SCHEDULE, latents, captions)
    squares, shifted = (
        latents.square().mean(dim=(1, 2, 3)),
        (latents - latents.roll(-1, 0)).square().mean(dim=(1, 2, 3)),
    )
    for one in bins:
        assert one.snr == pytest.approx(
            SCHEDULE.alphas_cumprod[one.timestep] / (1 - SCHEDULE.alphas_cumprod[one.timestep])
        )
        right, none, other = one.errors
        assert right == pytest.approx(np.zeros(20), abs=1e-6)
        assert none == pytest.approx((squares * one.snr).numpy(), rel=1e-3)
        assert other == pytest.approx((shifted * one.snr).numpy(), rel=1e-3)


def test_questions_are_the_same_for_every_model_and_number_of_pictures() -> None:
    latents = torch.randn(20, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def denoise(x: Tensor, sigma: float, texts: Sequence[str]) -> Tensor:
        seen.append(x)
        return x

    held_out_loss(denoise, SCHEDULE, latents, [str(i) for i in range(20)])
    first = seen.copy()
    seen.clear()
    held_out_loss(denoise, SCHEDULE, latents[:3], ["a", "b", "c"])
    assert torch.equal(first[0][:3], seen[0]) and torch.equal(seen[0], seen[1])
    assert not torch.allclose(first[0][0] - latents[0], first[0][1] - latents[1], atol=1e-3)
