"""The one validator: what it accepts, what it refuses, and in which words."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import DataError, SettingError
from ldm.models.model_config import SamplingDefaults
from ldm.prompts import clean, read_lines, slug
from ldm.request import GenerationRequest, resolve, resolve_seed

NAN = float("nan")


def model(side: int = 256, factor: int = 64, timesteps: int = 1000) -> Any:
    """As much of a ModelConfig as `resolve` reads."""
    sampling = SamplingDefaults(width=side, height=side, steps=20)
    unet, autoencoder = SimpleNamespace(in_channels=4), SimpleNamespace(latent_channels=4)
    schedule = SimpleNamespace(timesteps=timesteps)
    return SimpleNamespace(
        sampling=sampling, factor=factor, noise_schedule=schedule, unet=unet, autoencoder=autoencoder
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": ""}, "prompt: the prompt is empty; write"),
        ({"prompt": " \n\t "}, "prompt: the prompt is empty; write"),
        ({"prompt": "\x00\x07"}, "prompt: the prompt is empty; write"),
        ({"prompt": "", "negative_prompt": "blurred"}, "prompt: the prompt is empty and only a negative prompt"),
        ({"prompt": None}, "prompt: None is not text"),
        ({"prompt": "x" * 10_001}, "prompt: 10001 characters are too many; use at most 10000"),
        ({"prompt": "caf\udce9"}, "prompt: character 4 is not valid Unicode"),
        ({"negative_prompt": "\ud800"}, "negative_prompt: character 1 is not valid Unicode"),
        ({"steps": 0}, "steps: 0 is not between 1 and 1000; use 30"),
        ({"steps": -1}, "steps: -1 is not between"),
        ({"steps": 10_001}, "steps: 10001 is not between"),
        ({"steps": 2.5}, "steps: 2.5 is not a whole number; use 30"),
        ({"steps": "2.5"}, "steps: 2.5 is not a whole number"),
        ({"steps": "abc"}, "steps: abc is not a whole number"),
        ({"steps": "1_000"}, "steps: 1_000 is not a whole number"),
        ({"steps": "٣"}, "steps: ٣ is not a whole number"),
        ({"steps": " 3"}, "is not a whole number"),
        ({"steps": ""}, "is not a whole number"),
        ({"steps": True}, "steps: True is not a whole number"),
        ({"steps": NAN}, "steps: nan is not a whole number"),
        ({"steps": "9" * 5000}, "is not a whole number"),
        ({"seed": -2}, "seed: -2 is not between -1 and 4294967295; use -1 for a random one"),
        ({"seed": 2**32}, "seed: 4294967296 is not between"),
        ({"seed": 2**40}, "seed: 1099511627776 is not between"),
        ({"seed": str(2**64)}, "is not between"),
        ({"seed": "1e5"}, "seed: 1e5 is not a whole number"),
        ({"seed": 1.5}, "seed: 1.5 is not a whole number"),
        ({"seed": None}, "seed: None is not a whole number"),
        ({"guidance_scale": NAN}, "guidance_scale: nan is not a number; use 7.5"),
        ({"guidance_scale": "nan"}, "guidance_scale: nan is not a number; use 7.5"),
        ({"guidance_scale": "inf"}, "guidance_scale: inf is not a number"),
        ({"guidance_scale": float("inf")}, "guidance_scale: inf is not between 0 and 30"),
        ({"guidance_scale": "1e400"}, "guidance_scale: 1e400 is not between 0 and 30"),
        ({"guidance_scale": 1e9}, "is not between 0 and 30; use 7.5"),
        ({"guidance_scale": -1}, "guidance_scale: -1 is not between"),
        ({"guidance_scale": "4,5"}, "guidance_scale: 4,5 is not a number; use 4.5"),
        ({"sampler": "eular"}, "sampler: no sampler 'eular' (did you mean 'euler'?); use one of ddpm, ddim"),
        ({"sampler": 3}, "sampler: no sampler '3'; use one of"),
        ({"schedule": "karas"}, "schedule: no schedule 'karas' (did you mean 'karras'?); use one of"),
        (
            {"convention": "difusers"},
            "convention: no convention 'difusers' (did you mean 'diffusers'?); use one of exact",
        ),
        ({"rng": "cuda"}, "rng: no rng 'cuda'; use one of keyed, stream, philox"),
        ({"prompt_syntax": "a1111"}, "prompt_syntax: no prompt syntax 'a1111'; use one of plain"),
        ({"sigmas": "3,2,1"}, "sigmas: the last number must be 0, behind at least one more; use for example 14.6"),
        ({"sigmas": "0"}, "sigmas: the last number must be 0, behind"),
        ({"sigmas": "3,3,0"}, "sigmas: the numbers do not fall"),
        ({"sigmas": "3,x,0"}, "sigmas: x is not a number"),
        ({"sigmas": "3,nan,0"}, "sigmas: nan is not a number"),
        ({"sigmas": [3.0, float("inf"), 0]}, "sigmas: inf is not between"),
        ({"sigmas": 3}, "sigmas: 3 is not a list of numbers; use for example 14.6,3,0.5,0"),
        ({"sigmas": list(range(1002, -1, -1))}, "sigmas: 1003 numbers are too many; use at most 1000 steps"),
        ({"sigmas": "3,0", "timesteps": "9"}, "sigmas: given together with timesteps; use one"),
        ({"timesteps": ""}, "timesteps:  is not a number"),
        ({"timesteps": []}, "timesteps: no number is in it; use for example 999,666,333"),
        ({"timesteps": "1,2"}, "timesteps: the numbers do not fall"),
        ({"guidance_interval": "3,1"}, "guidance_interval: 3,1 is not LOW,HIGH; use for example 0.2,3"),
        ({"guidance_interval": "3"}, "guidance_interval: 3 is not LOW,HIGH"),
        ({"guidance_rescale": 1.1}, "guidance_rescale: 1.1 is not between 0 and 1; use 0.7"),
        ({"perp_neg": -1}, "perp_neg: -1 is not between 0 and 30; use 1"),
        ({"merge_tokens": 0.8}, "merge_tokens: 0.8 is not between 0 and 0.75; use 0.5"),
        ({"batch_exact": "maybe"}, "batch_exact: maybe: "),
        ({"width": 0}, "width: 0 is not between 1 and 2048"),
        ({"height": -512}, "height: -512 is not between"),
        ({"width": 100_000}, "width: 100000 is not between 1 and 2048"),
        ({"num_images": 0}, "num_images: 0 is not between 1 and 10000; use 1"),
        ({"num_images": 10_001}, "num_images: 10001 is not between"),
        ({"batch_size": 0}, "batch_size: 0 is not between"),
        ({"allow_empty_prompt": "maybe"}, "allow_empty_prompt: maybe: "),
        ({"stepps": 3}, "stepps: no such setting (did you mean 'steps'?)"),
    ],
)
def test_violation_is_named_with_what_to_do(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError) as caught:
        GenerationRequest(**{"prompt": "a red circle", **settings})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300
    assert "; " in str(caught.value)


def test_numbers_may_be_text() -> None:
    request = GenerationRequest(prompt="a", steps="12", guidance_scale="1.5e0", seed="-1", width="512", num_images=4.0)
    assert (request.steps, request.guidance_scale, request.seed, request.width) == (12, 1.5, -1, 512)
    assert request.num_images == 4 and isinstance(request.num_images, int)


def test_what_is_left_out_is_none_until_resolved() -> None:
    request = GenerationRequest(prompt="a", steps=7)
    assert (request.width, request.sampler, request.guidance_scale, request.batch_size) == (None,) * 4
    resolved = resolve(request, model())
    assert (resolved.width, resolved.height, resolved.sampler, resolved.steps) == (256, 256, "ddim", 7)
    assert (resolved.guidance_scale, resolved.batch_size, resolved.seed) == (7.5, 4, -1)
    assert resolve(resolved, model()) == resolved


def test_empty_prompt_only_when_asked_for() -> None:
    assert GenerationRequest(prompt="", allow_empty_prompt=True).prompt == ""


@pytest.mark.parametrize(
    ("size", "the_model", "words"),
    [
        ((512, 500), model(), "512x500: height must be a multiple of 64; nearest: 448 or 512"),
        ((500, 512), model(), "500x512: width must be a multiple of 64; nearest: 448 or 512"),
        ((63, 64), model(), "63x64: width must be between 64 and 2048; use 64"),
        ((2048, 2047), model(), "nearest: 1984 or 2048"),
        ((24, 28), model(28, 8), "24x28: height must be a multiple of 8; nearest: 24 or 32"),
        ((64, 4), model(28, 8), "64x4: height must be between 8 and 2048; use 8"),
        ((64, 96), model(512, 96), "64x96: width must be between 96 and 2016; use 96"),
    ],
)
def test_size_must_fit_the_model(size: tuple[int, int], the_model: Any, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        resolve(GenerationRequest(prompt="a", width=size[0], height=size[1]), the_model)
    assert words in str(caught.value)


def test_steps_are_limited_by_the_model_timesteps() -> None:
    with pytest.raises(SettingError, match="steps: 301 is more than the model's 300 timesteps; use 300"):
        resolve(GenerationRequest(prompt="a", steps=301), model(timesteps=300))


def test_batches_cover_the_request_and_seeds_wrap() -> None:
    request = resolve(GenerationRequest(prompt="a", seed=2**32 - 2, num_images=5, batch_size=2), model())
    assert [batch.num_images for batch in request.batches()] == [2, 2, 1]
    assert request.seeds == [2**32 - 2, 2**32 - 1, 0, 1, 2]
    assert [seed for batch in request.batches() for seed in batch.seeds] == request.seeds


def test_random_seed_is_in_range_and_a_given_one_stays() -> None:
    assert all(0 <= resolve_seed(-1) < 2**32 for _ in range(100))
    assert resolve_seed(-1) != resolve_seed(-1)
    assert resolve_seed(7) == 7


def test_settings_round_trip_and_foreign_keys_are_listed() -> None:
    request = resolve(GenerationRequest(prompt="עברית 👩‍🚀 \u202e é", seed=1), model())
    read, rest = GenerationRequest.from_settings({**request.settings(), "model": "/etc/passwd", "outdir": "/"})
    assert read == request
    assert rest == {"model": "/etc/passwd", "outdir": "/"}
    with pytest.raises(SettingError, match="steps: "):
        GenerationRequest.from_settings({"prompt": "a", "steps": 1e9})


def test_request_is_frozen() -> None:
    with pytest.raises((dataclasses.FrozenInstanceError, ValueError)):
        GenerationRequest(prompt="a").steps = 3


def test_request_imports_no_network() -> None:
    code = "import sys, ldm.request; sys.exit(bool({'torch', 'open_clip', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("a\x00b\x07", "ab"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("one\ntwo\tthree\r\nfour\u2028five", "one two three four five"),
        ("👩‍🚀 e\u0301 \u202eabc 漢字", "👩‍🚀 e\u0301 \u202eabc 漢字"),
    ],
)
def test_control_characters_go_and_the_rest_stays(prompt: str, cleaned: str) -> None:
    assert clean(prompt) == cleaned


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red circle, left of a blue square!", "a-red-circle-left-of-a-blue-square"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "image"),
        ("/", "image"),
        ("", "image"),
        ("-rf --help", "rf-help"),
        ("CON", "con_"),
        ("lpt1", "lpt1_"),
        ("abc\u202egnp.exe", "abc-gnp-exe"),
        ("漢字 e\u0301", "漢字-é"),
        ("🟥", "image"),
    ],
)
def test_slug_is_a_safe_part_of_a_file_name(prompt: str, name: str) -> None:
    assert slug(prompt) == name


@pytest.mark.parametrize("prompt", ["x" * 300, "word " * 100, "漢" * 300, "𝔘" * 300, "\udcff" * 5, "a" * 59 + " bcd"])
def test_slug_is_short(prompt: str) -> None:
    assert 1 <= len(slug(prompt)) <= 60
    assert len(slug(prompt).encode()) <= 180
    assert not slug(prompt).startswith("-") and not slug(prompt).endswith("-")


def test_prompt_files_of_other_systems_are_read() -> None:
    lines = [(1, "a red circle"), (3, "zwei Würfel")]
    text = "a red circle\r\n\r\nzwei Würfel\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert read_lines(text.encode(encoding), "f") == lines
    with pytest.raises(DataError, match="f:2: not UTF-8"):
        read_lines(b"one\ntw\xff", "f")
    with pytest.raises(DataError, match="f: no prompt in it"):
        read_lines(b"\n \r\n", "f")


def test_samplers_are_known_by_their_other_names() -> None:
    known = {
        "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
        "Euler a": ("euler_ancestral", None),
        "EulerDiscreteScheduler": ("euler", None),
    }
    for name, expected in known.items():
        request = GenerationRequest(prompt="a", sampler=name)
        assert (request.sampler, request.schedule) == expected
    assert GenerationRequest(prompt="a", sampler="DPM++ 2M Karras", schedule="simple").schedule == "simple"


def test_a_list_of_levels_says_the_steps_and_takes_the_place_of_the_schedule() -> None:
    request = GenerationRequest(prompt="a", sigmas="14.6, 1.5e0,0")
    assert request.sigmas == (14.6, 1.5, 0.0)
    resolved = resolve(request, model())
    assert (resolved.steps, resolved.schedule) == (2, None)
    assert resolve(resolved, model()) == resolved
    assert GenerationRequest.from_settings(resolved.settings())[0] == resolved
    assert resolve(GenerationRequest(prompt="a", timesteps="999,500"), model()).steps == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigmas": "3,0", "steps": 2}, "sigmas: 1 steps, but steps is 2; leave steps out"),
        ({"sigmas": "3,0", "schedule": "karras"}, "sigmas: given together with schedule karras; use one"),
        ({"timesteps": "1000,3"}, "timesteps: 1000 is above the model's last, 999; start there"),
    ],
)
def test_a_list_of_levels_may_not_contradict_the_rest(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError) as caught:
        resolve(GenerationRequest(prompt="a", **settings), model())
    assert words in str(caught.value)


def test_convention_is_the_models_and_images_of_own_pace_are_drawn_one_by_one() -> None:
    assert resolve(GenerationRequest(prompt="a"), model()).convention == "exact"
    assert resolve(GenerationRequest(prompt="a", convention="a1111"), model()).convention == "a1111"
    assert resolve(GenerationRequest(prompt="a", sampler="dpm_adaptive", batch_size=4), model()).batch_size == 1


def test_every_sampler_name_is_accepted() -> None:
    assert [GenerationRequest(prompt="a", sampler=name).sampler for name in SAMPLERS] == list(SAMPLERS)


def test_each_text_of_guidance_is_a_pass() -> None:
    plain, perpendicular = {"prompt": "a"}, {"prompt": "a", "perp_neg": 1.0}
    for scale, passes in ((None, (2, 3)), (4.0, (2, 3)), (1.0, (1, 1))):
        found = [GenerationRequest(**given, guidance_scale=scale).passes for given in (plain, perpendicular)]
        assert tuple(found) == passes
