"""Reads a picture of shapes back into words, from its pixels alone, and judges it against a caption.

No learned weights: the ground is what the border shows, an object is a connected patch that differs from it, its
colour is the nearest of the palette, and its shape is the canonical one that overlaps it best when drawn with the
same area and centroid, if their outlines run close together. What is not close enough to anything is "unknown",
which no caption ever asks for.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ldm.data.outlines import OUTLINES, silhouette
from ldm.data.scenes import BACKGROUNDS, COLOURS, DEFAULT_BACKGROUND, POSITIONS, SHAPES, SIZES
from ldm.data.shapes import Expectation, Wanted

UNKNOWN = "unknown"

_WORKING_SIDE = 128  # every picture is resized to this: as sharp as needed, and it averages noise out
_FOREGROUND = 20.0  # ΔE from the ground above which a pixel belongs to an object
_COLOUR_REJECT = 30.0  # ΔE to the palette above which a colour has no name
_GROUND_REJECT = 14.0
_SPECK = 0.002  # patches below this share of the picture are ignored; the smallest star covers 0.010
_LEAST_EXTENT = 0.11  # what is smaller by far than a small object is a spot, whatever its shape
_STRAY_REJECT = 0.04  # mean distance between the outlines, in extents, above which a shape has no name
_OVERLAP_REJECT = 0.75  # and the overlap below which it has none
_PAIRED = 6  # so many objects, the largest, are tried as the wanted ones: noise has hundreds


@dataclass(frozen=True)
class Seen:
    """One object: its frame as in `Thing` (fractions of the side, y down); `confidence` is the overlap in [0, 1]."""

    shape: str
    colour: str
    x: float
    y: float
    extent: float
    confidence: float


@dataclass(frozen=True)
class Reading:
    """What is in a picture, largest object first; `clean` means that everything in it could be named."""

    background: str
    things: tuple[Seen, ...]
    clean: bool


@dataclass(frozen=True)
class Verdict:
    """Which parts of a caption hold; what it does not mention holds, save that `background` then means white.

    `right` is everything that the caption mentions, together with the number of objects.
    """

    colour: bool
    shape: bool
    count: bool
    relation: bool
    size: bool
    position: bool
    background: bool
    right: bool


# Reading -------------------------------------------------------------------------------------------------------


def read(image: Image.Image | NDArray[np.uint8]) -> Reading:
    """Name the ground and the objects of a square picture: a PIL image, or uint8 (height, width, 3)."""
    pixels = _pixels(image)
    lab = _lab(pixels)
    background, ground = _read_ground(pixels, lab)
    foreground = np.linalg.norm(lab - _lab(ground), axis=-1) > _FOREGROUND
    patches = _patches(lab, foreground)
    things = [_read_thing(pixels, ground, patch, foreground) for patch in patches]
    things.sort(key=lambda thing: -thing.extent)
    clean = background != UNKNOWN and all(UNKNOWN not in (thing.colour, thing.shape) for thing in things)
    return Reading(background, tuple(things), clean)


def _pixels(image: Image.Image | NDArray[np.uint8]) -> NDArray[np.float64]:
    """RGB in [0, 1] at the working side."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, dtype=np.uint8))
    image = image.convert("RGB")
    if image.width != image.height:
        raise ValueError(f"read: got a picture of {image.width} × {image.height} pixels, expected a square one")
    filter_ = Image.Resampling.BOX if image.width > _WORKING_SIDE else Image.Resampling.BILINEAR
    return np.asarray(image.resize((_WORKING_SIDE, _WORKING_SIDE), filter_), dtype=np.float64) / 255


def _lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB in [0, 1] to CIELAB (D65), in which distances are about even to the eye (IEC 61966-2-1, CIE 15)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ (matrix / matrix.sum(axis=1, keepdims=True)).T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


_COLOURS_LAB = _lab(np.array(list(COLOURS.values())) / 255)
_GROUNDS_LAB = _lab(np.array(list(BACKGROUNDS.values())) / 255)


