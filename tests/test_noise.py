"""An image's noise is its own: keyed by seed, step and purpose, or one stream for each image, on any device."""

import itertools

import numpy as np
import pytest
import torch

from ldm.diffusion import philox
from ldm.diffusion.brownian import BrownianPath, clock, place
from ldm.diffusion.noise import NOISE_SOURCES, KeyedNoise, initial_noise
from ldm.request import RNGS

SHAPE = (4, 8, 8)


def test_an_images_noise_depends_on_its_seed_alone() -> None:
    batch = initial_noise([3, 1, 2], SHAPE)
    assert torch.equal(batch[1:2], initial_noise([1], SHAPE))
    assert torch.equal(batch[0], torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))


def test_every_source_gives_each_image_its_own_noise_wherever_it_is_in_a_batch() -> None:
    assert set(NOISE_SOURCES) == set(RNGS)
    for name, source in NOISE_SOURCES.items():
        together, alone = source([3, 1], SHAPE), source([1], SHAPE)
        assert torch.equal(together.initial()[1:], alone.initial()), name
        assert torch.equal(together(5, "ancestral")[1:], alone(5, "ancestral")), name
        assert torch.equal(together.between(3.0, 1.0)[1:], alone.between(3.0, 1.0)), name
        assert alone.between(1.0, 0.5).dtype == torch.float32


def test_step_noise_differs_by_step_purpose_and_seed_and_is_normal() -> None:
    noise = KeyedNoise([7], (4, 64, 64))
    draws = [noise(0, "a"), noise(1, "a"), noise(0, "b"), KeyedNoise([8], (4, 64, 64))(0, "a")]
    flat = torch.stack([draw.flatten() for draw in draws])
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 0.05
    assert abs(flat.mean()) < 0.03 and flat.std().item() == pytest.approx(1.0, abs=0.03)


def test_stream_goes_on_with_one_generator_as_other_programs_do() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second, third = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    stream = NOISE_SOURCES["stream"]([3], SHAPE)
    assert torch.equal(stream.initial()[0], first)
    assert torch.equal(stream(0, "ancestral")[0], second)
    assert torch.equal(stream.between(2.0, 1.0)[0], third)


# Philox and CUDA's normal numbers.


