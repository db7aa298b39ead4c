"""What the stages minimise: known values of the contrastive, perceptual and adversarial losses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_training import pictures
from torch import Tensor, nn

from ldm.errors import ModelError
from ldm.models.clip import sigmoid_loss
from ldm.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from ldm.models.text import open_clip_module
from ldm.training.adversarial import Adversarial, adaptive_weight, adversarial_losses
from ldm.training.autoencoder import AutoencoderTraining, cropped, crops
from ldm.training.batch import Draws
from ldm.training.clip import GlobalBatchNorm, contrastive_loss
from ldm.training.diffusion import timesteps
from ldm.training.perceptual import WIDTHS, Lpips


def unit(*shape: int, seed: int) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(rows, dim=-1)


@pytest.mark.parity
def test_infonce_without_hard_negatives_is_that_of_open_clip() -> None:
    open_clip_module()
    from open_clip.loss import ClipLoss

    images, texts = unit(6, 8, seed=0), unit(6, 8, seed=1)
    known = ClipLoss()(images, texts, 14.0)
    assert contrastive_loss(images, texts, 14.0)[0].item() == pytest.approx(known.item(), rel=1e-6)


def test_sigmoid_loss_is_the_sum_over_pairs_of_its_paper() -> None:
    images, texts = unit(5, 8, seed=0), unit(5, 8, seed=1)
    scale, bias = torch.tensor([10.0]), torch.tensor([-3.0])
    signs = 2 * torch.eye(5) - 1
    known = -nn.functional.logsigmoid(signs * (10.0 * images @ texts.T - 3.0)).sum() / 5
    assert sigmoid_loss(images, texts, scale, bias).item() == pytest.approx(known.item(), rel=1e-6)


def test_a_global_batch_norm_of_one_process_is_a_batch_norm() -> None:
    x, plain = torch.randn(4, 3, 5, 5), nn.BatchNorm2d(3)
    replaced = GlobalBatchNorm.of(plain)
    assert torch.equal(replaced(x), plain(x)) and torch.equal(replaced.running_var, plain.running_var)


def vgg_weights() -> dict[str, Tensor]:
    """Tensors with the names and shapes of VGG-16 and LPIPS, from a seed."""
    drawn, tensors, index, before = torch.Generator().manual_seed(0), {}, 0, 3
    for k, widths in enumerate(WIDTHS):
        for width in widths:
            shape = (width, before, 3, 3)
            tensors[f"features.{index}.weight"] = torch.randn(shape, generator=drawn) * (2 / (9 * before)) ** 0.5
            tensors[f"features.{index}.bias"] = torch.zeros(width)
            index, before = index + 2, width
        index += 1
        tensors[f"lin{k}.model.1.weight"] = torch.rand(1, before, 1, 1, generator=drawn) / before
    return tensors


def test_perceptual_distance_is_zero_between_equals_and_grows_with_the_difference() -> None:
    lpips = Lpips(vgg_weights())
    assert [name for name in vgg_weights() if "features" in name][-1] == "features.28.bias", "VGG-16's own numbers"
    image, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 3, 32, 32)
    near, far = image + 0.05 * noise, image + 0.5 * noise
    assert lpips(image, image).abs().max() == 0
    assert (lpips(image, near) > 0).all() and (lpips(image, far) > 2 * lpips(image, near)).all()
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)
    lpips(black, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert black.grad is not None and torch.isfinite(black.grad).all()


def test_perceptual_weights_that_are_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        Lpips.load(str(tmp_path / "nothing.safetensors"))
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="not VGG-16 and LPIPS"):
        Lpips.load(str(tmp_path / "other.safetensors"))


def test_discriminator_looks_at_patches_of_its_paper() -> None:
    judge = PatchDiscriminator(DiscriminatorConfig())
    assert judge(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    convolutions = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert sum(p.numel() for p in judge.parameters()) == convolutions + 64 + 1 + 2 * (128 + 256 + 512) == 2_765_633
    small = PatchDiscriminator(DiscriminatorConfig(channels=8, groups=4))
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    small(image)[0, 0, 6, 6].backward()
    assert image.grad is not None
    # Norms see the whole image, so every pixel counts a little; the patch is where most of it comes from.
    rows = image.grad.abs().sum(dim=(0, 1, 3))
    assert (rows > 0.05 * rows.max()).nonzero().numel() <= 70


class Copy(nn.Module):
    """A reconstruction whose last layer is its only one."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, image: Tensor, noise: Tensor, scale: float, turns: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.last(image), image, torch.zeros(len(image))


