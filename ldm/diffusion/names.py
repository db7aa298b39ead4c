"""The names of grids and conventions. What they stand for needs NumPy, whose import is a third of the time of `--help`.

`tests/test_grids.py` holds them to the tables in `ldm.diffusion.grids` and `ldm.diffusion.conventions`.
"""

GRIDS = (
    "leading",
    "trailing",
    "linspace",
    "karras",
    "leading_karras",
    "exponential",
    "polyexponential",
    "sgm_uniform",
    "simple",
    "ddim_uniform",
    "beta",
    "kl_optimal",
    "align_your_steps",
)
CONVENTIONS = ("exact", "compvis", "diffusers", "k-diffusion", "a1111")
