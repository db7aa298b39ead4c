"""What the autoencoder keeps of a picture: PSNR and SSIM of its reconstructions."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.models.autoencoder import Autoencoder

IDENTICAL = 100.0  # dB that stand for no error at all
WINDOW, SIGMA = 11, 1.5
STABLE = (0.01**2, 0.03**2)


@torch.inference_mode()
def reconstructed(autoencoder: Autoencoder, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Images in [−1, 1] through the autoencoder: the posterior's mean, decoded, clipped to [−1, 1]."""
    return autoencoder.decode(autoencoder.encode(images).mean).float().clamp(-1.0, 1.0)


def psnr(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of pairs of images in [−1, 1], in dB, at most IDENTICAL."""
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4.0 / error)).clamp(max=IDENTICAL)


def ssim(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of pairs of images in [−1, 1], sides of 11 pixels or more (Wang et al. 2004, Equation 13).

    Gaussian window of 11 × 11 pixels with σ 1.5, K₁ = 0.01, K₂ = 0.03, every channel by itself, where the whole window
    lies inside the image.
    """
    x, y = (a.double() + 1) / 2, (b.double() + 1) / 2
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    bright, varied = STABLE
    similar = (2 * mean_x * mean_y + bright) * (2 * covariance + varied)
    return (similar / ((mean_x**2 + mean_y**2 + bright) * (variance_x + variance_y + varied))).mean(dim=(1, 2, 3))


def blurred(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
    """Means under the window, without a border."""
    places = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    line = torch.exp(-places.square() / (2 * SIGMA**2))
    line = (line / line.sum()).expand(x.shape[1], 1, 1, -1)
    across = F.conv2d(x, line, groups=x.shape[1])
    return F.conv2d(across, line.transpose(2, 3), groups=x.shape[1])
