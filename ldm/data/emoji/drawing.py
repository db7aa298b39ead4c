"""A drawing becomes a square picture on white: SVG by resvg, PNG resampled with its colours weighted by opacity."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.decoding import PICTURE_ERRORS
from ldm.data.emoji.captions import captions
from ldm.data.emoji.choice import Thumbnail
from ldm.data.emoji.sources import Drawing, Style
from ldm.errors import DataError, MachineError

QUALITY = 80
LOSSLESS_MAY_BE = 1.05  # times as large as lossy
THUMBNAIL = 64


def drawn(path: Path, style: Style, side: int) -> Image.Image:
    """The picture at `side`×`side`, with the margin of its style. Raises DataError for a file that is no picture."""
    box = side - 2 * round(style.margin * side / 512)
    try:
        image = rasterised(path, box) if path.suffix == ".svg" else resampled(path, box)
    except MachineError:
        raise
    except (*PICTURE_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be drawn ({type(error).__name__}: {error}); clone it again") from None
    ground = Image.new("RGBA", (side, side), "white")
    ground.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return ground.convert("RGB")


def rasterised(path: Path, box: int) -> Image.Image:
    """An SVG file as large as fits. Raises MachineError where resvg_py is not installed."""
    try:
        import resvg_py
    except ImportError:
        raise MachineError("resvg_py: drawing SVG files needs it; pip install '.[emoji]'") from None
    text = path.read_text(encoding="utf-8")
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=text, width=box))), formats=["PNG"])
    if image.height > box:
        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=text, height=box))), formats=["PNG"])
    return image.convert("RGBA")


def resampled(path: Path, box: int) -> Image.Image:
    """A PNG file as large as fits; transparent pixels, whatever colour they hide, give theirs to no other."""
    with Image.open(path, formats=["PNG"]) as opened:
        image = opened.convert("RGBA")
    scale = box / max(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return image if size == image.size else image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def thumbnail(drawing: Drawing) -> Thumbnail:
    """The picture at 64×64, by which drawings are told apart."""
    return np.asarray(drawn(drawing.path, drawing.style, THUMBNAIL))


def encoded(image: Image.Image, style: Style) -> bytes:
    """The picture as WebP, without loss where that is hardly larger, as for flat drawings."""
    files: list[bytes] = []
    choices: list[dict[str, Any]] = [{"quality": QUALITY}, *([] if style.shaded else [{"lossless": True}])]
    for options in choices:
        file = io.BytesIO()
        image.save(file, "WEBP", method=6, **options)
        files.append(file.getvalue())
    return files[-1] if len(files[-1]) <= LOSSLESS_MAY_BE * len(files[0]) else files[0]


def sample(drawing: Drawing, side: int) -> dict[str, object]:
    """The sample of a drawing, as `write_shards` takes it; a pure function of the file."""
    style, concept = drawing.style, drawing.concept
    main, *others = captions(drawing)
    facts = {
        "source": style.source, "style": style.word, "license": style.licence, "unicode": drawing.codes,
        "cldr": concept.name, "group": concept.group, "keywords": list(concept.keywords), "captions": others,
        "file": f"{style.folder}/{'/'.join(drawing.path.parts[-style.pattern.count('/') - 1 :])}",
    }  # fmt: skip
    if drawing.tone is not None:
        facts["skin_tone"] = drawing.tone
    return {
        "__key__": drawing.key,
        "webp": encoded(drawn(drawing.path, style, side), style),
        "txt": main,
        "json": facts,
    }
