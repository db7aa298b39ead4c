"""One engine draws every picture: an image depends on its request and its seed, and on nothing else."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import few
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.bundle import Bundle, build
from ldm.config import validate
from ldm.diffusion.grids import GRIDS
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import NotFiniteError, SettingError
from ldm.images import read_settings, save_png
from ldm.models.model_config import ModelConfig
from ldm.pipeline import TextToImage, network_calls
from ldm.request import RNGS, GenerationRequest, resolve

REQUEST = GenerationRequest(prompt="a red circle", seed=5)
QUICK_SAMPLERS = ("ddim", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "heun")


@pytest.fixture
def pipeline(tiny_bundle: Bundle) -> TextToImage:
    return TextToImage(tiny_bundle)


def pixels(image: Image.Image) -> Any:
    return np.asarray(image, dtype=np.int16)


def latent(pipeline: TextToImage, **settings: object) -> torch.Tensor:
    request = GenerationRequest(**{"prompt": "a red circle", "seed": 5, **settings})
    return list(pipeline.stream(request))[-1].x


class Counting(torch.nn.Module):
    """A network that counts its calls and what they ask for: each latent once for every text."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(context))
        return self.network(x, t, context)


def test_stream_yields_every_step(pipeline: TextToImage) -> None:
    steps = list(pipeline.stream(REQUEST))
    assert [(step.index, step.total) for step in steps] == [(i, 4) for i in range(4)]
    assert steps[-1].sigma == 0.0
    assert steps[-1].x.shape == (1, 4, 8, 8)
    assert pipeline.preview(steps[0]).size == (8, 8)


def test_seed_decides_image(pipeline: TextToImage) -> None:
    assert torch.equal(latent(pipeline), latent(pipeline))
    assert not torch.allclose(latent(pipeline), latent(pipeline, seed=6), atol=0.1)


def test_prompt_and_negative_prompt_change_the_image(pipeline: TextToImage) -> None:
    assert not torch.allclose(latent(pipeline), latent(pipeline, prompt="a blue square"), atol=1e-3)
    assert not torch.allclose(latent(pipeline), latent(pipeline, negative_prompt="a blue square"), atol=1e-3)


@pytest.mark.parametrize(
    "sampler", few([name for name, method in SAMPLERS.items() if method.calls is not None], *QUICK_SAMPLERS)
)
def test_image_is_the_same_alone_and_in_a_batch(pipeline: TextToImage, sampler: str) -> None:
    together = latent(pipeline, sampler=sampler, num_images=4, seed=2**32 - 2)
    # A call rounds by 3e-6. This sampler reaches values of 9, of which neighbours in fp32 lie 1e-6 apart: 3e-4.
    rounding = 3e-4 if sampler == "dpm_2_ancestral" else 1e-4
    for index, seed in enumerate((2**32 - 2, 2**32 - 1, 0, 1)):  # the seed wraps
        assert torch.allclose(together[index], latent(pipeline, sampler=sampler, seed=seed)[0], atol=rounding)


@pytest.mark.parametrize("rng", few(RNGS, "philox"))
@pytest.mark.parametrize("sampler", few(["ddim", "euler_ancestral", "dpmpp_2m_sde"], "euler_ancestral"))
def test_image_is_bit_equal_with_batch_exact(pipeline: TextToImage, sampler: str, rng: str) -> None:
    exact: dict[str, object] = {"sampler": sampler, "rng": rng, "batch_exact": True, "guidance_rescale": 0.7}
    request = GenerationRequest(prompt="a red circle", seed=5, num_images=4, **exact)
    for step in pipeline.stream(request):
        pipeline.preview(step, index=3)
    pictures = pipeline.images(request, step.x)
    for index in range(4):
        alone = latent(pipeline, seed=5 + index, **exact)
        assert torch.equal(step.x[index : index + 1], alone)
        (picture,) = pipeline.images(GenerationRequest(prompt="a red circle", seed=5 + index, **exact), alone)
        assert picture.image.tobytes() == pictures[index].image.tobytes()
    drawn = pipeline.draw(["a blue square", "a red circle"], [1, 5], pipeline.ready(request))
    assert drawn[1].tobytes() == pictures[0].image.tobytes()


