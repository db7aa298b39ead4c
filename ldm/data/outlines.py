"""The silhouettes of the shapes: polygons in a common frame, and anti-aliased masks of them."""

import math

from PIL import Image, ImageDraw

_SUPERSAMPLING = 4


def _star(points: int = 5, waist: float = 0.45) -> list[tuple[float, float]]:
    radii = (1.0, waist)
    turns = [math.pi * i / points for i in range(2 * points)]
    return [(radii[i % 2] * math.sin(turn), -radii[i % 2] * math.cos(turn)) for i, turn in enumerate(turns)]


def _heart(steps: int = 64) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / steps for i in range(steps)]
    return [
        (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
        for t in turns
    ]


def _cross(arm: float = 0.17) -> list[tuple[float, float]]:
    quarter = [(arm, -0.5), (arm, -arm), (0.5, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


def _framed(outline: list[tuple[float, float]], side: float = 1.0) -> tuple[tuple[float, float], ...]:
    """Stretch an outline so that its bounding box is a square of this side around the origin."""
    xs, ys = zip(*outline, strict=True)
    return tuple(
        (
            side * ((x - min(xs)) / (max(xs) - min(xs)) - 0.5),
            side * ((y - min(ys)) / (max(ys) - min(ys)) - 0.5),
        )
        for x, y in outline
    )


SQUARE_SIDE = 0.88
"""A square fills only this much of its frame, so that it does not look larger than a circle of the same extent."""

OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": _framed([(math.cos(math.pi * i / 48), math.sin(math.pi * i / 48)) for i in range(96)]),
    "square": _framed([(0, 0), (1, 0), (1, 1), (0, 1)], SQUARE_SIDE),
    "triangle": _framed([(0, 0), (1, 2), (-1, 2)]),
    "star": _framed(_star()),
    "heart": _framed(_heart()),
    "cross": _framed(_cross()),
}
"""Polygons around the origin; their bounding box is the frame [−½, ½]², the square's a little less."""


def silhouette(shape: str, width: int, height: int, x: float, y: float, extent: float) -> Image.Image:
    """An anti-aliased mask (mode "L") of a shape with its centre at (x, y); everything in pixels."""
    scale = _SUPERSAMPLING
    mask = Image.new("L", (width * scale, height * scale))
    # Pillow addresses pixels by their centres, hence the half.
    corners = [((x + u * extent) * scale - 0.5, (y + v * extent) * scale - 0.5) for u, v in OUTLINES[shape]]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return mask.reduce(scale)
