"""Our samplers and those of k-diffusion and diffusers: the same grid, denoiser and noise, in float64."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.diffusion.samplers import SAMPLERS, Sampler
from ldm.diffusion.samplers.consistency import tcd
from ldm.diffusion.samplers.ddim import ddim
from ldm.diffusion.samplers.ddpm import ddpm
from ldm.diffusion.samplers.dpm_solver import dpm_solver_1, dpm_solver_2
from ldm.diffusion.samplers.heun import heun
from ldm.models.text import open_clip_module

pytestmark = pytest.mark.parity

open_clip_module()  # makes torchvision importable beside a CPU-only PyTorch; k-diffusion and diffusers import it too
diffusers = pytest.importorskip("diffusers")

KARRAS = [(14.6 ** (1 / 7) + i / 11 * (0.03 ** (1 / 7) - 14.6 ** (1 / 7))) ** 7 for i in range(12)]
START = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mixture(x: Tensor, sigma: float) -> Tensor:
    """The exact clean estimate where the data are N(±1, ½²), half and half."""
    total = 0.25 + sigma**2
    return (0.25 * x + sigma**2 * torch.tanh(x / total)) / total


class Stream:
    """One stream of noise, whoever asks for it in whatever way."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def next(self, *_: object, **__: object) -> Tensor:
        return torch.randn(START.shape, dtype=torch.float64, generator=self.generator)

    __call__ = between = next


def ours(sampler: Sampler | Callable[..., Any], sigmas: Sequence[float], **options: Any) -> Tensor:
    """Where a walk over these levels ends, from START at the first."""
    return list(sampler(mixture, START * sigmas[0], sigmas, Stream(), **options))[-1].x


def difference(found: Tensor, known: Tensor) -> float:
    assert found.dtype == torch.float64
    return float((found - known).abs().max() / known.abs().max())


# k-diffusion


