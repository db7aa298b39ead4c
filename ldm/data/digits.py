"""Handwritten digits: MNIST's IDX files from a folder, or the small set that scikit-learn brings along.

scikit-learn's 1,797 digits are 8×8 (UCI's optical recognition set); they are enlarged to 28×28 bicubically.
"""

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.errors import DataError

BUNDLED = "bundled"
SIDE = 28
Pixels = NDArray[np.uint8]
IMAGES, LABELS = 2051, 2049


def read_idx(path: Path, magic: int) -> Pixels:
    """The array in an IDX file, plain or gzipped. Raises DataError for anything else."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found, count = struct.unpack(">II", raw[:8])
        if found != magic:
            raise DataError(f"{path}: magic number {found}, expected {magic}; give MNIST's own IDX files")
        shape = (count, *struct.unpack(">II", raw[8:16])) if magic == IMAGES else (count,)
        return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give a folder with MNIST's IDX files") from None
    except (struct.error, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: torn IDX file; copy it again") from None


def load(source: str) -> tuple[Pixels, NDArray[np.int64]]:
    """All digits (n 28 28), white on black, and their labels; `source` is a folder of IDX files or "bundled"."""
    if source == BUNDLED:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = [enlarge((image * (255 / 16)).astype(np.uint8)) for image in digits.images]
        return np.stack(pixels), digits.target.astype(np.int64)
    folder = Path(source)
    names = {kind: next(iter(sorted(folder.glob(f"train-{kind}*"))), None) for kind in ("images", "labels")}
    if names["images"] is None or names["labels"] is None:
        raise DataError(f"{source}: no train-images and train-labels IDX files there; or use data.digits={BUNDLED}")
    images, labels = read_idx(names["images"], IMAGES), read_idx(names["labels"], LABELS)
    if len(images) != len(labels):
        raise DataError(f"{source}: {len(images)} images but {len(labels)} labels; copy the files again")
    return images, labels.astype(np.int64)


def enlarge(image: Pixels) -> Pixels:
    """A small digit at 28×28."""
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