def test_each_side_of_an_adversary_learns_from_its_own_loss_only() -> None:
    torch.manual_seed(0)
    copy = Copy()
    adversary = Adversarial(
        copy, PatchDiscriminator(DiscriminatorConfig(channels=4, layers=1, groups=2)), copy.last.weight
    )
    image = torch.randn(2, 3, 16, 16)
    _, _, _, judged, real, fake = adversary(image, image, 1.0, 0)
    (-judged.mean()).backward(retain_graph=True)
    assert copy.last.weight.grad is not None
    assert all(p.grad is None for p in adversary.discriminator.parameters())
    copy.last.weight.grad = None
    (real.mean() - fake.mean()).backward()
    assert copy.last.weight.grad is None
    assert all(p.grad is not None for p in adversary.discriminator.parameters())
    assert sum(name.endswith("last.weight") for name, _ in adversary.named_parameters()) == 1


def test_hinge_losses_have_their_known_values() -> None:
    weight = nn.Parameter(torch.ones(1))
    reconstruction = (3.0 * weight).sum()
    judged, real, fake = 0.5 * weight, torch.tensor([0.25]), torch.tensor([-2.0])
    losses = adversarial_losses(reconstruction, [judged, real, fake], weight, 0.5)
    assert losses["discriminator"].item() == pytest.approx(0.5 * (0.75 + 0.0))
    assert losses["fooling"].item() == pytest.approx(-0.5)
    assert losses["adaptive_weight"].item() == pytest.approx(3.0 / (0.5 + 1e-4))
    assert losses["loss"].item() == pytest.approx(0.5 * (3.0 / 0.5001) * -0.5 + 0.375)
    silent = adversarial_losses(reconstruction, [judged, real, fake], weight, 0.0)
    assert silent["loss"].item() == 0.0 and silent["discriminator"].item() > 0
    assert adaptive_weight(reconstruction, (1e-9 * weight).sum(), weight).item() == 1e4, "at most"


def test_crops_are_a_function_of_seed_step_and_place() -> None:
    config = AutoencoderTraining(steps=9, batch_size=8, learning_rate=1e-3, crop=16, sides=(16, 32), crop_candidates=2)
    batches = crops(pictures, config, seed=4)
    running = batches(0)
    later = [next(running) for _ in range(3)][2]
    again = next(batches(2))
    assert torch.equal(later.rows[0], again.rows[0]) and later.keys == again.keys
    assert not torch.equal(next(crops(pictures, config, seed=5)(2)).rows[0], again.rows[0])


def test_of_several_crops_the_one_with_most_contrast_is_taken() -> None:
    config = AutoencoderTraining(
        steps=1, batch_size=1, learning_rate=1e-3, crop=8, sides=(32,), crop_candidates=64, equivariance=0.0
    )
    image = torch.zeros(3, 32, 32)
    image[:, :, 20:22] = 1.0
    assert all(crop.std() > 0 for crop in cropped(image.expand(5, 3, 32, 32), config, range(5)))


def test_a_crop_is_a_part_of_its_own_picture_at_its_own_side() -> None:
    config = AutoencoderTraining(steps=1, batch_size=1, learning_rate=1e-3, crop=8, sides=(32, 16), crop_candidates=2)
    # Every pixel tells its picture, row and column; shrunk by two, what it tells is the mean of four.
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    images = torch.stack([torch.stack([torch.full((32, 32), float(i)), rows, columns]) for i in range(12)])
    steps = set()
    for number, crop in enumerate(cropped(images, config, range(12))):
        assert (crop[0] == number).all()
        step = float(crop[1, 1, 0] - crop[1, 0, 0])
        assert torch.equal(crop[1].diff(dim=0), torch.full((7, 8), step)) and not crop[1].diff(dim=1).any()
        assert torch.equal(crop[2].diff(dim=1), torch.full((8, 7), step)) and not crop[2].diff(dim=0).any()
        steps.add(step)
    assert steps == {1.0, 2.0}


def test_a_share_of_the_timesteps_is_from_the_last_tenth() -> None:
    t = timesteps(Draws(0, 0, 10_000), 1000, 0.4)
    assert (t >= 900).float().mean() == pytest.approx(0.4 + 0.6 * 0.1, abs=0.02)
    assert t[t >= 900].float().mean() == pytest.approx(949.5, abs=3.0) and t.max() == 999
    assert torch.equal(timesteps(Draws(0, 0, 8), 1000, 0.0), Draws(0, 0, 8).integers(1000))
    assert timesteps(Draws(0, 0, 8), 5, 1.0).tolist() == [4] * 8  # a schedule of less than ten
