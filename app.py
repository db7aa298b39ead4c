"""Open the web page on a model: `python app.py`, then open the address it prints in a browser."""

import argparse
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from ldm.cli import ArgumentParser, run, warn
from ldm.errors import MachineError, SettingError

EXAMPLES = """examples:
  python app.py
  python app.py --model runs/shapes/shapes-256 --port 7861"""


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(prog="app.py", description=f"{__doc__}\n\n{EXAMPLES}")
    made.add_argument("--model", metavar="NAME|PATH", help="a bundled model or a model folder [the bundled model]")
    made.add_argument(
        "--model-dir",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="offer the models in it; repeatable",
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1: this machine alone]")
    made.add_argument("--listen", action="store_true", help="answer other machines too; short for --host 0.0.0.0")
    made.add_argument("--auth", metavar="USER:PASSWORD", help="ask for this name and password")
    made.add_argument("--port", type=int, metavar="N", help="port to listen on [the first free one from 7860]")
    made.add_argument("--outdir", type=Path, default=Path("outputs"), metavar="FOLDER", help="for pictures [outputs]")
    made.add_argument("--max-queue", type=int, default=8, metavar="N", help="jobs that may wait [8]")
    made.add_argument("--max-images", type=int, default=4, metavar="N", help="pictures of one request [4]")
    made.add_argument(
        "--max-pixels", type=int, default=2048 * 2048, metavar="N", help="pixels of one picture [4194304]"
    )
    made.add_argument("--no-preview", action="store_true", help="show no pictures while they are drawn")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps [auto]")
    made.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 [auto]")
    return made


def check(args: argparse.Namespace) -> None:
    """Refuse bad flags before anything is loaded."""
    from ldm.formats.finding import find
    from ldm.machine import check_names
    from ldm.outputs import check_writable

    if args.model is not None:
        find(args.model)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise SettingError(f"port: {args.port} is not between 1 and 65535; use 7860")
    for name, low in (("max_queue", 0), ("max_images", 1), ("max_pixels", 64 * 64)):
        if getattr(args, name) < low:
            raise SettingError(f"{name}: {getattr(args, name)} is less than {low}; use {low} or more")
    if args.auth is not None and not all(args.auth.partition(":")):
        raise SettingError("auth: it is not USER:PASSWORD; write for example ada:a-long-password")
    for folder in args.model_dir:
        if not folder.is_dir():
            raise SettingError(f"model_dir: {folder} is not a folder; give one that holds model folders")
    check_names(args.device, args.dtype)
    check_writable(args.outdir)


def main() -> None:
    """Load the model and serve the page until Ctrl-C."""
    args = parser().parse_args()
    check(args)
    if args.debug:
        logging.getLogger("ldm.ui").setLevel(logging.DEBUG)
    # So that the folder below is removed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # What is uploaded lies in a folder of this run alone, which only its user can read.
    with tempfile.TemporaryDirectory(prefix="ldm-") as cache:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": cache, "HF_HUB_OFFLINE": "1"}
        open_page(args)


def open_page(args: argparse.Namespace) -> None:
    """Everything that needs the libraries."""
    from ldm.formats.finding import DEFAULT
    from ldm.machine import find_device, find_dtype, keep_freed_memory
    from ldm.ui.models import Models
    from ldm.ui.studio import Limits, Studio
    from ldm.ui.worker import Worker

    try:
        from ldm.ui.server import application, listen, serve
    except ModuleNotFoundError as error:
        raise MachineError(f"app: {error.name} is not installed; run: make install") from None
    host = "0.0.0.0" if args.listen else args.host
    listening = listen(host, args.port)
    keep_freed_memory()
    device = find_device(args.device)
    models = Models(args.model or DEFAULT, args.model_dir, str(device), find_dtype(args.dtype, device)[0])
    for problem in models.problems:
        warn(problem)
    models.engine(models.first)
    limits = Limits(args.max_images, args.max_pixels, not args.no_preview)
    studio = Studio(models, args.outdir, Worker(args.max_queue), limits)
    studio.warm_up()
    outside = host not in ("127.0.0.1", "::1", "localhost")
    if outside and not args.auth:
        warn("host: everybody who reaches this machine can draw here and see all pictures; add --auth USER:PASSWORD")
    app = application(studio, outside, args.auth or "")
    print(f"Open http://{'localhost' if outside else host}:{listening.getsockname()[1]} in a browser", flush=True)
    serve(app, listening)


if __name__ == "__main__":
    run(main)
