"""Every sampler of the table walks a known distribution from noise to its known answer, and keeps its word."""

import inspect
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.diffusion.grids import GRIDS
from ldm.diffusion.samplers import ALIASES, SAMPLERS, Step, resolve_name
from ldm.diffusion.samplers.consistency import lcm, tcd
from ldm.diffusion.samplers.ddim import ddim
from ldm.diffusion.samplers.ddpm import ddpm
from ldm.diffusion.samplers.dpm_adaptive import dpm_adaptive
from ldm.diffusion.samplers.dpm_solver import dpm_solver_1, orders_of_fast
from ldm.diffusion.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde
from ldm.diffusion.samplers.euler import euler, euler_ancestral
from ldm.diffusion.samplers.heun import heun
from ldm.diffusion.samplers.names import GRID_NAMES, spelled
from ldm.diffusion.samplers.restart import restart
from ldm.diffusion.schedule import scaled_linear

SD = scaled_linear(0.00085, 0.012, 1000)

# The data: a Gaussian in the plane whose axes are turned against the coordinates'.
MEAN = torch.tensor([0.8, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
VARIANCES, AXES = torch.linalg.eigh(COVARIANCE)


def along_axes(x: Tensor, scale: Tensor) -> Tensor:
    """The distance to MEAN, scaled along each axis of the data."""
    return MEAN.to(x) + ((x - MEAN.to(x)) @ AXES.to(x) * scale.to(x)) @ AXES.T.to(x)


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """The exact clean estimate: the mean of the data that x can come from."""
    return along_axes(x, VARIANCES / (VARIANCES + sigma**2))


def end_of_trajectory(x: Tensor, sigma: float) -> Tensor:
    """Where the probability-flow ODE goes from x, which a distilled network says."""
    return along_axes(x, (VARIANCES / (VARIANCES + sigma**2)).sqrt())


class Noise:
    """Noise keyed as a sampler may expect it: by step and purpose, and as increments of one path W(1/σ²)."""

    def __init__(self, shape: Sequence[int], seed: int = 0) -> None:
        self.shape, self.seed = tuple(shape), seed
        self.path = {0.0: torch.zeros(self.shape, dtype=torch.float64)}

    def __call__(self, step: int, purpose: str) -> Tensor:
        key = zlib.crc32(f"{self.seed}/{step}/{purpose}".encode())
        return torch.randn(self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(key))

    def at(self, time: float) -> Tensor:
        """W(time), from its distribution given all that is known of the path."""
        if time not in self.path:
            before, after = max(t for t in self.path if t < time), min((t for t in self.path if t > time), default=None)
            fresh, passed = self(len(self.path), "path"), time - before
            if after is None:
                self.path[time] = self.path[before] + passed**0.5 * fresh
            else:
                share = passed / (after - before)
                mean = (1 - share) * self.path[before] + share * self.path[after]
                self.path[time] = mean + (passed * (1 - share)) ** 0.5 * fresh
        return self.path[time]

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        start, end = sigma**-2, sigma_next**-2
        return (self.at(end) - self.at(start)) / (end - start) ** 0.5


def start(n: int, sigma: float) -> Tensor:
    """Data and noise at level σ."""
    z = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return MEAN + z * (VARIANCES + sigma**2).sqrt() @ AXES.T


def last(steps: Iterable[Step]) -> Step:
    return list(steps)[-1]


def counted(calls: list[float]) -> Callable[[Tensor, float], Tensor]:
    def denoise(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return gaussian(x, sigma)

    return denoise


def assert_gaussian(x: Tensor) -> None:
    """Mean and covariance, to five standard errors of 8,000 draws."""
    assert (x.mean(dim=0) - MEAN).abs().max() < 0.04
    assert (torch.cov(x.T) - COVARIANCE).abs().max() < 0.04


@pytest.mark.parametrize("name", [name for name, method in SAMPLERS.items() if not method.distilled])
def test_reproduces_mean_and_covariance(name: str) -> None:
    sigmas = GRIDS["karras"](SD, 150)
    x = start(8000, sigmas[0])
    assert_gaussian(last(SAMPLERS[name](gaussian, x, sigmas, Noise(x.shape))).x)


@pytest.mark.parametrize(
    ("walk", "options"),
    [
        (ddim, {"eta": 0.5}),
        (ddpm, {"variance": "beta"}),
        (heun, {"churn": 30.0}),
        (dpmpp_2m_sde, {"eta": 0.5, "solver": "heun"}),
        (restart, {"repeats": 3, "interval": (0.3, 3.0)}),
    ],
)
def test_reproduces_mean_and_covariance_with_options(walk: Callable[..., Any], options: dict[str, Any]) -> None:
    sigmas = GRIDS["karras" if walk is not ddpm else "trailing"](SD, 150 if walk is not ddpm else 1000)
    x = start(8000, sigmas[0])
    assert_gaussian(last(walk(gaussian, x, sigmas, Noise(x.shape), **options)).x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_left_as_the_level_says(name: str) -> None:
    """If the model knows the clean image, what is left at level σ is noise of standard deviation σ, at every step."""
    sigmas = GRIDS["karras"](SD, 12)
    x = torch.randn(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    for step in SAMPLERS[name](lambda x, sigma: torch.zeros_like(x), x, sigmas, Noise(x.shape)):
        assert step.x.std().item() == pytest.approx(step.sigma, rel=0.03)


@pytest.mark.parametrize("closing", [True, False])
@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_are_as_claimed(name: str, closing: bool) -> None:
    method, calls = SAMPLERS[name], list[float]()
    sigmas = GRIDS["karras"](SD, 7)[: None if closing else -1]
    steps = list(method(counted(calls), start(2, sigmas[0]), sigmas, Noise((2, 2))))
    total = len(steps)
    assert [(step.index, step.total) for step in steps[:-1]] == [(i, steps[i].total) for i in range(total - 1)]
    assert (steps[-1].index, steps[-1].total) == (total - 1, total)
    assert steps[-1].sigma == pytest.approx(sigmas[-1])
    if method.calls is None:
        return
    if not method.own_levels:
        assert [step.sigma for step in steps] == sigmas[1:] and {step.total for step in steps} == {len(sigmas) - 1}
        expected = method.calls * (len(sigmas) - 1) + method.warm_up
        assert len(calls) == expected - (method.calls - 1 if closing else 0)
    elif name == "dpm_fast":
        assert len(calls) == len(sigmas) - 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_number_of_steps_ends_in_a_clean_estimate(name: str) -> None:
    for steps in (1, 2, 3, 4):
        sigmas = GRIDS["karras"](SD, steps)
        x = last(SAMPLERS[name](gaussian, start(5, sigmas[0]), sigmas, Noise((5, 2)))).x
        assert torch.isfinite(x).all()
        if steps == 1:
            assert torch.allclose(x, gaussian(start(5, sigmas[0]), sigmas[0])), "one step is one clean estimate"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SAMPLERS)
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    sigmas = GRIDS["karras"](SD, 6)
    x = start(3, sigmas[0]).to(dtype)
    for step in SAMPLERS[name](gaussian, x, sigmas, Noise((3, 2))):
        assert step.x.dtype == step.denoised.dtype == dtype


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_asked_for_where_it_is_claimed(name: str) -> None:
    sigmas = GRIDS["karras"](SD, 20)
    if SAMPLERS[name].draws == "nothing":
        last(SAMPLERS[name](gaussian, start(2, sigmas[0]), sigmas))
    else:
        with pytest.raises(ValueError, match="noise"):
            last(SAMPLERS[name](gaussian, start(2, sigmas[0]), sigmas))


@pytest.mark.parametrize("name", [name for name, method in SAMPLERS.items() if method.draws == "intervals"])
def test_twice_the_steps_stay_close_on_the_same_brownian_path(name: str) -> None:
    fine, noise = GRIDS["karras"](SD, 81)[:-1], Noise((200, 2))
    x = start(200, fine[0])
    ends = [last(SAMPLERS[name](gaussian, x, fine[::every], noise)).x for every in (1, 2, 4)]
    elsewhere = last(SAMPLERS[name](gaussian, x, fine, Noise((200, 2), seed=1))).x

    def apart(a: Tensor, b: Tensor) -> float:
        return (a - b).square().mean().sqrt().item()

    assert apart(ends[0], ends[1]) < 0.7 * apart(ends[1], ends[2]), "it converges path by path"
    assert apart(ends[0], ends[1]) < 0.15 * apart(ends[0], elsewhere)


def test_the_classic_samplers_are_one_family() -> None:
    sigmas = GRIDS["leading"](SD, 20)
    x, noise = start(16, sigmas[0]), Noise((16, 2))

    def same(walk: Callable[..., Any], **options: Any) -> Tensor:
        """Where it ends if all noise of a step is the same, whatever its purpose."""

        class Same(Noise):
            def __call__(self, step: int, purpose: str) -> Tensor:
                return noise(step, "same")

        return last(walk(gaussian, x, sigmas, Same((16, 2)), **options)).x

    assert torch.allclose(same(ddim), same(euler))
    assert torch.allclose(same(dpm_solver_1), same(euler))
    assert torch.allclose(same(ddim, eta=1.0), same(ddpm))
    assert torch.allclose(same(euler_ancestral), same(ddpm))
    assert torch.allclose(same(dpmpp_2m_sde, eta=0.0), same(dpmpp_2m))
    assert torch.allclose(same(tcd, gamma=0.0), same(ddim))
    assert torch.allclose(same(tcd, gamma=1.0), same(lcm))


def test_ddpm_takes_the_posterior_of_its_paper() -> None:
    """Against Ho et al. 2020, Equations 6 and 7, written in their own coordinate x_t = √ᾱ_t (x0 + σ·noise)."""
    alphas, betas = SD.alphas_cumprod, SD.betas
    t, x0, x_t, noise = 400, 0.3, 0.9, Noise((1,))
    mean = (
        alphas[t - 1] ** 0.5 * betas[t] / (1 - alphas[t]) * x0
        + (1 - betas[t]) ** 0.5 * (1 - alphas[t - 1]) / (1 - alphas[t]) * x_t
    )
    variances = {"posterior": betas[t] * (1 - alphas[t - 1]) / (1 - alphas[t]), "beta": betas[t]}
    for variance, value in variances.items():
        x = torch.full((1,), x_t / alphas[t] ** 0.5, dtype=torch.float64)
        sigmas = [float(SD.sigmas[t]), float(SD.sigmas[t - 1]), 0.0]
        step = next(ddpm(lambda x, sigma: torch.full_like(x, x0), x, sigmas, noise, variance=variance))  # type: ignore[arg-type]  # a function in place of a network
        assert step.x.item() * alphas[t - 1] ** 0.5 == pytest.approx(mean + value**0.5 * noise(0, "ddpm").item())


def test_churn_raises_the_level_before_a_step() -> None:
    calls: list[float] = []
    sigmas, x = [4.0, 2.0, 1.0], start(2, 4.0)
    last(heun(counted(calls), x, sigmas, Noise((2, 2)), churn=0.4, churn_interval=(1.5, 3.0)))
    assert calls == pytest.approx([4.0, 2.0, 2.0 * 1.2, 1.0])


def test_lcm_reproduces_mean_and_covariance_with_a_distilled_network() -> None:
    sigmas = GRIDS["trailing"](SD, 4)
    x = start(8000, sigmas[0])
    assert_gaussian(last(lcm(end_of_trajectory, x, sigmas, Noise(x.shape))).x)


def test_tcd_goes_down_to_the_level_it_is_told() -> None:
    seen: list[float] = []

    def earlier(sigma: float) -> float:
        seen.append(sigma)
        return sigma / 10

    noise, x = Noise((2, 2)), start(2, 4.0)
    step = next(tcd(gaussian, x, [4.0, 2.0, 0.0], noise, earlier=earlier))
    x0 = gaussian(x, 4.0)
    expected = x0 + 0.2 * (x - x0) / 4.0 + (2.0**2 - 0.2**2) ** 0.5 * noise(0, "tcd")
    assert seen == [2.0] and torch.allclose(step.x, expected)


def test_restart_walks_a_piece_of_the_grid_again() -> None:
    sigmas, calls = [8.0, 4.0, 2.0, 1.0, 0.5, 0.0], list[float]()
    steps = list(restart(counted(calls), start(2, 8.0), sigmas, Noise((2, 2)), interval=(0.9, 4.2), repeats=2))
    assert [step.sigma for step in steps] == [4.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 0.5, 0.0]
    assert len(calls) == 2 * (len(steps) - 1) + 1 and {step.total for step in steps} == {9}


def test_adaptive_makes_more_calls_for_less_error() -> None:
    sigmas, x = [10.0, 0.05], start(4, 10.0)
    known = along_axes(x, ((VARIANCES + 0.05**2) / (VARIANCES + 10.0**2)).sqrt())
    made = []
    for tolerance in (0.05, 0.005, 0.0005):
        calls: list[float] = []
        found = last(dpm_adaptive(counted(calls), x, sigmas, relative=tolerance, absolute=tolerance)).x
        assert (found - known).abs().max() < tolerance
        made.append(len(calls))
    assert made[0] < made[1] < made[2] and all(calls % 3 == 0 for calls in made)


def test_adaptive_ends_where_the_model_breaks() -> None:
    def broken(x: Tensor, sigma: float) -> Tensor:
        return gaussian(x, sigma) if sigma > 1.0 else torch.full_like(x, torch.nan)

    assert last(dpm_adaptive(broken, start(2, 10.0), [10.0, 0.05, 0.0])).x.isnan().all()


@pytest.mark.parametrize("calls", range(1, 20))
def test_fast_spends_exactly_the_calls_it_has(calls: int) -> None:
    assert sum(orders_of_fast(calls)) == calls
    assert orders_of_fast(0) == []


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_walk_can_be_counted_without_a_model(name: str) -> None:
    zero = Noise((1,))
    last(SAMPLERS[name](lambda x, sigma: x, torch.zeros(1), GRIDS["karras"](SD, 20), zero))


# Names


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Euler a", ("euler_ancestral", None)),
        ("euler", ("euler", None)),
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("dpm++ 2m sde exponential", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 3M SDE Karras", ("dpmpp_3m_sde", "karras")),
        ("DPM++ SDE", ("dpmpp_sde", None)),
        ("DPM++ 2S a Karras", ("dpmpp_2s_ancestral", "karras")),
        ("DPM2 a", ("dpm_2_ancestral", None)),
        ("DPM fast", ("dpm_fast", None)),
        ("DPM adaptive", ("dpm_adaptive", None)),
        ("Heun SGM Uniform", ("heun", "sgm_uniform")),
        ("Euler Uniform", ("euler", "linspace")),
        ("LMS Karras", ("lms", "karras")),
        ("DDIM", ("ddim", None)),
        ("Euler DDIM", ("euler", "ddim_uniform")),
        ("UniPC Automatic", ("unipc", None)),
        ("uni_pc", ("unipc", None)),
        ("Restart", ("restart", None)),
        ("DPMSolverMultistepScheduler", ("dpmpp_2m", None)),
        ("DPMSolverSinglestepScheduler", ("dpmpp_2s", None)),
        ("KDPM2AncestralDiscreteScheduler", ("dpm_2_ancestral", None)),
        ("PNDMScheduler", ("plms", None)),
        ("sample_dpmpp_2m_sde", ("dpmpp_2m_sde", None)),
        ("k_euler_a", ("euler_ancestral", None)),
        ("k_dpmpp_2m_ka", ("dpmpp_2m", "karras")),
        ("kdpm_2_a", ("dpm_2_ancestral", None)),
        ("dpmpp_2m_k", ("dpmpp_2m", "karras")),
        ("no such sampler", ("no such sampler", None)),
        ("", ("", None)),
    ],
)
def test_names_of_other_programs_are_known(name: str, known: tuple[str, str | None]) -> None:
    assert resolve_name(name) == resolve_name(name.upper() if known[0] in SAMPLERS else name) == known


def test_every_name_means_one_thing() -> None:
    meant: dict[str, str] = {}
    ours = {**{name: (name, None) for name in SAMPLERS}, **ALIASES}
    for name, (sampler, _) in ours.items():
        assert meant.setdefault(spelled(name), sampler) == sampler
        assert resolve_name(name) == (sampler, None)
        for label, grid in GRID_NAMES.items():
            assert resolve_name(f"{name} {label}") == (sampler, grid)
    assert {grid for grid in GRID_NAMES.values() if grid} <= set(GRIDS)


# The page for users


def test_the_page_says_of_a_sampler_what_the_table_says() -> None:
    page = (Path(__file__).parent.parent / "docs" / "samplers.md").read_text(encoding="utf-8")
    section = page.split("## Samplers\n")[1].split("\n##")[0]
    table = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in section.splitlines() if "| `" in line
    ]
    rows = {name: cells for name, *cells in table}
    assert rows and set(rows) <= set(SAMPLERS)
    for name in rows:
        method, (aliases, order, calls, paper) = SAMPLERS[name], rows[name][:4]
        assert [alias.strip(" `") for alias in aliases.split(",") if alias.strip()] == list(method.aliases)
        claimed = "" if method.order is None else f"{method.order}"
        assert order == (f"{claimed} ({method.started_alone})" if method.started_alone else claimed)
        assert re.match(r"\d", calls) is None if method.calls is None else calls.startswith(f"{method.calls}")
        assert method.paper in paper


def test_options_have_defaults() -> None:
    for method in SAMPLERS.values():
        given = list(inspect.signature(method.walk).parameters.values())
        assert [parameter.name for parameter in given[:4]] == ["denoise", "x", "sigmas", "noise"]
        assert all(parameter.default is not inspect.Parameter.empty for parameter in given[3:])
