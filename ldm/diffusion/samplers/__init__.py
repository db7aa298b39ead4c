"""Samplers: generators that walk from noise to a clean latent by asking for clean estimates.

A sampler is called as `sampler(denoise, x, sigmas, noise=None)` with x = x0 + σ₀·noise and `sigmas` falling to 0, or to
where x may stay noisy, and yields a `Step` after each step; the last one has the result as `.x`. Adding one is one
generator and one line here. No file of this package imports torch: a sampler is arithmetic on whatever `denoise`
understands.
"""

from ldm.diffusion.samplers.consistency import lcm, tcd
from ldm.diffusion.samplers.ddim import ddim
from ldm.diffusion.samplers.ddpm import ddpm
from ldm.diffusion.samplers.dpm_2 import dpm_2, dpm_2_ancestral
from ldm.diffusion.samplers.dpm_adaptive import dpm_adaptive
from ldm.diffusion.samplers.dpm_solver import dpm_fast, dpm_solver_1, dpm_solver_2, dpm_solver_3
from ldm.diffusion.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde
from ldm.diffusion.samplers.euler import euler, euler_ancestral
from ldm.diffusion.samplers.heun import heun
from ldm.diffusion.samplers.linear_multistep import deis, ipndm, lms, plms
from ldm.diffusion.samplers.names import sampler_and_grid, spelled
from ldm.diffusion.samplers.restart import restart
from ldm.diffusion.samplers.step import Denoise, Estimate, Method, Noise, Sampler, Step
from ldm.diffusion.samplers.unipc import unipc

SAMPLERS: dict[str, Method] = {
    "ddpm": Method(ddpm, "Ho et al. 2020", draws="steps", aliases=("DDPMScheduler",)),
    "ddim": Method(ddim, "Song et al. 2021", order=1, aliases=("DDIMScheduler",)),
    "plms": Method(plms, "Liu et al. 2022", order=2, warm_up=1, aliases=("PNDMScheduler", "PNDM")),
    "euler": Method(euler, "Karras et al. 2022", order=1, aliases=("EulerDiscreteScheduler",)),
    "euler_ancestral": Method(
        euler_ancestral,
        "k-diffusion",
        order=1,
        draws="steps",
        aliases=("Euler a", "EulerAncestralDiscreteScheduler"),
    ),
    "heun": Method(heun, "Karras et al. 2022", order=2, calls=2, aliases=("HeunDiscreteScheduler",)),
    "lms": Method(lms, "k-diffusion", order=4, started_alone=2, aliases=("LMSDiscreteScheduler",)),
    "dpm_2": Method(dpm_2, "k-diffusion", order=2, calls=2, aliases=("DPM2", "KDPM2DiscreteScheduler")),
    "dpm_2_ancestral": Method(
        dpm_2_ancestral,
        "k-diffusion",
        order=2,
        calls=2,
        draws="steps",
        aliases=("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
    ),
    "dpm_solver_1": Method(dpm_solver_1, "Lu et al. 2022a", order=1),
    "dpm_solver_2": Method(dpm_solver_2, "Lu et al. 2022a", order=2, calls=2),
    "dpm_solver_3": Method(dpm_solver_3, "Lu et al. 2022a", order=3, calls=3),
    "dpm_fast": Method(dpm_fast, "Lu et al. 2022a", own_levels=True, aliases=("DPM fast",)),
    "dpm_adaptive": Method(
        dpm_adaptive, "Lu et al. 2022a", calls=None, own_levels=True, aliases=("DPM adaptive", "DPM ad")
    ),
    "dpmpp_2s": Method(
        dpmpp_2s, "Lu et al. 2022b", order=2, calls=2, aliases=("DPM++ 2S", "DPMSolverSinglestepScheduler")
    ),
    "dpmpp_2s_ancestral": Method(
        dpmpp_2s_ancestral, "k-diffusion", order=2, calls=2, draws="steps", aliases=("DPM++ 2S a",)
    ),
    "dpmpp_2m": Method(
        dpmpp_2m, "Lu et al. 2022b", order=2, aliases=("DPM++ 2M", "DPM-Solver", "DPMSolverMultistepScheduler")
    ),
    "dpmpp_sde": Method(
        dpmpp_sde, "k-diffusion", order=2, calls=2, draws="intervals", aliases=("DPM++ SDE", "DPMSolverSDEScheduler")
    ),
    "dpmpp_2m_sde": Method(dpmpp_2m_sde, "Lu et al. 2022b", order=2, draws="intervals", aliases=("DPM++ 2M SDE",)),
    "dpmpp_3m_sde": Method(dpmpp_3m_sde, "k-diffusion", order=2, draws="intervals", aliases=("DPM++ 3M SDE",)),
    "deis": Method(deis, "Zhang & Chen 2023", order=3, started_alone=2, aliases=("DEISMultistepScheduler",)),
    "unipc": Method(unipc, "Zhao et al. 2023", order=3, aliases=("UniPC", "uni_pc_bh2", "UniPCMultistepScheduler")),
    "ipndm": Method(ipndm, "Zhang & Chen 2023", order=2, aliases=("IPNDMScheduler",)),
    "restart": Method(restart, "Xu et al. 2023", calls=2, draws="steps", own_levels=True),
    "lcm": Method(lcm, "Luo et al. 2023", draws="steps", distilled=True, aliases=("LCMScheduler",)),
    "tcd": Method(tcd, "Zheng et al. 2024", draws="steps", distilled=True, aliases=("TCDScheduler",)),
}

# Names that other programs have for these, each also with the name of a grid behind it: "DPM++ 2M Karras".
ALIASES: dict[str, tuple[str, str | None]] = {
    alias: (name, None) for name, method in SAMPLERS.items() for alias in method.aliases
}


def resolve_name(name: str) -> tuple[str, str | None]:
    """Our sampler of a name that any of several programs has for it, and the grid if the name says one.

    Case, spaces and punctuation do not matter. A name that nobody has comes back as it is.
    """
    names = {spelled(ours): ours for ours in SAMPLERS} | {spelled(alias): ours for alias, (ours, _) in ALIASES.items()}
    return sampler_and_grid(name, names) or (name, None)


__all__ = ["ALIASES", "SAMPLERS", "Denoise", "Estimate", "Method", "Noise", "Sampler", "Step", "resolve_name"]
