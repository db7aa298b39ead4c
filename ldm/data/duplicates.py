"""The same picture twice is found by its pixels, and nearly the same one by a hash of what it looks like."""

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

BANDS = 8  # of 8 bits each
NEAR_COLOURS = 10  # levels of 255 that the mean colours of two near pictures may differ by, in each of 16 fields


@dataclass(frozen=True)
class Fingerprint:
    """`pixels`: a digest of size and pixels. `gradients`: 64 bits, hex; `colours`: 4×4 mean colours, hex."""

    pixels: str
    gradients: str = ""
    colours: str = ""


def fingerprint(image: Image.Image, near: bool) -> Fingerprint:
    """The fingerprint of an RGB picture; what nearly equal pictures share only where `near` is asked for.

    Gradients: is each of 8×8 fields brighter than the one to its left (dHash, Krawetz 2013)? That forgets colours,
    and flat pictures have none, hence the mean colours.
    """
    pixels = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()
    if not near:
        return Fingerprint(pixels)
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1] + 2)  # a flat field is not brighter by chance
    colours = image.resize((4, 4), Image.Resampling.BOX)
    return Fingerprint(pixels, bits.tobytes().hex(), colours.tobytes().hex())


class Seen:
    """Fingerprints so far; near pictures differ in at most `distance` of 64 bits, 0 to 7, or None for equal ones only.

    Two hashes that differ in fewer bits than there are bands agree in at least one band, which is where one looks.
    """

    def __init__(self, distance: int | None = None) -> None:
        assert distance is None or 0 <= distance < BANDS, distance
        self._distance = distance
        self._pixels: dict[str, str] = {}
        self._bands: dict[tuple[int, int], list[tuple[str, bytes, bytes]]] = {}

    def find(self, one: Fingerprint) -> str | None:
        """The name of a picture that is equal or near, the first that was added; None where there is none."""
        if one.pixels in self._pixels:
            return self._pixels[one.pixels]
        if self._distance is None:
            return None
        gradients, colours = bytes.fromhex(one.gradients), bytes.fromhex(one.colours)
        for band in enumerate(gradients):
            for name, other, other_colours in self._bands.get(band, ()):
                if _bits(gradients, other) <= self._distance and _apart(colours, other_colours) <= NEAR_COLOURS:
                    return name
        return None

    def add(self, one: Fingerprint, name: str) -> None:
        """Remember a picture under its name."""
        self._pixels.setdefault(one.pixels, name)
        if self._distance is not None:
            gradients, colours = bytes.fromhex(one.gradients), bytes.fromhex(one.colours)
            for band in enumerate(gradients):
                self._bands.setdefault(band, []).append((name, gradients, colours))


def _bits(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


def _apart(one: bytes, other: bytes) -> int:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
