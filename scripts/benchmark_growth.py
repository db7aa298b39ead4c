"""Measure how time and memory of a whole drawing grow with size, pictures at once, steps and length of the prompt."""

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, number, run
from ldm.errors import MachineError, SettingError

EPILOG = """examples:
  python scripts/benchmark_growth.py --plot growth.svg --out growth.json
  python scripts/benchmark_growth.py --model v1-5-pruned-emaonly.safetensors --axes side --steps 2
Every point is a process of its own, `txt2img.py`; seconds are those that it says it drew, and memory is the peak of the
process. What is expected is the time of the point before, times what is counted as more operations."""
AXES: dict[str, tuple[int, ...]] = {
    "side": (256, 384, 512, 768, 1024),
    "batch": (1, 2, 4, 8, 16),
    "steps": (1, 3, 10, 30, 100),
    "words": (3, 30, 75, 300),
}
SECONDS = re.compile(r"images? in ([0-9.]+) s")
Points = dict[int, tuple[float, float, float]]
"""Value → seconds, expected seconds, bytes."""


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=__doc__, epilog=EPILOG, prog="benchmark_growth.py")
    made.add_argument("--model", metavar="NAME|PATH", help="bundle or file [emoji-256]")
    made.add_argument("--axes", default=",".join(AXES), metavar="A,B,…", help=f"of {', '.join(AXES)} [all]")
    made.add_argument("--side", default="256", metavar="PIXELS", help="of the pictures on the other axes [256]")
    made.add_argument("--steps", default="10", metavar="N", help="of the pictures on the other axes [10]")
    made.add_argument("--repeat", default="3", metavar="N", help="processes of each point; the fastest counts [3]")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    made.add_argument("--plot", type=Path, metavar="FILE", help="write a plot as SVG")
    return made


def main() -> None:
    """Draw with every value of every axis; print tables in Markdown, and draw them."""
    args = parser().parse_args()
    from ldm.formats.finding import DEFAULT
    from ldm.outputs import check_writable
    from ldm.request import whole

    axes = args.axes.split(",")
    if unknown := [name for name in axes if name not in AXES]:
        raise SettingError(f"axes: no axis {unknown[0][:40]!r}; use of {', '.join(AXES)}")
    side = number("side", whole(64, 2048, 256), args.side)
    others = {"side": side, "steps": number("steps", whole(1, 1000, 10), args.steps)}
    repeat = number("repeat", whole(1, 100, 3), args.repeat)
    for path in (args.out, args.plot):
        if path is not None:
            check_writable(path.parent)
    figures: dict[str, Points] = {}
    for axis in axes:
        figures[axis] = {}
        before: tuple[float, float] | None = None
        print(f"\n| {axis} | seconds | expected | peak memory |\n|---|---|---|---|")
        for value in AXES[axis]:
            asked = {**others, "batch": 1, "words": 3, axis: value}
            seconds, peak = min(drawn(args.model or DEFAULT, asked) for _ in range(repeat))
            work = operations_of(args.model or DEFAULT, asked)
            # By the row before: in the first one much is overhead, which would hide what grows too fast.
            expected = seconds if before is None else before[0] * work / before[1]
            before = seconds, work
            figures[axis][value] = seconds, expected, peak
            print(f"| {value} | {seconds:.2f} | {expected:.2f} | {peak / 1e6:,.0f} MB |", flush=True)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        args.plot.write_text(plot(figures), encoding="utf-8")


def drawn(model: str, asked: Mapping[str, int]) -> tuple[float, float]:
    """Seconds that a process needed for its pictures, and the peak of its memory in bytes."""
    from ldm.evaluation.processes import ended

    with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
        flags = ["--model", model, "--size", f"{asked['side']}x{asked['side']}", "--steps", str(asked["steps"])]
        flags += ["-n", str(asked["batch"]), "--batch-size", str(asked["batch"]), "--seed", "1", "--outdir", folder]
        script = Path(__file__).with_name("txt2img.py")
        said, peak = ended([sys.executable, str(script), "--prompt", "a red circle " * (asked["words"] // 3), *flags])
    found = SECONDS.search(said)
    if found is None:
        raise MachineError("txt2img.py: did not say how long it drew; run it by itself")
    return float(found[1]), peak


def operations_of(model: str, asked: Mapping[str, int]) -> float:
    """Operations of UNet and decoder for these pictures, counted on networks that compute nothing."""
    from ldm.bundle import read_config
    from ldm.evaluation.bundled import work_of
    from ldm.formats.finding import find

    step, decoding = work_of(read_config(find(model)), asked["batch"], asked["side"], asked["side"])
    return step.total * asked["steps"] + decoding.total


def plot(figures: Mapping[str, Points]) -> str:
    """A panel for each axis, both scales logarithmic, as SVG: seconds with what is expected dashed, and gigabytes."""
    from ldm.evaluation.plots import page

    width, height = 380, 300
    panels = [panel(axis, points, width, height) for axis, points in figures.items()]
    placed = [f'<g transform="translate({width * index} 0)">{one}</g>' for index, one in enumerate(panels)]
    return page(width * len(panels), height, placed)


def panel(axis: str, points: Points, width: int, height: int) -> str:
    """The lines of one axis."""
    from ldm.evaluation.plots import logarithmic

    margin, values = 45, sorted(points)
    lines = {
        "seconds": ([points[value][0] for value in values], "#06c", ""),
        "expected": ([points[value][1] for value in values], "#06c", ' stroke-dasharray="4 3"'),
        "GB": ([points[value][2] / 1e9 for value in values], "#c50", ""),
    }
    every = [max(amount, 1e-3) for amounts, _, _ in lines.values() for amount in amounts]
    x = logarithmic(values[0], values[-1], margin, width - margin)
    y = logarithmic(min(every), max(every), height - margin, margin)
    parts = [f'<text x="{width / 2:.0f}" y="{height - 6}" text-anchor="middle">{axis}</text>']
    parts += [f'<text x="{x(v):.0f}" y="{height - 22}" text-anchor="middle">{v}</text>' for v in values]
    for name, (amounts, colour, dash) in lines.items():
        path = " ".join(f"{x(value):.1f},{y(amount):.1f}" for value, amount in zip(values, amounts, strict=True))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        if not dash:
            parts.append(
                f'<text x="{margin}" y="{y(amounts[0]) - 6:.0f}" fill="{colour}">{amounts[0]:.3g} {name}</text>'
            )
            last = f"{amounts[-1]:.3g} {name}"
            end = f'x="{width - 5}" y="{y(amounts[-1]) - 6:.0f}" text-anchor="end"'
            parts.append(f'<text {end} fill="{colour}">{last}</text>')
    return "".join(parts)


if __name__ == "__main__":
    run(main)