def test_batch_exact_shows_the_network_one_image_a_call(tiny_bundle: Bundle) -> None:
    counting = Counting(tiny_bundle.unet)
    request = GenerationRequest(prompt="a", num_images=3, batch_exact=True, steps=2)
    list(TextToImage(replace(tiny_bundle, unet=counting)).stream(request))
    assert counting.sizes == [2] * 6
    assert network_calls(resolve(request, tiny_bundle.config), tiny_bundle.schedule) == 6


def test_guidance_interval_and_perp_neg_cost_what_they_need(tiny_bundle: Bundle) -> None:
    asked: dict[str, object] = {"prompt": "a red circle", "sigmas": "10,5,1,0"}
    for settings, sizes in (
        ({"guidance_interval": "2,6"}, [1, 2, 1]),
        ({"perp_neg": 1.0, "negative_prompt": "blue"}, [3, 3, 3]),
        ({"perp_neg": 1.0, "guidance_scale": 1}, [1, 1, 1]),
    ):
        counting = Counting(tiny_bundle.unet)
        list(TextToImage(replace(tiny_bundle, unet=counting)).stream(GenerationRequest(**asked, **settings)))
        assert counting.sizes == sizes


def test_texts_are_read_once(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, ...]] = []
    encode = type(tiny_bundle.text).encode
    monkeypatch.setattr(
        type(tiny_bundle.text), "encode", lambda self, texts: read.append(tuple(texts)) or encode(self, texts)
    )
    drawing = TextToImage(tiny_bundle)
    asked: dict[str, object] = {"prompt": "a", "num_images": 3, "steps": 1}
    for settings, wanted in (
        ({"batch_size": 1}, [("a",), ("",)]),
        ({"batch_size": 3, "batch_exact": True}, []),
        ({"negative_prompt": "b"}, [("b",)]),
        ({"negative_prompt": "c", "guidance_scale": 1}, []),
        ({"prompt": "d", "negative_prompt": "b"}, [("d",)]),
    ):
        read.clear()
        assert len(list(drawing(GenerationRequest(**{**asked, **settings})))) == 3
        assert sorted(read) == sorted(wanted), settings