@pytest.mark.parametrize(
    ("word", "keys", "answer"),
    [
        (0, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(word: int, keys: tuple[int, int], answer: str) -> None:
    counter = tuple(np.array([word], dtype=np.uint32) for _ in range(4))
    words = philox.philox(counter, keys)  # type: ignore[arg-type]  # numpy arrays broadcast
    assert " ".join(f"{int(w[0]):08x}" for w in words) == answer


def test_philox_gives_the_known_answer_for_the_digits_of_pi() -> None:
    words = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    counter = tuple(np.array([word], dtype=np.uint32) for word in words)
    drawn = philox.philox(counter, (0xA4093822, 0x299F31D0))  # type: ignore[arg-type]  # numpy arrays broadcast
    assert " ".join(f"{int(w[0]):08x}" for w in drawn) == "d16cfe09 94fdcceb 5001e420 24126ea1"


def test_philox_draws_what_torch_draws_on_cuda() -> None:
    """`torch.manual_seed(0); torch.randn(3, 4, device="cuda")`, as AUTOMATIC1111 documents its NV mode."""
    known = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    assert philox.randn(0, 0, (3, 4)) == pytest.approx(np.array(known), abs=1e-6)
    assert not np.allclose(philox.randn(0, 1, (3, 4)), known), "the next call goes on"
    assert not np.allclose(philox.randn(2**32, 0, (3, 4)), known), "a seed has 64 bits"


@pytest.mark.gpu
def test_philox_is_cuda_for_latents_of_stable_diffusion() -> None:
    for side in (64, 96, 128):
        generator = torch.Generator("cuda").manual_seed(1234)
        for call in range(3):
            drawn = torch.randn(4, side, side, generator=generator, device="cuda").cpu().numpy()
            assert np.abs(philox.randn(1234, call, (4, side, side)) - drawn).max() < 1e-5


def test_philox_noise_is_normal() -> None:
    drawn = philox.randn(5, 0, (4, 64, 64)).ravel()
    assert abs(drawn.mean()) < 0.03 and drawn.std() == pytest.approx(1.0, abs=0.02)


# The Brownian path.


def path(seed: int = 0, shape: tuple[int, int, int] = (1, 64, 64)) -> BrownianPath:
    return KeyedNoise([seed], shape).path


def length(sigma: float, sigma_next: float) -> float:
    """How long the clock 1/σ² runs, as the path rounds it."""
    return abs(clock(place(sigma_next)) - clock(place(sigma)))


@pytest.mark.parametrize("levels", [(14.6, 9.0, 5.4), (0.9, 0.7, 0.0292), (4096.0, 14.6, 14.5), (2.0, 1.0, 0.5)])
def test_increments_add_up_whatever_the_steps(levels: tuple[float, float, float]) -> None:
    a, b, c = levels
    walked = path()
    parts = walked.between(a, b) * length(a, b) ** 0.5 + walked.between(b, c) * length(b, c) ** 0.5
    whole = walked.between(a, c) * length(a, c) ** 0.5
    assert torch.allclose(parts, whole, rtol=1e-5, atol=1e-5 * length(a, c) ** 0.5)


def test_increments_are_standard_normal_and_independent_where_they_do_not_overlap() -> None:
    walked = path()
    levels = [14.6, 10.0, 5.0, 4.99, 1.0, 0.3, 0.0292]
    drawn = torch.stack([walked.between(a, b).flatten() for a, b in itertools.pairwise(levels)])
    assert drawn.std(dim=1).numpy() == pytest.approx(1.0, abs=0.05)
    assert (torch.corrcoef(drawn) - torch.eye(6)).abs().max() < 0.07
    overlapping = torch.stack([walked.between(14.6, 1.0).flatten(), walked.between(14.6, 2.0**0.5).flatten()])
    assert torch.corrcoef(overlapping)[0, 1].item() == pytest.approx(0.5**0.5, abs=0.03)


def test_path_is_the_same_in_any_order_and_turns_its_sign_backwards() -> None:
    one, other = path(), path()
    other.between(1.0, 0.3)
    assert torch.equal(one.between(5.0, 2.0), other.between(5.0, 2.0))
    assert torch.equal(one.between(2.0, 5.0), -one.between(5.0, 2.0))
    assert not torch.allclose(path(1).between(5.0, 2.0), one.between(5.0, 2.0), atol=0.5)


def test_path_refuses_levels_that_it_cannot_tell_apart() -> None:
    with pytest.raises(ValueError, match="too close"):
        path().between(1.0, 1.0)
    with pytest.raises(ValueError, match="no level"):
        path().between(1.0, 0.0)


def test_twice_the_steps_of_an_sde_stay_close() -> None:
    """DPM-Solver++'s SDE steps (Lu et al. 2022b, Equation 9) for data that are all 0: half the steps, the same end."""

    def end(steps: int, noise: KeyedNoise) -> torch.Tensor:
        levels = np.geomspace(14.6, 0.1, steps + 1).tolist()
        x = noise.initial() * levels[0]
        for i, (a, b) in enumerate(itertools.pairwise(levels)):
            fresh = noise.between(a, b) if keyed_by_level else noise(i, "sde")
            x = x * (b / a) ** 2 + fresh * b * (1 - (b / a) ** 2) ** 0.5
        return x

    noise = KeyedNoise([4], (1, 32, 32))
    keyed_by_level = True
    assert (end(20, noise) - end(40, noise)).abs().max() < 1e-4 * 0.1 * 10
    assert end(20, noise).std().item() == pytest.approx(0.1, rel=0.05)
    keyed_by_level = False
    assert (end(20, noise) - end(40, noise)).std() > 0.1, "noise that is keyed by the step does not do it"
