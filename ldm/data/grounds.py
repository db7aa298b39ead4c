"""A picture on plain white is put on another colour, and its caption says which: backgrounds are learned in words.

What is ground is found by a flood fill from the border. A pixel at an edge is part thing, part white; how much of it
is white follows from the colour of the thing beside it (the matting equation, Porter & Duff 1984), and only that much
is exchanged. With m the share of white, c + m·(ground − white) is the picture on the other ground, exactly.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from ldm.data.captions import pick
from ldm.data.order import Chance

COLOURS: dict[str, tuple[int, int, int]] = {
    "light blue": (173, 216, 240),
    "blue": (52, 120, 220),
    "dark blue": (22, 44, 96),
    "light green": (190, 230, 180),
    "green": (60, 160, 75),
    "dark green": (20, 80, 50),
    "light yellow": (255, 246, 190),
    "yellow": (255, 214, 64),
    "orange": (250, 150, 50),
    "red": (214, 48, 49),
    "pink": (250, 180, 200),
    "purple": (130, 80, 190),
    "lavender": (214, 204, 245),
    "teal": (32, 150, 150),
    "beige": (240, 226, 200),
    "brown": (120, 80, 50),
    "light grey": (220, 220, 224),
    "grey": (140, 140, 146),
    "black": (16, 16, 18),
}
"""The grounds that captions name. White is what pictures have by themselves."""

WHITE = 250  # lossy files waver: from this level of all three colours on, a pixel is white
LEAST_GROUND = 0.1  # of the picture; less is no ground but a gap
EDGE = 2  # pixels to both sides of the outline that can be part thing, part ground
OPEN = 0.12  # share of the outline that may be nearly white; beyond it nobody knows where the thing ends
NEARLY_WHITE = 225
NEAR = 90.0  # distance of two colours (of 255 each) that are hard to tell apart
HIDDEN = 0.1  # share of the outline that a ground's colour may be near to


@dataclass(frozen=True)
class Ground:
    """The share of white ground in every pixel (255 is all), and the grounds on which the thing stands out."""

    share: NDArray[np.uint8]
    fits: tuple[str, ...]

    def tensor(self) -> Float[Tensor, "1 h w"]:
        """The share in [0, 1]."""
        return torch.from_numpy(self.share[None]) / 255.0


def find_ground(image: Image.Image) -> Ground | None:
    """The white ground of a picture; None where there is none, or a thing as white as the ground lies open to it."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    outside = _flooded(pixels.min(axis=2) >= WHITE)
    if not LEAST_GROUND < outside.mean() < 1.0:
        return None
    inner = ~ndimage.binary_dilation(outside, iterations=EDGE + 1)  # surely thing
    if not inner.any():
        return None
    edge = ~outside & ~inner
    rows, columns = ndimage.distance_transform_edt(~inner, return_distances=False, return_indices=True)
    thing = pixels[rows[edge], columns[edge]]  # the colour beside each pixel of the edge
    if (thing.min(axis=1) > NEARLY_WHITE).mean() > OPEN:
        return None
    share = outside.astype(np.float32)
    share[edge] = 1.0 - _coverage(pixels[edge], thing)
    fits = tuple(
        name for name, colour in COLOURS.items() if (np.linalg.norm(thing - colour, axis=1) < NEAR).mean() <= HIDDEN
    )
    return Ground(np.rint(share * 255).astype(np.uint8), fits) if fits else None


def _flooded(white: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The white pixels that are joined to the border through white ones."""
    labels, _ = ndimage.label(np.pad(white, 1, constant_values=True))
    flooded: NDArray[np.bool_] = labels == labels[0, 0]
    return flooded[1:-1, 1:-1]


def _coverage(pixel: NDArray[np.float32], thing: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much of each pixel (n 3) is thing, where pixel = coverage·thing + (1 − coverage)·white, least squares."""
    away = 255.0 - thing
    length = (away * away).sum(axis=1)
    covered = ((255.0 - pixel) * away).sum(axis=1) / np.maximum(length, 1.0)
    return np.clip(covered, 0.0, 1.0)


def choose_ground(fits: tuple[str, ...], probability: float, chance: Chance) -> str | None:
    """The name of the ground of this step; None where the picture keeps its white."""
    return pick(fits, chance("ground")) if fits and chance("grounds") < probability else None


def colour_of(name: str) -> Float[Tensor, "3"]:
    """A ground's colour in [−1, 1]."""
    return torch.tensor(COLOURS[name]) / 127.5 - 1.0


def on_ground(
    image: Float[Tensor, "*b 3 h w"], share: Float[Tensor, "*b 1 h w"], colour: Float[Tensor, "*b 3"]
) -> Float[Tensor, "*b 3 h w"]:
    """Pictures in [−1, 1] whose white ground, of which `share` in [0, 1] is in each pixel, has another colour."""
    return image + share * (colour[..., None, None] - 1.0)


def said(caption: str, name: str) -> str:
    """The caption of the picture on the ground of that name; the null prompt stays what it is."""
    if not caption:
        return caption
    words = f"on {'an' if name[0] in 'aeiou' else 'a'} {name} background"
    if "on a white background" in caption:
        return caption.replace("on a white background", words)
    return f"{caption}, {words}" if ", " in caption else f"{caption} {words}"
