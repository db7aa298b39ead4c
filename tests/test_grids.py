"""Every grid runs the steps asked for and has its golden numbers; so has what other programs make of them."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ldm.diffusion import names
from ldm.diffusion.conventions import CONVENTIONS, reproduces, route, sampler_of
from ldm.diffusion.grids import ALIGNED, GRIDS
from ldm.diffusion.route import Route, exact, listed
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import NOISE_SCHEDULES, linear, scaled_linear
from ldm.errors import SettingError

SD = scaled_linear(0.00085, 0.012, 1000)
SHORT = linear(1e-4, 0.02, 300)
ZERO_SNR = NOISE_SCHEDULES["scaled_linear_zero_snr"](0.00085, 0.012, 1000)
# The numbers of steps that CompVis' DDIM runs as asked.
AS_ASKED = (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500)


def test_names_are_those_of_the_tables() -> None:
    assert tuple(GRIDS) == names.GRIDS and tuple(CONVENTIONS) == names.CONVENTIONS


def falls_to_zero(sigmas: Sequence[float]) -> bool:
    return sigmas[-1] == 0.0 and all(a > b for a, b in itertools.pairwise(sigmas))


def timesteps(name: str, steps: int) -> list[float]:
    return [SD.timestep(sigma) for sigma in GRIDS[name](SD, steps)[:-1]]


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_runs_every_number_of_steps_from_1_to_1000(name: str) -> None:
    for schedule, stride in ((SD, 1), (SHORT, 1), (ZERO_SNR, 37)):
        for steps in range(1, len(schedule) + 1, stride):
            sigmas = GRIDS[name](schedule, steps)
            assert len(sigmas) == steps + 1 and falls_to_zero(sigmas), (name, steps)
            assert sigmas[0] <= schedule.sigma_max * (1 + 1e-12) and sigmas[-2] >= schedule.sigma_min * (1 - 1e-12)


def test_timestep_grids_have_their_golden_numbers() -> None:
    assert GRIDS["linspace"](SD, 20)[:3] == pytest.approx([14.6146, 10.7468, 8.0815], rel=1e-4)
    assert GRIDS["linspace"](SD, 20)[-3:] == pytest.approx([0.2322, 0.0292, 0.0], abs=1e-4)
    assert GRIDS["sgm_uniform"](SD, 20)[:2] == pytest.approx([14.6146, 10.9073], rel=1e-4)
    assert GRIDS["sgm_uniform"](SD, 20)[-2] == pytest.approx(0.2255, abs=1e-4)
    assert GRIDS["simple"](SD, 20)[1] == pytest.approx(10.9042, rel=1e-4)
    assert GRIDS["simple"](SD, 20)[-2] == pytest.approx(0.2230, abs=1e-4)
    assert timesteps("leading", 20) == pytest.approx([951 - 50 * i for i in range(20)])
    assert GRIDS["leading"](SD, 50)[0] == pytest.approx(13.12, abs=5e-3) and timesteps("leading", 1) == [1.0]
    assert timesteps("ddim_uniform", 20) == pytest.approx(timesteps("leading", 20))
    assert timesteps("ddim_uniform", 30)[0] == pytest.approx(967) and timesteps("leading", 30)[0] == pytest.approx(958)
    assert timesteps("trailing", 20) == pytest.approx([999 - 50 * i for i in range(20)])
    assert timesteps("beta", 3) == pytest.approx([999, 723.862, 275.138], abs=1e-3)


def test_grids_in_sigma_have_their_golden_numbers() -> None:
    golden = [14.6146, 9.1029, 5.4784, 3.1686, 1.7494, 0.9141, 0.4469, 0.2014, 0.0819, 0.0292, 0.0]
    assert GRIDS["karras"](SD, 10) == pytest.approx(golden, abs=1e-4)
    assert GRIDS["align_your_steps"](SD, 11)[:-1] == pytest.approx(ALIGNED, rel=6e-3)
    exponential = GRIDS["exponential"](SD, 10)[:-1]
    assert np.diff(np.log(exponential)) == pytest.approx(-np.log(SD.sigma_max / SD.sigma_min) / 9)
    assert GRIDS["polyexponential"](SD, 10) == pytest.approx([*exponential, 0.0])
    assert np.diff(np.arctan(GRIDS["kl_optimal"](SD, 10)[:-1]), n=2) == pytest.approx(0.0, abs=1e-12)
    spaced, shaped = GRIDS["leading"](SD, 10), GRIDS["leading_karras"](SD, 10)
    assert (shaped[0], shaped[-2]) == pytest.approx((spaced[0], spaced[-2]))
    assert np.diff(np.array(shaped[:-1]) ** (1 / 7), n=2) == pytest.approx(0.0, abs=1e-12)


def test_zero_terminal_snr_starts_as_before_and_ends_in_noise() -> None:
    assert ZERO_SNR.alphas_cumprod[0] == pytest.approx(SD.alphas_cumprod[0], rel=1e-12)
    assert ZERO_SNR.sigmas[998] == pytest.approx(2254, abs=0.5)
    assert ZERO_SNR.sigma_max == pytest.approx(4096, rel=1e-6)
    roots, before = np.sqrt(ZERO_SNR.alphas_cumprod[:-1]), np.sqrt(SD.alphas_cumprod[:-1])
    assert np.polyval(np.polyfit(before, roots, 1), before) == pytest.approx(roots, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in ("dpm_2", "dpm_2_ancestral", "euler") if name in SAMPLERS])
def test_only_solvers_of_dpm2s_kind_leave_the_least_level_out(name: str) -> None:
    for steps in (1, 2, 10, 1000):
        found = exact(name, "karras")(SD, steps)
        assert len(found.timesteps) == steps and falls_to_zero(found.sigmas)
        assert (found.sigmas[-2] > SD.sigma_min * 1.001) == (name != "euler") or steps == 1
    assert exact(name, "trailing")(SD, 10).sigmas == tuple(GRIDS["trailing"](SD, 10))


def test_a_list_is_walked_as_it_is() -> None:
    assert listed(SD, (14.6, 1.0, 0.0), None).sigmas == (14.6, 1.0, 0.0)
    found = listed(SD, None, (999.0, 500.0, 0.5))
    assert found.timesteps == (999.0, 500.0, 0.5) and found.start == pytest.approx(SD.sigma_max)
    assert found.sigmas == pytest.approx((SD.sigma_max, SD.sigma(500), SD.sigma(0.5), 0.0))


def test_compvis_ddim_runs_what_its_arithmetic_gives() -> None:
    right, refused = [], []
    for steps in range(1, 1001):
        found = possible("compvis", "ddim", "leading", steps)
        if found is None:
            refused.append(steps)
            continue
        if len(found.timesteps) == steps:
            right.append(steps)
        assert found.sigmas[-1] == SD.sigma_min and found.timesteps[-1] == 1.0
    assert tuple(right) == AS_ASKED
    assert len(refused) == 599 and refused[:6] == [3, 9, 27, 36, 37, 101] and refused[-1] == 1000
    counts = [len(route("compvis", "ddim", "leading", SD, steps).timesteps) for steps in (30, 60, 75, 150)]
    assert counts == [31, 63, 77, 167]


@pytest.mark.parametrize(("steps", "lowered"), [(5, True), (14, True), (15, False)])
def test_compvis_dpm_solver_ends_with_a_step_of_first_order_below_15_steps(steps: int, lowered: bool) -> None:
    found = route("compvis", "dpmpp_2m", "linspace", SD, steps)
    assert len(found.timesteps) == steps and found.sigmas[-1] == pytest.approx(SD.sigma_min)

    def denoise(x: Any, sigma: float) -> Any:
        return x / (1 + sigma**2)

    *_, before, last = sampler_of("compvis", "dpmpp_2m", "linspace", SD)(denoise, 3.0, found.sigmas)  # type: ignore[arg-type]  # a function in place of a network
    first_order = last.denoised + (before.x - last.denoised) * found.sigmas[-1] / found.sigmas[-2]
    assert (last.index, last.total) == (steps - 1, steps)
    assert (last.x == pytest.approx(first_order, rel=1e-9)) == lowered


def test_latents_at_variance_one_start_and_end_at_their_scale() -> None:
    found = route("diffusers", "ddim", "leading", SD, 50)
    assert found.start == pytest.approx((1 + SD.sigma(981) ** 2) ** 0.5)
    assert found.sigmas[-1] == pytest.approx(SD.sigma_min)
    assert found.finish == pytest.approx(SD.alphas_cumprod[0] ** 0.5)
    assert found.arrivals is None, "every step arrives where the next one begins"
    assert route("exact", "ddim", "leading", SD, 50).start == pytest.approx(SD.sigma(981))


def test_diffusers_ddim_arrives_elsewhere_than_it_goes_on_where_steps_do_not_divide_t() -> None:
    found = route("diffusers", "ddim", "trailing", SD, 30)
    assert found.arrivals is not None and found.timesteps[:3] == (999.0, 966.0, 932.0)
    assert [round(SD.timestep(sigma)) for sigma in found.arrivals[:3]] == [966, 933, 899]


def test_diffusers_trailing_does_not_visit_a_timestep_below_0() -> None:
    for steps in range(1, 1001):
        assert min(route("diffusers", "euler", "trailing", SD, steps).timesteps) >= 0.0


def test_diffusers_multistep_rounds_what_the_network_is_told_and_not_the_level() -> None:
    found = route("diffusers", "dpmpp_2m", "karras", SD, 10)
    assert found.sigmas == pytest.approx(GRIDS["karras"](SD, 10))
    assert all(timestep == int(timestep) for timestep in found.timesteps)
    told = [SD.timestep(sigma) for sigma in found.sigmas[:-1]]
    assert np.abs(np.array(told) - found.timesteps).max() <= 0.5 and told != list(found.timesteps)


def test_web_ui_makes_one_step_less_than_it_has_timesteps() -> None:
    found = route("a1111", "ddim", "leading", SD, 20)
    assert (len(found.timesteps), found.timesteps[0], found.timesteps[-1]) == (19, 951.0, 51.0)
    assert found.sigmas[-1] == pytest.approx(SD.sigma(1))
    with pytest.raises(SettingError, match="a1111 cannot run ddim on leading in 1 steps"):
        route("a1111", "ddim", "leading", SD, 1)


def test_web_ui_has_grids_of_its_own() -> None:
    assert route("a1111", "euler", "align_your_steps", SD, 11).sigmas[:-1] == pytest.approx(ALIGNED)
    assert len(route("a1111", "euler", "ddim_uniform", SD, 30).timesteps) == 31
    ends = route("a1111", "euler", "kl_optimal", SD, 10)
    assert (len(ends.sigmas), ends.sigmas[-1], ends.finish) == (11, pytest.approx(SD.sigma_min), 1.0)
    in_sigma = route("a1111", "euler", "beta", SD, 3).sigmas
    assert in_sigma == pytest.approx((SD.sigma_max, (SD.sigma_max + SD.sigma_min) / 2, SD.sigma_min, 0.0))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_route_falls_and_tells_the_network_something_at_each_level(convention: str) -> None:
    for sampler, spacings in CONVENTIONS[convention].routes.items():
        assert set(spacings) <= set(GRIDS)
        for grid in spacings:
            assert reproduces(convention, sampler, grid)
            for steps in (2, 7, 40):
                found = possible(convention, sampler, grid, steps)
                assert found is None or len(found.sigmas) == len(found.timesteps) + 1
                assert found is None or all(0 <= t <= 999 for t in found.timesteps)


def possible(convention: str, sampler: str, grid: str, steps: int) -> Route | None:
    """The route, or nothing where the program cannot run."""
    try:
        return route(convention, sampler, grid, SD, steps)
    except SettingError:
        return None


def test_conventions_are_about_samplers_that_exist() -> None:
    """As far as SAMPLERS has them: a misspelt name would never be walked."""
    named = {sampler for convention in CONVENTIONS.values() for sampler in convention.routes}
    assert named <= set(SAMPLERS)


def test_where_a_program_has_nothing_ours_is_walked() -> None:
    assert not reproduces("compvis", "euler", "karras")
    assert route("compvis", "euler", "karras", SD, 10) == exact("euler", "karras")(SD, 10)
    assert sampler_of("diffusers", "deis", "leading", SD) is not SAMPLERS["deis"]
    for grid in ("karras", None):
        assert sampler_of("diffusers", "deis", grid, SD) is SAMPLERS["deis"], "with our options, too"
    assert route("exact", "euler", "karras", SD, 10).timesteps == pytest.approx(
        [SD.timestep(sigma) for sigma in GRIDS["karras"](SD, 10)[:-1]]
    )
