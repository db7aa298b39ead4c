"""Write a model in another layout: one file with CompVis's names, a diffusers folder, or this program's own folder.

Weights are copied number for number. This is the only reader of .ckpt files, and it runs nothing that is in them.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import ArgumentParser, run
from ldm.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.bundle import Bundle
    from ldm.formats.read import OpenModel

EXAMPLES = """examples:
  python scripts/convert.py --to single-file shapes-256 shapes.safetensors
  python scripts/convert.py --to diffusers v1-5-pruned.ckpt sd15 --ema --dtype float16 --check"""
LAYOUTS = ("single-file", "diffusers", "bundle")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
PROMPTS = ("a red circle to the left of a blue square", "")


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(description=f"{__doc__}\n{EXAMPLES}", prog="convert.py")
    made.add_argument("source", metavar="SOURCE", help="a file, also a .ckpt, a folder, or a bundled model's name")
    made.add_argument("destination", type=Path, metavar="DESTINATION", help="what is written; it must not exist")
    made.add_argument("--to", choices=LAYOUTS, required=True, help="the layout that is written")
    made.add_argument("--dtype", choices=tuple(DTYPES), help="number format of the weights [as they are]")
    made.add_argument("--largest", type=float, metavar="MB", help="with --to bundle, of any file [one file a network]")
    made.add_argument(
        "--sharing", metavar="NAME", help="with --to bundle, of the bundle NAME beside it, what is the same"
    )
    made.add_argument("--ema", action="store_true", help="take the averaged weights of the UNet [the others]")
    made.add_argument("--prediction", choices=("eps", "v"), help="what the UNet predicts [told from the source]")
    made.add_argument("--check", action="store_true", help="compare what both models compute")
    return made


def main() -> None:
    """Read the headers, write, and compare if asked."""
    args = parser().parse_args()
    check_destination(args)
    from ldm.bundle import Bundle
    from ldm.formats.export import exported, to_single_file
    from ldm.formats.export_bundle import to_bundle
    from ldm.formats.export_diffusers import to_diffusers

    opened = open_source(args)
    dtype = DTYPES.get(args.dtype)
    if args.to == "bundle":
        largest = None if args.largest is None else round(args.largest * 1e6)
        to_bundle(args.destination, opened.config, opened.parts, dtype, largest, args.sharing)
    else:
        model = exported(opened.config, opened.parts, opened.description.path)
        write = to_single_file if args.to == "single-file" else to_diffusers
        write(args.destination, model, dtype)
    print(args.destination)
    if args.check:
        before, after = answers(Bundle.of(opened)), answers(Bundle.load(str(args.destination)))
        for part, known in before.items():
            difference = float((after[part] - known).abs().max() / known.abs().max())
            print(f"{part}: largest difference {difference:.2g} of the largest value")


def check_destination(args: argparse.Namespace) -> None:
    """Raise SettingError or MachineError for a destination that cannot be written, before anything is read."""
    from ldm.outputs import check_writable

    destination: Path = args.destination
    if destination.exists() or destination.is_symlink():
        raise SettingError(f"{destination}: exists and is never overwritten; choose another name")
    if args.to == "single-file" and destination.suffix != ".safetensors":
        raise SettingError(f"{destination}: does not end in .safetensors, as other programs expect; change the name")
    if args.largest is not None and (args.to != "bundle" or not args.largest >= 1):
        raise SettingError(f"--largest: got {args.largest:g}, expected 1 or more, and --to bundle; correct it")
    check_writable(destination.parent)
    if args.sharing is not None:
        check_sharing(args)


def check_sharing(args: argparse.Namespace) -> None:
    """Raise SettingError where there is no bundle of that name beside the destination."""
    from ldm.formats.describe import BUNDLE_CONFIG
    from ldm.formats.manifest import is_name

    beside = args.destination.parent / args.sharing
    if args.to != "bundle" or not is_name(args.sharing) or not (beside / BUNDLE_CONFIG).is_file():
        raise SettingError(
            f"--sharing: no bundle {args.sharing[:80]!r} beside {args.destination}, or not --to bundle; correct it"
        )


def open_source(args: argparse.Namespace) -> "OpenModel":
    """The source with its prediction known: said, found in the file, or asked of the UNet."""
    from ldm.bundle import Bundle, verify
    from ldm.formats import ckpt
    from ldm.formats.describe import layout
    from ldm.formats.finding import find
    from ldm.formats.read import open_model, open_tensors
    from ldm.formats.tensors import MemoryTensor

    path = Path(args.source).expanduser()
    path = path if os.path.lexists(path) else find(args.source)
    if path.is_dir() or not ckpt.is_pickle(path):
        if layout(path) == "bundle":
            verify(path)
        return Bundle.predicting(open_model(path, args.prediction, args.ema))
    tensors = {name: MemoryTensor(tensor) for name, tensor in ckpt.load(path).items()}
    opened = open_tensors(path, tensors, {}, args.ema)
    if args.prediction:
        return opened.predicting(args.prediction, "you say so")
    return Bundle.predicting(opened)


def answers(model: "Bundle") -> "dict[str, Tensor]":
    """What each part of a model says to inputs from a seed."""
    import torch

    from ldm.models.text import ClipTextEncoder

    generator = torch.Generator().manual_seed(0)
    config = model.config
    side = 4 * config.factor
    image = torch.rand((1, config.autoencoder.image_channels, side, side), generator=generator) * 2 - 1
    x = torch.randn((2, config.unet.in_channels, *2 * [4 * config.unet.factor]), generator=generator)
    context = torch.randn((2, 8, config.unet.context_width), generator=generator)
    prompts = PROMPTS if isinstance(model.text, ClipTextEncoder) else PROMPTS[1:]
    with torch.inference_mode():
        return {
            "text encoder": model.text.encode(prompts).tokens,
            "UNet": model.unet(x, torch.tensor([1.0, 998.0]), context),
            "encoder": model.autoencoder.encode(image).mean,
            "decoder": model.autoencoder.decode(x[:1, : config.autoencoder.latent_channels]),
        }


if __name__ == "__main__":
    run(main)
