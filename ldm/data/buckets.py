"""Pictures of unlike aspect share no batch: each goes into the bucket of the nearest aspect, at about equal area."""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from ldm.config import Config
from ldm.errors import SettingError

Size = tuple[int, int]
"""(width, height) in pixels."""


class BucketConfig(Config):
    """Sizes that pictures are brought to: sides that are multiples of `step`, as much area as the square has."""

    step: PositiveInt = 64
    # Longer side over shorter one, at most.
    max_aspect: float = Field(default=2.0, ge=1)

    @property
    def name(self) -> str:
        """What distinguishes latents that were cached with these buckets from others."""
        return f"{self.step} {self.max_aspect:g}"


def bucket_sizes(side: int, config: BucketConfig | None) -> tuple[Size, ...]:
    """The sizes for an area of side², from narrow to wide; without a config only the square.

    For every width the largest height whose area is not above side², as in NovelAI's aspect ratio bucketing (2022).
    """
    if config is None:
        return ((side, side),)
    step = config.step
    if side % step:
        raise SettingError(
            f"side: {side} is not a multiple of the buckets' step {step}; use {side // step * step or step}"
        )
    found = set()
    for width in range(step, int(side * config.max_aspect) + 1, step):
        height = side * side // width // step * step
        if height and max(width / height, height / width) <= config.max_aspect:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found, key=lambda size: (size[0] / size[1], size)))


def assign(widths: NDArray[np.integer], heights: NDArray[np.integer], sizes: tuple[Size, ...]) -> NDArray[np.int64]:
    """For each picture the index of the size whose aspect is nearest, in ratio; of equal ones the larger area."""
    aspects = np.log(np.asarray(widths, dtype=np.float64) / heights)
    of_sizes = np.array([np.log(width / height) for width, height in sizes])
    areas = np.array([width * height for width, height in sizes])
    distances = np.abs(aspects[:, None] - of_sizes[None, :]) - 1e-9 * areas[None, :] / areas.max()
    return distances.argmin(axis=1)
