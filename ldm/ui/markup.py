"""Our own pieces of the page as HTML; everything that was typed or read from a file is escaped here."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from ldm.ui.drawing import Order, Picture
from ldm.ui.history import Entry
from ldm.ui.info import rows
from ldm.ui.watching import View
from ldm.ui.worker import State


def address(path: Path, kind: str = "pictures") -> str:
    """Where the server gives out a picture, or with kind `thumbs` a small one; another file has another address."""
    return f"{kind}/{quote(path.name)}?v={path.stat().st_mtime_ns if path.exists() else 0}"


def seconds(value: float) -> str:
    """A time in words: seconds, or minutes where there are many."""
    return f"{max(1, round(value))} s" if value < 90 else f"{round(value / 60)} min"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, … 11th, … 21st."""
    ending = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def status(words: str, state: str = "idle", detail: str = "", progress: float | None = None, field: str = "") -> str:
    """The status line. `words` are read out by screen readers when they change; `detail`, which changes often, is not.

    The page's script reads the state, the progress and the field that is wrong from the attributes. No two lines are
    the same text, so that a message that comes twice is shown twice.
    """
    percent = "" if progress is None else f' data-progress="{progress:.0%}"'
    bar = (
        "" if progress is None else f'<span class="bar" aria-hidden="true"><i style="width:{progress:.1%}"></i></span>'
    )
    more = f'<span aria-hidden="true">{escape(detail)}</span>' if detail else ""
    return (
        f'<p class="line {state}" data-state="{state}" data-field="{escape(field)}"{percent} '
        f'data-at="{time.monotonic_ns()}">'
        f"<span>{escape(words)}</span>{more}</p>{bar}"
    )


def failure(message: str) -> str:
    """The status line of an error message `field: what is wrong; what to do`."""
    field, colon, _ = message.partition(":")
    return status(message, "failed", field=field.strip() if colon else "")


def progress(view: View) -> str:
    """The status line of a job that waits or runs."""
    if view.state is State.WAITING and view.place.ahead:
        wait = f" · about {seconds(view.place.begins)}" if view.place.begins else ""
        return status(f"You are {ordinal(view.place.ahead)} in line", "running", wait)
    image = f"Image {view.index + 1} of {view.total}" if view.total > 1 else "Drawing"
    left = f" · about {seconds(view.seconds_left)} left" if view.seconds_left is not None else ""
    steps = f" · step {view.step} of {view.steps}" if view.steps else ""
    return status(image, "running", f"{steps}{left}", view.done)


def _places(
    total: int, pictures: Sequence[Picture], preview: str, index: int, finished: Callable[[Picture], str]
) -> list[str]:
    """What stands at each place: a picture that is `finished`, the one that is being drawn, or nothing yet."""
    made = {picture.index: finished(picture) for picture in pictures}
    drawn = f'<div class="cell"><img decoding="sync" class="soft" src="{preview}" alt="Preview"></div>'
    empty = '<div class="cell empty"></div>'
    return [made.get(place, drawn if preview and place == index else empty) for place in range(total)]


def stage(total: int, pictures: Sequence[Picture], preview: str = "", index: int = -1, alt: str = "") -> str:
    """The result: one picture, or a grid in which the finished ones stand, the one being drawn, and places to fill."""

    def finished(picture: Picture) -> str:
        label = escape(f"{alt}, seed {picture.settings.get('seed')}")
        return (
            f'<a class="cell" href="{address(picture.path)}" target="_blank" title="Full size">'
            f'<img decoding="sync" src="{address(picture.path)}" alt="{label}"></a>'
        )

    cells = _places(total, pictures, preview, index, finished)
    return f'<div class="stage n{min(total, 4)}">{"".join(cells)}</div>'


def welcome(text: str) -> str:
    """The empty stage before the first picture."""
    return f'<div class="stage n1"><div class="cell empty"><p>{escape(text)}</p></div></div>'


