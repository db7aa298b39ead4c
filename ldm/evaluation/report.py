"""The report: one JSON file for programs, one HTML file for people that needs nothing but itself."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ldm.evaluation.pictures import thumbnail
from ldm.evaluation.results import SHORT, Result

QUALITY = 70
PICTURES = 64  # of a sheet

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } th, td { padding: .3rem .8rem .3rem 0; text-align: left }
tr { border-bottom: 1px solid #8884 } td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.note { opacity: .75 } code, pre { font-size: .85em } pre { overflow-x: auto }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 8px }
figure { margin: 0 } figure img { width: 100%; display: block } figcaption { font-size: .8em; opacity: .75 }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Sheet:
    """Small pictures under a title, each with a line of text."""

    title: str
    pictures: tuple[Image.Image, ...]
    lines: tuple[str, ...]


def sheet_of(title: str, images: Sequence[Image.Image], lines: Sequence[str]) -> Sheet:
    """The first pictures of many, made small."""
    first = images[:PICTURES]
    return Sheet(title, tuple(thumbnail(image) for image in first), tuple(lines[: len(first)]))


def as_json(results: Sequence[Result], about: dict[str, object]) -> str:
    """Everything: what the run was told, and every result with its protocol."""
    values = {"protocol": about, "results": [result.as_json() for result in results]}
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_html(results: Sequence[Result], sheets: Sequence[Sheet], title: str) -> str:
    """A page with a table, the pictures as WebP inside it, and the protocols; no script, no address."""
    rows = "\n".join(_row(result) for result in results)
    protocols = "\n".join(
        f"<details><summary>{_text(result.metric)}, {_text(result.of)} <code>{result.hash}</code></summary>"
        f"<pre>{_text(json.dumps(result.as_json(), indent=1, ensure_ascii=False))}</pre></details>"
        for result in results
    )
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n<h1>{_text(title)}</h1>\n"
        "<table>\n<thead><tr><th>metric<th>of<th>value<th>95 %<th>pictures<th>protocol</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody>\n</table>\n"
        f"{''.join(_sheet(sheet) for sheet in sheets)}"
        f"<h2>Protocols</h2>\n<p>Figures with the same hash are comparable.</p>\n{protocols}\n</html>\n"
    )


def _row(result: Result) -> str:
    notes = "".join(f'<br><span class="note">{_text(note)}</span>' for note in result.notes)
    return (
        f'<tr><td>{_text(result.metric)}{notes}<td>{_text(result.of)}<td class="number">{_text(result.value)}'
        f'<td class="number">{_text(result.interval)}<td class="number">{result.figure.count:,}'
        f"<td><code>{result.hash[:SHORT]}</code></tr>"
    )


def _sheet(sheet: Sheet) -> str:
    figures = "".join(
        f'<figure><img src="{_data(picture)}" alt="{_text(line)}"><figcaption>{_text(line)}</figcaption></figure>\n'
        for picture, line in zip(sheet.pictures, sheet.lines, strict=True)
    )
    return f'<h2>{_text(sheet.title)}</h2>\n<div class="sheet">\n{figures}</div>\n'


def _data(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