def test_sampling_never_waits_for_a_number_of_the_device(tiny_bundle: Bundle) -> None:
    """On a GPU a number that Python asks for stops the stream of work; here the operation that brings it is counted."""

    class Watching(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.waits += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    for sampler in ("ddim", "dpmpp_2m", "euler_ancestral"):
        request = GenerationRequest(prompt="a", sampler=sampler, steps=3, guidance_rescale=0.5, rng="stream")
        steps = TextToImage(tiny_bundle).stream(request)
        next(steps)  # the texts are read and the noise is drawn
        with Watching() as watching:
            rest = list(steps)
        assert len(rest) == 2 and watching.waits == 0
        with Watching() as watching:
            rest[-1].x.sum().item()
        assert watching.waits == 1


@pytest.mark.parametrize("setting", [{"guidance_rescale": 0.7}, {"perp_neg": 1.0}, {"guidance_interval": "0.1,2"}])
def test_guidance_settings_change_the_image(pipeline: TextToImage, setting: dict[str, object]) -> None:
    plain = latent(pipeline, negative_prompt="a blue square")
    assert not torch.allclose(latent(pipeline, negative_prompt="a blue square", **setting), plain, atol=1e-3)


def test_network_is_told_what_the_convention_rounds(tiny_bundle: Bundle) -> None:
    told: list[float] = []

    class Listening(Counting):
        def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            told.append(t[0].item())
            return super().forward(x, t, context)

    asked: dict[str, object] = {"prompt": "a", "sampler": "dpmpp_2m", "schedule": "karras", "steps": 5}
    request = GenerationRequest(**asked, convention="diffusers")
    pipeline = TextToImage(replace(tiny_bundle, unet=Listening(tiny_bundle.unet)))
    list(pipeline.stream(request))
    assert told == [round(t) for t in told]
    assert tuple(told) == pipeline.route(pipeline.ready(request)).timesteps
    told.clear()
    list(pipeline.stream(GenerationRequest(**asked)))
    assert told != [round(t) for t in told]


def test_latent_of_a_convention_that_stops_short_ends_at_its_scale(pipeline: TextToImage) -> None:
    asked: dict[str, object] = {"schedule": "leading", "steps": 4, "convention": "diffusers"}
    there = pipeline.route(pipeline.ready(GenerationRequest(prompt="a", **asked)))
    *_, before, last = pipeline.stream(GenerationRequest(prompt="a red circle", seed=5, **asked))
    direction = (before.x - last.denoised) / there.sigmas[-2]
    expected = (last.denoised + there.sigmas[-1] * direction) * pipeline.bundle.schedule.alphas_cumprod[0] ** 0.5
    assert torch.allclose(last.x, expected, atol=1e-5)


def test_steps_that_a_convention_cannot_run_are_refused_before_the_first(pipeline: TextToImage) -> None:
    with pytest.raises(SettingError, match="compvis cannot run ddim on leading in 3 steps"):
        pipeline.stream(GenerationRequest(prompt="a", schedule="leading", steps=3, convention="compvis"))


def test_call_splits_into_batches_and_numbers_the_images(pipeline: TextToImage) -> None:
    images = list(pipeline(GenerationRequest(prompt="a", seed=3, num_images=3, batch_size=2)))
    assert [(image.index, image.seed, image.settings["seed"]) for image in images] == [(0, 3, 3), (1, 4, 4), (2, 5, 5)]
    alone = next(iter(pipeline(GenerationRequest(prompt="a", seed=5))))
    assert abs(pixels(images[2].image) - pixels(alone.image)).max() <= 1


def test_settings_in_the_picture_draw_it_again(pipeline: TextToImage, tmp_path: Any) -> None:
    request = GenerationRequest(prompt="красный 🟥 👩‍🚀", negative_prompt="é", sampler="euler_ancestral", num_images=2)
    _, second = pipeline(request)
    save_png(second.image, tmp_path / "a.png", second.settings)
    stored = read_settings(tmp_path / "a.png")
    assert stored is not None
    again, rest = GenerationRequest.from_settings(stored)
    assert rest == {"model": "tiny", "model_sha256": pipeline.bundle.sha256}
    assert again.prompt == request.prompt
    redrawn = next(iter(pipeline(again)))
    # Drawn alone instead of second of two: equal up to rounding; drawn alone twice: equal.
    assert abs(pixels(redrawn.image) - pixels(second.image)).max() <= 1
    save_png(redrawn.image, tmp_path / "b.png", redrawn.settings)
    once_more = next(iter(pipeline(GenerationRequest.from_settings(redrawn.settings)[0])))
    assert once_more.image.tobytes() == redrawn.image.tobytes()


def test_draw_gives_each_prompt_its_own_image(pipeline: TextToImage) -> None:
    prompts, seeds = ["a red circle", "a blue square", "a red circle"], [5, 6, 7]
    drawn = pipeline.draw(prompts, seeds, REQUEST.model_copy(update={"batch_size": 2}))
    assert len(drawn) == 3
    for prompt, seed, image in zip(prompts, seeds, drawn, strict=True):
        alone = next(iter(pipeline(GenerationRequest(prompt=prompt, seed=seed))))
        assert abs(pixels(image) - pixels(alone.image)).max() <= 1


def test_previews_change_nothing(pipeline: TextToImage) -> None:
    for step in pipeline.stream(REQUEST):
        pipeline.preview(step)
    assert torch.equal(step.x, latent(pipeline))


def test_no_guidance_asks_the_network_for_one_image(tiny_bundle: Bundle) -> None:
    for scale, seen in ((1, 1), (0, 2), (3, 2)):
        counting = Counting(tiny_bundle.unet)
        request = GenerationRequest(prompt="a red circle", guidance_scale=scale)
        list(TextToImage(replace(tiny_bundle, unet=counting)).stream(request))
        assert counting.sizes == [seen] * 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_network_calls_are_what_happens(tiny_bundle: Bundle, sampler: str) -> None:
    request = GenerationRequest(prompt="a", sampler=sampler, steps=3, num_images=3, batch_size=2)
    request = resolve(request, tiny_bundle.config)
    if SAMPLERS[sampler].calls is None:
        assert network_calls(request, tiny_bundle.schedule) is None
        return
    counting = Counting(tiny_bundle.unet)
    list(TextToImage(replace(tiny_bundle, unet=counting))(request))
    assert len(counting.sizes) == network_calls(request, tiny_bundle.schedule)


@pytest.mark.parametrize("schedule", few(GRIDS, "trailing", "karras"))
def test_one_step_is_finite(pipeline: TextToImage, schedule: str) -> None:
    for sampler in SAMPLERS:
        assert torch.isfinite(latent(pipeline, sampler=sampler, schedule=schedule, steps=1)).all(), sampler


def test_grad_mode_of_the_caller_is_kept(pipeline: TextToImage) -> None:
    steps = pipeline.stream(REQUEST)
    next(steps)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    steps.close()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_request_that_does_not_fit_is_refused_before_the_first_step(pipeline: TextToImage) -> None:
    with pytest.raises(SettingError, match="nearest: 64 or 80"):
        pipeline.stream(GenerationRequest(prompt="a", width=70, height=64))


def test_latents_that_are_not_finite_become_an_error_and_no_picture(tiny_bundle: Bundle) -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return torch.full((len(context), *x.shape[1:]), float("nan"))

    with pytest.raises(NotFiniteError, match="latent: "):
        next(iter(TextToImage(replace(tiny_bundle, unet=Broken()))(REQUEST)))


def test_picture_that_overflows_in_half_precision_is_decoded_in_fp32(tiny_bundle: Bundle) -> None:
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = TextToImage(tiny_bundle).decode(clean)[0]

    class OverflowsInHalf(type(tiny_bundle.autoencoder)):  # type: ignore[misc]  # a class found at run time
        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            image = super().decode(latent)
            return image * float("inf") if self.post_quant_conv.weight.dtype == torch.bfloat16 else image

    half = OverflowsInHalf(tiny_bundle.config.autoencoder)
    half.load_state_dict(tiny_bundle.autoencoder.state_dict())
    got = TextToImage(replace(tiny_bundle, autoencoder=half.bfloat16())).decode(clean)[0]
    assert abs(pixels(got) - pixels(expected)).mean() < 2
    assert half.post_quant_conv.weight.dtype == torch.bfloat16, "the model itself stays as it was"

    never = copy.deepcopy(half).bfloat16()
    torch.nn.init.constant_(never.decoder.conv_out.bias, float("nan"))
    with pytest.raises(NotFiniteError, match="autoencoder: "):
        TextToImage(replace(tiny_bundle, autoencoder=never)).decode(clean)


def test_pixels_and_labels_are_drawn_by_the_same_engine() -> None:
    unet = {"in_channels": 1, "out_channels": 1, "channels": 8, "multipliers": [1, 2, 2], "res_blocks": 1}
    values = {
        "autoencoder": {"kind": "pixels"},
        "text": {"kind": "labels", "labels": ["0", "1"], "width": 8},
        "unet": {**unet, "attention": [False, False, False], "heads": 2, "groups": 4, "context_width": 8},
        "noise_schedule": {"kind": "linear", "beta_start": 1e-4, "beta_end": 0.02, "timesteps": 300},
        "sampling": {"width": 28, "height": 28, "steps": 2, "guidance_scale": 1.0},
    }
    config = validate(values, ModelConfig, "digits")
    pipeline = TextToImage(Bundle("digits", config, *build(config)))
    (drawn,) = pipeline(GenerationRequest(prompt="1", sampler="ddpm"))
    assert (drawn.image.size, drawn.image.mode) == ((28, 28), "L")
    with pytest.raises(SettingError, match="'7' is not a label of this model"):
        list(pipeline(GenerationRequest(prompt="7")))
    with pytest.raises(SettingError, match="the model's 300 timesteps"):
        list(pipeline(GenerationRequest(prompt="1", steps=301)))