def _nearest(lab: NDArray[np.float64], palette: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The index of, and distance to, the nearest colour of a palette, for every colour in `lab` (..., 3)."""
    distances = np.linalg.norm(lab[..., None, :] - palette, axis=-1)
    return distances.argmin(axis=-1), distances.min(axis=-1)


def _read_ground(pixels: NDArray[np.float64], lab: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
    """The ground's name, and its RGB colour as measured on the border."""
    width = max(1, round(0.02 * len(pixels)))
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[width:-width, width:-width] = False
    labels, _ = _nearest(lab[border], _GROUNDS_LAB)
    ground = np.median(pixels[border][labels == np.bincount(labels).argmax()], axis=0)
    index, distance = _nearest(_lab(ground), _GROUNDS_LAB)
    return tuple(BACKGROUNDS)[index] if distance <= _GROUND_REJECT else UNKNOWN, ground


def _patches(lab: NDArray[np.float64], foreground: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Masks of the objects: connected patches, cut where two colours meet, without specks."""
    least = _SPECK * foreground.size
    labels, count = ndimage.label(foreground)
    patches = [labels == label for label in range(1, count + 1)]
    parts = [part for patch in patches if patch.sum() >= least for part in _split_by_colour(lab, patch)]
    return [part for part in parts if part.sum() >= least]


def _split_by_colour(lab: NDArray[np.float64], patch: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Cut a patch into its colours, each pixel going to the nearest solid core.

    A core is at least five pixels wide, so that the colours which blend along a soft edge are none.
    """
    nearest = np.full(patch.shape, -1)
    nearest[patch], _ = _nearest(lab[patch], _COLOURS_LAB)
    cores = np.zeros(patch.shape, dtype=int)
    for index in np.flatnonzero(np.bincount(nearest[patch]) >= _SPECK * patch.size):
        # An opening by two rank filters: separable, so ten times faster than ndimage.binary_opening.
        opened = ndimage.maximum_filter(
            ndimage.minimum_filter(nearest == index, 5, mode="constant"), 5, mode="constant"
        )
        labels, _ = ndimage.label(opened)
        solid = np.bincount(labels.ravel()) >= _SPECK * patch.size
        solid[0] = False
        cores[solid[labels]] = index + 1
    if len(np.unique(cores)) <= 2:  # no core, or those of one colour
        return [patch]
    rows, columns = ndimage.distance_transform_edt(cores == 0, return_distances=False, return_indices=True)
    owner = cores[rows, columns]
    return [
        piece
        for index in np.unique(cores[cores > 0])
        for labels, count in [ndimage.label(patch & (owner == index))]
        for piece in (labels == label for label in range(1, count + 1))
    ]


def _read_thing(
    pixels: NDArray[np.float64],
    ground: NDArray[np.float64],
    patch: NDArray[np.bool_],
    foreground: NDArray[np.bool_],
) -> Seen:
    """Name the object of one patch."""
    inner = ndimage.binary_erosion(patch)
    body = pixels[inner if inner.sum() >= 4 else patch]
    paint = np.median(body, axis=0)
    index, distance = _nearest(_lab(paint), _COLOURS_LAB)
    mask, left, top = _cropped(_covered(pixels, ground, paint, patch, foreground))
    fit, shape = max(((_fit(mask, shape), shape) for shape in SHAPES), key=lambda pair: pair[0].overlap)
    side = len(pixels)
    known = fit.stray <= _STRAY_REJECT and fit.overlap >= _OVERLAP_REJECT and fit.extent >= _LEAST_EXTENT * side
    return Seen(
        shape=shape if known else UNKNOWN,
        colour=tuple(COLOURS)[index] if distance <= _COLOUR_REJECT else UNKNOWN,
        x=(left + fit.x) / side,
        y=(top + fit.y) / side,
        extent=fit.extent / side,
        confidence=fit.overlap,
    )


def _covered(
    pixels: NDArray[np.float64],
    ground: NDArray[np.float64],
    paint: NDArray[np.float64],
    patch: NDArray[np.bool_],
    foreground: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """The pixels that the object covers by more than half: nearer in colour to its paint than to the ground."""
    step = paint - ground
    coverage = np.clip(np.einsum("hwc,c->hw", pixels - ground, step) / max(step @ step, 1e-6), 0, 1)
    near = ndimage.binary_dilation(patch, iterations=2) & (patch | ~foreground)
    covered = ndimage.gaussian_filter(np.where(near, coverage, 0), 0.7) > 0.5
    return covered if covered.any() else patch  # a hair is covered by less than half everywhere


def _cropped(mask: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], int, int]:
    """The mask's bounding box in a wide empty margin, and the (left, top) at which that lies in the picture."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    margin = max(box.shape) // 2 + 1  # the star, the leanest shape, reaches furthest for the same area: 0.8 of a side
    return np.pad(box, margin), int(columns[0]) - margin, int(rows[0]) - margin


@dataclass(frozen=True)
class _Fit:
    """A shape drawn over a mask, in pixels; `stray` is in extents."""

    stray: float
    overlap: float
    x: float
    y: float
    extent: float


def _fit(mask: NDArray[np.bool_], shape: str) -> _Fit:
    """Draw the shape with the mask's area and centroid, and see how far the mask strays from it.

    The stray is the area between the two outlines per length of outline, so the mean distance between them; unlike
    the overlap (intersection over union) it asks the same care of a jagged outline as of a round one.
    """
    area, centre_x, centre_y = _moments(mask)
    unit_area, unit_x, unit_y, unit_length = _UNITS[shape]
    extent = float(np.sqrt(area / unit_area))
    x, y = centre_x - unit_x * extent, centre_y - unit_y * extent
    height, width = mask.shape
    drawn = np.asarray(silhouette(shape, width, height, x, y, extent)) > 127
    between, union = float((drawn ^ mask).sum()), float((drawn | mask).sum())
    return _Fit(between / (unit_length * extent**2), 1 - between / union, x, y, extent)


def _moments(mask: NDArray[np.generic]) -> tuple[float, float, float]:
    """Area and centroid (x, y) in pixels, the first pixel's centre being at ½."""
    area = mask.sum()
    x = (mask.sum(axis=0) * (np.arange(mask.shape[1]) + 0.5)).sum() / area
    y = (mask.sum(axis=1) * (np.arange(mask.shape[0]) + 0.5)).sum() / area
    return float(area), float(x), float(y)


def _unit(shape: str, side: int = 200) -> tuple[float, float, float, float]:
    """Area, centroid (x, y) and length of outline of a shape of extent 1 around the origin."""
    area, x, y = _moments(np.asarray(silhouette(shape, side, side, side / 2, side / 2, side)) / 255)
    corners = np.array(OUTLINES[shape])
    length = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1).sum()
    return area / side**2, x / side - 0.5, y / side - 0.5, float(length)


_UNITS = {shape: _unit(shape) for shape in SHAPES}


# Judging -------------------------------------------------------------------------------------------------------


def judge(reading: Reading, expectation: Expectation) -> Verdict:
    """Hold what was read against what a caption says.

    Seen objects are paired with the wanted ones so that as many colours and shapes as possible agree; a wanted
    object without a partner is wrong in every respect, and one seen too many is wrong in `count`.
    """
    wanted = expectation.things
    count = len(reading.things) == len(wanted)
    candidates = [*reading.things[:_PAIRED], *[None] * (len(wanted) - len(reading.things))]
    seen = max(
        itertools.permutations(candidates, len(wanted)),
        key=lambda things: (_agreement(things, wanted), _relation_holds(things, expectation.relation)),
    )
    pairs = list(zip(seen, wanted, strict=True))
    colour = all(thing is not None and thing.colour == want.colour for thing, want in pairs)
    shape = all(thing is not None and thing.shape == want.shape for thing, want in pairs)
    size = all(
        want.size is None or (thing is not None and size_name(thing.extent) == want.size) for thing, want in pairs
    )
    relation = _relation_holds(seen, expectation.relation)
    position = expectation.position is None or (
        seen[0] is not None and position_name(seen[0].x, seen[0].y) == expectation.position
    )
    background = reading.background == (expectation.background or DEFAULT_BACKGROUND)
    right = all((colour, shape, count, relation, size, position, background or expectation.background is None))
    return Verdict(colour, shape, count, relation, size, position, background, right)


def size_name(extent: float) -> str:
    """The word, of `SIZES`, whose range is nearest to an extent in fractions of the side."""
    return min(SIZES, key=lambda name: max(SIZES[name][0] - extent, extent - SIZES[name][1]))


def position_name(x: float, y: float) -> str:
    """The named place of a centre in fractions of the side: a middle band of 0.3, and what lies on either side."""
    column, row = (int(c > 0.65) - int(c < 0.35) for c in (x, y))
    return {cell: name for name, cell in POSITIONS.items()}[column, row]


def _agreement(things: tuple[Seen | None, ...], wanted: tuple[Wanted, ...]) -> int:
    pairs = zip(things, wanted, strict=True)
    return sum((t.colour == w.colour) + (t.shape == w.shape) for t, w in pairs if t is not None)


def _relation_holds(things: tuple[Seen | None, ...], relation: str | None) -> bool:
    """Whether the first object lies to that side of the second, more than it is displaced across."""
    if relation is None:
        return True
    first, second = things
    if first is None or second is None:
        return False
    right, down = first.x - second.x, first.y - second.y
    along, across = {
        "left of": (-right, down),
        "right of": (right, down),
        "above": (-down, right),
        "below": (down, right),
    }[relation]
    return along > abs(across)