@pytest.fixture(scope="module")
def k_sampling() -> ModuleType:
    """`k_diffusion.sampling` without the rest of the package, which needs more than its samplers do."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("could not import 'k_diffusion': No module named 'k_diffusion'")
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")


def model(x: Tensor, sigma: Tensor) -> Tensor:
    return mixture(x, sigma[0].item())


@pytest.mark.parametrize("last", [0.0, 0.01])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {}),
        ("euler_ancestral", {}),
        ("euler_ancestral", {"eta": 0.5}),
        ("heun", {}),
        ("dpm_2", {}),
        ("dpm_2_ancestral", {}),
        ("dpm_2_ancestral", {"eta": 0.5}),
        ("lms", {}),
        ("lms", {"order": 3}),
        ("dpmpp_2s_ancestral", {}),
        ("dpmpp_2s_ancestral", {"eta": 0.0}),
        ("dpmpp_2m", {}),
        ("dpmpp_sde", {}),
        ("dpmpp_sde", {"eta": 0.5, "r": 0.3}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_2m_sde", {"eta": 0.5, "solver_type": "heun"}),
        ("dpmpp_3m_sde", {}),
        ("dpmpp_3m_sde", {"eta": 0.0}),
    ],
)
def test_k_diffusion(k_sampling: ModuleType, name: str, options: dict[str, Any], last: float) -> None:
    sigmas = [*KARRAS, last]
    noise = {"noise_sampler": Stream()} if SAMPLERS[name].draws != "nothing" else {}
    theirs = getattr(k_sampling, f"sample_{name}")
    levels = torch.tensor(sigmas, dtype=torch.float64)
    known = theirs(model, START * sigmas[0], levels, disable=True, **noise, **options)
    renamed = {key.replace("solver_type", "solver"): value for key, value in options.items()}
    assert difference(ours(SAMPLERS[name].walk, sigmas, **renamed), known) < 1e-5


def test_k_diffusion_churn(k_sampling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", Stream().next)
    sigmas = [*KARRAS, 0.0]
    levels, options = torch.tensor(sigmas, dtype=torch.float64), {"s_churn": 3.0, "s_noise": 1.003}
    known = k_sampling.sample_heun(model, START * sigmas[0], levels, disable=True, **options)
    assert difference(ours(heun, sigmas, churn=3.0, churn_noise=1.003), known) < 1e-5


@pytest.mark.parametrize("calls", [1, 2, 3, 7, 12])
def test_k_diffusion_fast(k_sampling: ModuleType, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    monkeypatch.setattr(k_sampling.torch, "tensor", lambda value: torch.as_tensor(value, dtype=torch.float64))
    known = k_sampling.sample_dpm_fast(model, START * 10.0, 0.03, 10.0, calls, disable=True)
    between = [10.0 - i / 2 for i in range(1, calls)]  # of the grid, only the ends and the number of steps matter
    assert difference(ours(SAMPLERS["dpm_fast"], [10.0, *between, 0.03]), known) < 1e-5


def test_k_diffusion_adaptive(k_sampling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(k_sampling.torch, "tensor", lambda value: torch.as_tensor(value, dtype=torch.float64))
    known = k_sampling.sample_dpm_adaptive(model, START * 10.0, 0.03, 10.0, disable=True)
    assert difference(ours(SAMPLERS["dpm_adaptive"], [10.0, 0.03]), known) < 1e-5


# diffusers

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def doubled(scheduler: Any) -> Any:
    """A scheduler whose tables are float64."""
    for name, table in vars(scheduler).items():
        if isinstance(table, Tensor) and table.is_floating_point() and name != "timesteps":
            setattr(scheduler, name, table.double())
    return scheduler


def theirs(
    scheduler: Any, sigmas: Sequence[float], variance_one: bool, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Tensor:
    """Where diffusers' loop ends, in our coordinate. `sigmas` has what the scheduler visits, and where it ends."""
    stream = Stream()
    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", stream.next, raising=False)
    if type(scheduler).__name__ == "DPMSolverSDEScheduler":
        scheduler.noise_sampler = stream.next
    scale = (1 + sigmas[0] ** 2) ** 0.5 if variance_one else 1.0
    x = START * sigmas[0] / scale
    for i, t in enumerate(scheduler.timesteps):
        if not variance_one:
            told = scheduler.scale_model_input(torch.ones((), dtype=torch.float64), t).item()
            sigma = (told**-2 - 1) ** 0.5
        elif hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
            sigma = (1 / scheduler.alphas_cumprod[t].item() - 1) ** 0.5
        else:
            sigma = sigmas[i]
        scale = (1 + sigma**2) ** 0.5 if variance_one else 1.0
        epsilon = (x * scale - mixture(x * scale, sigma)) / sigma
        x = scheduler.step(epsilon, t, x, **options).prev_sample
    return x * (1 + sigmas[-1] ** 2) ** 0.5 if variance_one else x


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "karras"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("euler", "Euler"),
        ("euler_ancestral", "EulerAncestral"),
        ("heun", "Heun"),
        ("lms", "LMS"),
        ("dpm_2", "KDPM2"),
        ("dpm_2_ancestral", "KDPM2Ancestral"),
        ("dpmpp_sde", "DPMSolverSDE"),
    ],
)
def test_diffusers_after_k_diffusion(monkeypatch: pytest.MonkeyPatch, name: str, kind: str, spacing: str) -> None:
    if kind == "DPMSolverSDE":
        pytest.importorskip("torchsde")
    if spacing == "karras" and kind == "EulerAncestral":
        return  # has no such grid
    settings = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    made = getattr(diffusers, f"{kind}{'' if kind == 'DPMSolverSDE' else 'Discrete'}Scheduler")(**SD, **settings)
    made.set_timesteps(12)
    sigmas = sorted({float(sigma) for sigma in doubled(made).sigmas}, reverse=True)
    assert len(sigmas) == 13
    assert difference(ours(SAMPLERS[name], sigmas), theirs(made, sigmas, False, monkeypatch)) < 1e-5


