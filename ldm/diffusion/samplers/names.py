"""What other programs call samplers, read regardless of case, spaces and punctuation."""

from collections.abc import Mapping

# What programs put behind a sampler's name, and our grid of that name; None leaves the grid open.
GRID_NAMES: dict[str, str | None] = {
    "Automatic": None,
    "Karras": "karras",
    "k": "karras",
    "ka": "karras",
    "Exponential": "exponential",
    "Polyexponential": "polyexponential",
    "SGM Uniform": "sgm_uniform",
    "Simple": "simple",
    "Normal": "linspace",
    "Uniform": "linspace",
    "DDIM": "ddim_uniform",
    "DDIM Uniform": "ddim_uniform",
    "Beta": "beta",
    "KL Optimal": "kl_optimal",
    "Align Your Steps": "align_your_steps",
    "Leading": "leading",
    "Trailing": "trailing",
    "Linspace": "linspace",
}


def spelled(name: str) -> str:
    """Letters and digits of a name in lower case, "++" as "pp": "DPM++ 2M", "dpmpp_2m" and "DPMpp-2M" are one."""
    return "".join(letter for letter in name.casefold().replace("++", "pp") if letter.isalnum())


def sampler_and_grid(name: str, samplers: Mapping[str, str]) -> tuple[str, str | None] | None:
    """The sampler of a name and the grid that stands behind it, or None. `samplers` has spelled names and ours."""
    written = spelled(name)
    for prefix in ("", "sample", "k"):  # k-diffusion's functions, and A1111's names for them
        rest = written.removeprefix(prefix)
        if rest in samplers:
            return samplers[rest], None
        for label, grid in GRID_NAMES.items():
            if (sampler := samplers.get(rest.removesuffix(spelled(label)))) is not None:
                return sampler, grid
    return None
