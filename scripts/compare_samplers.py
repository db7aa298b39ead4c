"""Compare samplers at equal cost: how right and how converged pictures are after a number of model calls."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, number, run

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.pipeline import TextToImage
    from ldm.request import GenerationRequest

EXAMPLES = """examples:
  python scripts/compare_samplers.py
  python scripts/compare_samplers.py --samplers ddim,dpmpp_2m,unipc --calls 5,10,20 --num-images 100 --plot calls.svg"""
FIRST_SEED = 20_000
REFERENCE_CALLS = 200


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=f"{__doc__}\n\n{EXAMPLES}", prog="compare_samplers.py")
    made.add_argument("--model", metavar="NAME|PATH", help="bundle that draws shapes [shapes-256]")
    made.add_argument("--samplers", metavar="A,B,…", help="samplers [all that suit any model]")
    made.add_argument("--schedule", help="grid of noise levels [the model's default]")
    made.add_argument("--calls", default="6,10,20", metavar="N,…", help="model calls of a picture [6,10,20]")
    made.add_argument("--num-images", default="32", metavar="N", help="held-out prompts with one object [32]")
    made.add_argument("--batch-size", default="8", metavar="N", help="pictures drawn at once [8]")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    made.add_argument("--plot", type=Path, metavar="FILE", help="write a plot as SVG")
    return made


def main() -> None:
    """Draw the same prompts and seeds with every sampler and number of calls; print a table in Markdown."""
    args = parser().parse_args()
    from ldm.bundle import Bundle
    from ldm.data.shapes import held_out_prompts
    from ldm.diffusion.samplers import SAMPLERS
    from ldm.evaluation.scores import score_shapes
    from ldm.formats.finding import SHAPES
    from ldm.machine import find_device, find_dtype, keep_freed_memory
    from ldm.outputs import check_writable
    from ldm.pipeline import TextToImage
    from ldm.request import GenerationRequest, whole

    suited = [name for name, method in SAMPLERS.items() if method.calls and not method.distilled]
    names = args.samplers.split(",") if args.samplers else suited
    count = number("num_images", whole(1, 10_000, 32), args.num_images)
    budgets = [number("calls", whole(1, 1000, 20), text) for text in args.calls.split(",")]
    asked = {
        name: GenerationRequest(prompt="any", sampler=name, schedule=args.schedule, batch_size=args.batch_size)
        for name in {"dpmpp_2m": None, **dict.fromkeys(names)}
    }
    for path in (args.out, args.plot):
        if path is not None:
            check_writable(path.parent)
    device = find_device("auto")
    keep_freed_memory()
    engine = TextToImage(Bundle.load(args.model or SHAPES, str(device), find_dtype("auto", device)[0]))
    prompts = held_out_prompts(count, "one", seed=0)

    def drawn(request: GenerationRequest, steps: int) -> "list[Image]":
        request = request.model_copy(update={"steps": steps})
        return engine.draw(prompts, range(FIRST_SEED, FIRST_SEED + count), request)

    reference = drawn(asked["dpmpp_2m"], REFERENCE_CALLS)
    print(f"reference: dpmpp_2m in {REFERENCE_CALLS} steps: {score_shapes(prompts, reference).colour_and_shape}")
    print("| sampler |" + "".join(f" {calls} calls |" for calls in budgets))
    print("|---|" + "---|" * len(budgets))
    figures: dict[str, dict[int, tuple[float, float]]] = {}
    for name in names:
        figures[name] = {}
        for calls in budgets:
            if steps := steps_of(asked[name], calls, engine):
                images = drawn(asked[name], steps)
                right = score_shapes(prompts, images).colour_and_shape.share
                figures[name][calls] = right, difference(images, reference)
        cells = [figures[name].get(calls) for calls in budgets]
        print(f"| `{name}` |" + "".join(f" {100 * c[0]:.0f} %, {c[1]:.1f} |" if c else " |" for c in cells), flush=True)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")
    if args.plot:
        args.plot.write_text(plot({name: {c: f[1] for c, f in of.items()} for name, of in figures.items()}))


def steps_of(request: "GenerationRequest", calls: int, engine: "TextToImage") -> int:
    """The most steps in which one picture takes at most `calls` model calls; 0 where even one step takes more."""
    from ldm.pipeline import network_calls

    for steps in range(calls, 0, -1):
        planned = engine.ready(request.model_copy(update={"steps": steps, "num_images": 1, "batch_size": 1}))
        if (network_calls(planned, engine.bundle.schedule) or 0) <= calls:
            return steps
    return 0


def difference(images: "Sequence[Image]", reference: "Sequence[Image]") -> float:
    """Mean absolute difference of pixels, in levels of 0 to 255."""
    import numpy as np

    pairs = zip(images, reference, strict=True)
    return float(np.mean([np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs]))


def plot(lines: Mapping[str, Mapping[int, float]]) -> str:
    """Difference against calls, both logarithmic, as SVG; the names stand where the lines end."""
    from ldm.evaluation.plots import logarithmic, page

    width, height, margin = 760, 460, 50
    calls = sorted({call for line in lines.values() for call in line})
    values = [max(value, 1e-2) for line in lines.values() for value in line.values()]
    x = logarithmic(calls[0], calls[-1], margin, width - 200)
    y = logarithmic(min(values), max(values), height - margin, margin)
    parts = [f'<text x="{x(c):.0f}" y="{height - 20}" text-anchor="middle">{c} calls</text>' for c in calls]
    ticks = [v for v in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if min(values) <= v <= max(values)]
    parts += [f'<text x="{margin - 8}" y="{y(v) + 4:.0f}" text-anchor="end">{v:g}</text>' for v in ticks]
    ends = sorted((y(line[max(line)]), name) for name, line in lines.items() if line)
    place = 0.0
    for index, (end, name) in enumerate(ends):
        place = max(end, place + 13)
        colour = f"hsl({index * 360 // len(ends)} 65% 40%)"
        points = " ".join(f"{x(call):.1f},{y(value):.1f}" for call, value in sorted(lines[name].items()))
        right = x(max(lines[name]))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<path d="M{right:.0f} {end:.0f}L{width - 155} {place:.0f}" stroke="{colour}" opacity=".4"/>')
        parts.append(f'<text x="{width - 150}" y="{place + 4:.0f}" fill="{colour}">{name}</text>')
    return page(width, max(height, int(place) + 30), parts)


if __name__ == "__main__":
    run(main)