@pytest.mark.parametrize(
    ("sampler", "options", "kind", "settings"),
    [
        ("dpmpp_2m", {}, "DPMSolverMultistep", {}),
        ("dpmpp_2m", {}, "DPMSolverMultistep", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        (
            "dpmpp_3m_sde",
            {"eta": 0.0},
            "DPMSolverMultistep",
            {"solver_order": 3, "solver_type": "heun", "lower_order_final": False},
        ),
        ("dpmpp_2m_sde", {}, "DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
        (
            "dpmpp_2m_sde",
            {"solver": "heun"},
            "DPMSolverMultistep",
            {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        ),
        ("deis", {"order": 2, "lower_order_final": True}, "DEISMultistep", {}),
        ("deis", {"order": 3, "lower_order_final": True}, "DEISMultistep", {"solver_order": 3}),
        ("deis", {}, "DEISMultistep", {"solver_order": 3, "lower_order_final": False}),
        ("unipc", {}, "UniPCMultistep", {}),
        (
            "unipc",
            {"variant": "bh1", "lower_order_final": True},
            "UniPCMultistep",
            {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        ),
        ("unipc", {"order": 1}, "UniPCMultistep", {"solver_order": 1}),
        ("unipc", {"order": 3, "lower_order_final": True}, "UniPCMultistep", {"solver_order": 3}),
        (
            "unipc",
            {"order": 3, "variant": "bh1", "lower_order_final": True},
            "UniPCMultistep",
            {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        ),
        (
            "unipc",
            {"order": 3},
            "UniPCMultistep",
            {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        ),
    ],
)
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_diffusers_multistep(
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    options: dict[str, Any],
    kind: str,
    settings: dict[str, Any],
    steps: int,
) -> None:
    made = getattr(diffusers, f"{kind}Scheduler")(**SD, **settings)
    made.set_timesteps(steps)
    sigmas = doubled(made).sigmas.tolist()
    found = ours(SAMPLERS[sampler].walk, sigmas, **options)
    assert difference(found, theirs(made, sigmas, True, monkeypatch)) < 1e-5


@pytest.mark.parametrize(
    ("sampler", "order", "algorithm"),
    [(dpm_solver_1, 1, "dpmsolver"), (dpm_solver_2, 2, "dpmsolver"), ("dpmpp_2s", 2, "dpmsolver++")],
)
def test_diffusers_single_step(monkeypatch: pytest.MonkeyPatch, sampler: Any, order: int, algorithm: str) -> None:
    """Its steps take `order` levels of the grid, of which the inner ones are the points inside: here even in λ."""
    made = diffusers.DPMSolverSinglestepScheduler(
        **SD, solver_order=order, algorithm_type=algorithm, lower_order_final=False, final_sigmas_type="sigma_min"
    )
    made.set_timesteps(12)
    sigmas = [14.6 * (0.03 / 14.6) ** (i / 12) for i in range(13)]
    made.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    sampler = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
    assert difference(ours(sampler, sigmas[::order]), theirs(made, sigmas, True, monkeypatch)) < 1e-5


def level(scheduler: Any, timestep: int) -> float:
    """σ of a timestep; −1 is where the scheduler ends."""
    alpha = scheduler.alphas_cumprod[timestep] if timestep >= 0 else scheduler.final_alpha_cumprod
    return (1 / float(alpha) - 1) ** 0.5


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_diffusers_ddim(monkeypatch: pytest.MonkeyPatch, eta: float, to_zero: bool) -> None:
    made = diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=to_zero, steps_offset=1)
    made.set_timesteps(20)
    sigmas = [level(doubled(made), t) for t in [*made.timesteps.tolist(), -1]]
    known = theirs(made, sigmas, True, monkeypatch, eta=eta)
    assert difference(ours(ddim, sigmas, eta=eta), known) < 1e-5


@pytest.mark.parametrize(("variance", "named"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_diffusers_ddpm(monkeypatch: pytest.MonkeyPatch, variance: str, named: str) -> None:
    made = diffusers.DDPMScheduler(**SD, clip_sample=False, variance_type=named)
    made.set_timesteps(20)
    sigmas = [*(level(doubled(made), t) for t in made.timesteps.tolist()), 0.0]
    assert difference(ours(ddpm, sigmas, variance=variance), theirs(made, sigmas, True, monkeypatch)) < 1e-5


def test_diffusers_plms(monkeypatch: pytest.MonkeyPatch) -> None:
    made = diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1)
    made.set_timesteps(10)
    timesteps = sorted(set(made.timesteps.tolist()), reverse=True)
    sigmas = [level(doubled(made), t) for t in [*timesteps, -1]]
    assert len(sigmas) == len(made.timesteps), "one call more than steps, and one level more"
    assert difference(ours(SAMPLERS["plms"], sigmas), theirs(made, sigmas, True, monkeypatch)) < 1e-5


def test_diffusers_ipndm() -> None:
    sigmas = [*KARRAS, 0.02]
    made = diffusers.IPNDMScheduler()
    made.set_timesteps(len(sigmas) - 1)
    levels = torch.tensor(sigmas, dtype=torch.float64)
    made.betas, made.alphas = levels / (1 + levels**2) ** 0.5, 1 / (1 + levels**2) ** 0.5
    x = START * made.betas[0]
    for sigma, t in zip(sigmas, made.timesteps, strict=False):
        scale = (1 + sigma**2) ** 0.5
        x0 = mixture(x * scale, sigma)
        v = ((x * scale - x0) / sigma - sigma * x0) / scale
        x = made.step(v, t, x).prev_sample
    assert difference(ours(SAMPLERS["ipndm"], sigmas), x / made.alphas[-1]) < 1e-5


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_diffusers_lcm(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    made = diffusers.LCMScheduler(**SD)
    made.set_timesteps(steps)
    sigmas = [*(level(doubled(made), t) for t in made.timesteps.tolist()), 0.0]
    assert difference(ours(SAMPLERS["lcm"], sigmas), theirs(made, sigmas, True, monkeypatch)) < 1e-5


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_diffusers_tcd(monkeypatch: pytest.MonkeyPatch, gamma: float) -> None:
    made = diffusers.TCDScheduler(**SD)
    made.set_timesteps(4)
    timesteps = [*made.timesteps.tolist(), 0]
    earlier = {level(doubled(made), t): level(made, int((1 - gamma) * t)) for t in timesteps}
    sigmas = list(earlier)
    known = theirs(made, sigmas, True, monkeypatch, eta=gamma)
    assert difference(ours(tcd, sigmas, earlier=earlier.__getitem__), known) < 1e-5
