"""The only place where pixels change range, dtype, colour mode or file format."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image, PngImagePlugin
from torch import Tensor

from ldm.files import appearing

# A small file can claim a huge picture: refuse before it is decoded.
Image.MAX_IMAGE_PIXELS = 32_000_000

METADATA_KEY = "ldm"
MAX_SHEET_PIXELS = 32_000_000


def to_tensor(image: Image.Image) -> Float[Tensor, "c h w"]:
    """A grey or RGB picture as a float tensor in [−1, 1]."""
    array = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(rearrange(array if array.ndim == 3 else array[:, :, None], "h w c -> c h w") / 127.5 - 1.0)


def to_image(tensor: Float[Tensor, "c h w"]) -> Image.Image:
    """A float tensor in [−1, 1] as a picture, rounded half up; values outside are clipped."""
    levels = ((tensor.detach().float().clamp(-1.0, 1.0) + 1.0) * 127.5 + 0.5).floor().clamp(0, 255)
    array = rearrange(levels.to("cpu", torch.uint8), "c h w -> h w c").numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def grid(images: list[Image.Image], columns: int, gap: int = 4, colour: str = "white") -> Image.Image:
    """Pictures of one size in rows of `columns`."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), colour)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


class ContactSheet:
    """Pictures of one size that come one after another, in rows; smaller where all would have over 32 megapixels.

    A row has `each` of them, which belong together; or, where all do or none, as many as there are rows.
    """

    def __init__(self, count: int, each: int, width: int, height: int, gap: int = 4) -> None:
        columns = each if 1 < each < count else math.ceil(math.sqrt(count))
        rows = -(-count // columns)
        scale = math.sqrt(MAX_SHEET_PIXELS / (rows * columns * (width + gap) * (height + gap)))
        self.columns, self.gap, self.images = columns, gap, list[Image.Image]()
        self.size = (width, height)
        if scale < 1.0:
            self.size = max(1, int((width + gap) * scale) - gap), max(1, int((height + gap) * scale) - gap)

    def add(self, image: Image.Image) -> None:
        """Take the next picture."""
        self.images.append(image if image.size == self.size else image.resize(self.size, Image.Resampling.LANCZOS))

    def save(self, path: Path) -> None:
        """Write what has come as a PNG."""
        save_png(grid(self.images, self.columns, self.gap), path)


def save_png(image: Image.Image, path: Path, settings: Mapping[str, object] | None = None) -> None:
    """Write a PNG, whole or not at all, with `settings` as JSON in its text chunk `ldm`. Replaces `path`."""
    text = PngImagePlugin.PngInfo()
    if settings is not None:
        text.add_itxt(METADATA_KEY, json.dumps(settings, ensure_ascii=False))
    with appearing(path, shared=True) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def read_text(path: Path) -> str:
    """The text that `save_png` wrote before the pixels, which are not decoded; empty for a picture without it."""
    with Image.open(path, formats=["PNG"]) as image:
        return str(image.info.get(METADATA_KEY, ""))


def read_settings(path: Path) -> dict[str, object] | None:
    """The settings that `save_png` wrote, or None for a picture without them."""
    text = read_text(path)
    return json.loads(text) if text else None
