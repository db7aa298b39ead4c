"""Open the web page on a model: `python app.py`, then look at the address it prints."""

import os
from pathlib import Path

from ldm.cli import ArgumentParser, run
from ldm.errors import MachineError, SettingError

EXAMPLES = """examples:
  python app.py
  python app.py --model runs/shapes/shapes-256 --port 7861"""


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(prog="app.py", description=f"{__doc__}\n\n{EXAMPLES}")
    made.add_argument("--model", metavar="NAME|PATH", help="a bundled model or a model folder [the bundled model]")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    made.add_argument("--port", type=int, metavar="N", help="port to listen on [the first free one from 7860]")
    made.add_argument("--outdir", type=Path, default=Path("outputs"), metavar="FOLDER", help="for pictures [outputs]")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps [auto]")
    made.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 [auto]")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def main() -> None:
    """Load the model and serve the page until Ctrl-C."""
    args = parser().parse_args()
    if args.port is not None and not 1 <= args.port <= 65535:
        raise SettingError(f"port: {args.port} is not between 1 and 65535; use 7860")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from ldm.bundle import DEFAULT, Bundle
    from ldm.machine import check_names, find_device, find_dtype

    check_names(args.device, args.dtype)
    device = find_device(args.device)
    bundle = Bundle.load(args.model or DEFAULT, str(device), find_dtype(args.dtype, device)[0])
    try:
        from ldm.pipeline import TextToImage
        from ldm.ui.page import page
    except ModuleNotFoundError as error:
        raise MachineError(f"app: {error.name} is not installed; run: make install") from None
    blocks = page(TextToImage(bundle), args.outdir)
    try:
        blocks.queue(max_size=8).launch(server_name=args.host, server_port=args.port, footer_links=["api"])
    except OSError:
        raise MachineError(f"port: {args.port or '7860 to 7959'} is taken; use another --port") from None


if __name__ == "__main__":
    run(main)
