"""k-diffusion: from σ₀·noise to 0 over its own grids, which are ours too, with every level that they have."""

from ldm.diffusion.grids import GRIDS
from ldm.diffusion.route import along

SAMPLERS = (
    *("euler", "euler_ancestral", "heun", "lms", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral"),
    *("dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"),
)
SPACINGS = {name: along(GRIDS[name]) for name in ("linspace", "karras", "exponential", "polyexponential")}

ROUTES = dict.fromkeys(SAMPLERS, SPACINGS)