def links(pictures: Sequence[Picture]) -> str:
    """Download and copy, for each finished picture."""
    made = []
    for picture in pictures:
        name = "Download PNG" if len(pictures) == 1 else f"PNG {picture.index + 1}"
        made.append(
            f'<a class="button" download="{escape(picture.path.name)}" href="{address(picture.path)}">{name}</a>'
        )
    if pictures:
        text = escape(json.dumps(pictures[0].settings, ensure_ascii=False))
        made.append(f'<button type="button" class="button" data-copy="{text}">Copy settings</button>')
    return f'<div class="links">{"".join(made)}</div>'


def thumbnails(entries: Sequence[Entry], empty: str, chosen: str = "") -> str:
    """Small pictures to choose from; each is a button that carries its file's name."""
    if not entries:
        return f'<p class="hint">{escape(empty)}</p>'
    made = []
    for entry in entries:
        star = '<span class="star" aria-hidden="true">★</span>' if entry.starred else ""
        label = (entry.prompt or entry.name) + (", starred" if entry.starred else "")
        made.append(
            f'<button type="button" class="thumb" data-name="{escape(entry.name)}" title="{escape(label[:300])}" '
            f'aria-pressed="{"true" if entry.name == chosen else "false"}">'
            f'<img loading="lazy" src="{address(entry.path, "thumbs")}" alt="{escape(label[:300])}">{star}</button>'
        )
    return f'<div class="thumbs">{"".join(made)}</div>'


def table(items: Iterable[tuple[str, object]], caption: str) -> str:
    """Names and values, as text."""
    body = "".join(f"<tr><th scope=row>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows(items))
    return f'<table class="facts"><caption>{escape(caption)}</caption><tbody>{body}</tbody></table>' if body else ""


def changes_table(items: Sequence[tuple[str, object, object]]) -> str:
    """What would change: a row for each setting with its value now and then."""
    if not items:
        return '<p class="hint">These settings are the ones on the page already.</p>'
    body = "".join(
        f"<tr><th scope=row>{escape(key)}</th><td>{escape(now)}</td><td>{escape(then)}</td></tr>"
        for (key, now), (_, then) in zip(
            rows((key, now) for key, now, _ in items), rows((key, then) for key, _, then in items), strict=True
        )
    )
    head = "<tr><th scope=col>Setting</th><th scope=col>Now</th><th scope=col>From the picture</th></tr>"
    return f'<table class="facts"><caption>What will change</caption><thead>{head}</thead><tbody>{body}</tbody></table>'


def comparison(
    names: tuple[str, str],
    labels: tuple[Sequence[str], Sequence[str]],
    orders: Sequence[Order],
    pictures: Sequence[Picture],
    preview: str = "",
    index: int = -1,
) -> str:
    """The table of a comparison; a finished cell is a button that carries its place."""
    across, down = labels

    def finished(picture: Picture) -> str:
        row, column = divmod(picture.index, len(across))
        seed = orders[picture.index].request.seed
        words = f"{names[0]} {across[column]}, {names[1]} {down[row]}, seed {seed}"
        return (
            f'<button type="button" class="thumb" data-name="{picture.index}" title="Choose this picture">'
            f'<img src="{address(picture.path)}" alt="{escape(words)}"></button>'
        )

    cells = _places(len(orders), pictures, preview, index, finished)
    head = "".join(f"<th scope=col>{escape(label)}</th>" for label in across) if any(across) else ""
    body = []
    for row, label in enumerate(down):
        name = f"<th scope=row>{escape(label)}</th>" if any(down) else ""
        of_row = cells[row * len(across) : (row + 1) * len(across)]
        body.append(f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in of_row)}</tr>")
    corner = f'<td class="corner">{escape(names[0])} →<br>{escape(names[1])} ↓</td>' if any(down) else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Comparison">'
        f'<table class="compare"><thead><tr>{corner}{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )
