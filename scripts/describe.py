"""Say what a model's file or folder is, and how that was told; reads no weights."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, printable, run

if TYPE_CHECKING:
    from ldm.formats.evidence import Description

EXAMPLES = """examples:
  python scripts/describe.py v1-5-pruned-emaonly.safetensors
  python scripts/describe.py shapes-256 --json"""


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=f"{__doc__}\n\n{EXAMPLES}", prog="describe.py")
    made.add_argument("model", metavar="FILE|FOLDER|NAME", help="a single file, a folder, or a bundled model")
    made.add_argument("--json", action="store_true", help="print one line of JSON")
    return made


def main() -> None:
    """Look and print."""
    args = parser().parse_args()
    from ldm.formats.describe import describe

    facts = in_words(describe(place(args.model)))
    if args.json:
        print(json.dumps(facts))
    else:
        width = max(map(len, facts))
        print(*(f"{name:{width}}  {printable(str(value), None)}" for name, value in facts.items()), sep="\n")


def place(model: str) -> Path:
    """Where a model is. Raises ModelError, with the nearest name, where there is none."""
    from ldm.formats.finding import find

    path = Path(model).expanduser()
    return path if os.path.lexists(path) else find(model)


def in_words(said: "Description") -> dict[str, str | int]:
    """What is known of a model, in the order in which one wants to know it."""
    sizes = [f"{kind} {size / 1e6:,.1f} MB" for kind, size in said.formats.items()]
    return {
        "file": str(said.path),
        "layout": said.layout,
        "model": said.architecture,
        "predicts": f"{said.prediction or 'not known yet'}: {said.prediction_reason}",
        "text": f"{said.text}; cross-attention {said.cross_attention}",
        "UNet input": f"{said.input_channels} channels",
        "config": "its own" if said.has_config else "from the shapes of the weights",
        "averaged weights": "yes, a second set for the UNet (EMA)" if said.has_ema else "none beside the others",
        "weights": f"{said.tensors} tensors, {', '.join(sizes)}",
        "not read": f"{said.left_over} tensors that are no weights",
    }


if __name__ == "__main__":
    run(main)
