"""Plots as SVG: the page that they are drawn on, logarithmic axes, and bars of ratios."""

import math
from collections.abc import Callable, Iterable, Mapping

Ratio = tuple[float, float, float]
"""The median, the least and the most."""


def page(width: int, height: int, parts: Iterable[str]) -> str:
    """An SVG file of this size, white behind its parts."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def logarithmic(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Where a number stands on an axis from `low` at `start` to `high` at `end`; what is lower stands at `start`."""
    span = math.log(high / low) or 1.0
    return lambda number: start + (end - start) * math.log(max(number, low) / low) / span


def bars(rows: Mapping[str, Mapping[str, Ratio]]) -> str:
    """A bar from 1 to each ratio of each row, and a line from the least to the most; twice is as long as half."""
    width, left, right = 960, 430, 210
    numbers = [number for row in rows.values() for ratio in row.values() for number in ratio]
    x = logarithmic(min([0.8, *numbers]), max([1.25, *numbers]), left, width - right)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    colours = {name: f"hsl({(210 + 150 * index) % 360} 65% 40%)" for index, name in enumerate(names)}
    parts, y = [], 16
    for what, row in rows.items():
        parts.append(f'<text x="{left - 10}" y="{y + 12}" text-anchor="end">{what}</text>')
        for name, (ratio, low, high) in row.items():
            ends, paint = sorted((x(1.0), x(ratio))), colours[name]
            where = f'x="{ends[0]:.1f}" y="{y + 2}" width="{ends[1] - ends[0]:.1f}" height="12"'
            parts.append(f'<rect {where} fill="{paint}" opacity=".6"/>')
            parts.append(f'<path d="M{x(low):.1f} {y + 8}H{x(high):.1f}" stroke="{paint}" stroke-width="2"/>')
            parts.append(f'<text x="{width - right + 12}" y="{y + 12}" fill="{paint}">{ratio:.2f} times: {name}</text>')
            y += 17
        y += 9
    axis = f'<path d="M{x(1.0):.1f} 10V{y}" stroke="black"/>'
    return page(width, y + 10, [*parts, axis])
