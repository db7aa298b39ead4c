"""The server of the browser tests: the real page and worker on a given model, with steps of a known length.

It is started as a process of its own, so that it can be killed and so that its work does not slow the test down.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}

import torch

from ldm.bundle import Bundle
from ldm.diffusion.samplers import Step
from ldm.pipeline import TextToImage
from ldm.request import GenerationRequest
from ldm.ui.models import Models
from ldm.ui.server import application, listen, serve
from ldm.ui.studio import Limits, Studio
from ldm.ui.worker import Worker


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="shapes-256")
    parser.add_argument("--model-dir", type=Path, action="append", default=[])
    parser.add_argument("--outdir", type=Path, required=True)
    parser.add_argument("--port", type=int)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--max-pixels", type=int, default=2048 * 2048)
    args = parser.parse_args()
    whole = TextToImage.stream

    def slowed(self: TextToImage, request: GenerationRequest) -> Iterator[Step]:
        if "a bug" in request.prompt:
            raise RuntimeError("<img src=x onerror=alert(1)> a bug on purpose")
        steps = whole(self, request)
        while True:
            time.sleep(args.step_seconds)
            try:
                yield next(steps)
            except StopIteration:
                return

    load = Bundle.load

    def slowly(path: str, device: str, dtype: torch.dtype) -> Bundle:
        time.sleep(args.load_seconds)
        return load(path, device, dtype)

    TextToImage.stream = slowed  # type: ignore[method-assign]  # made slow on purpose
    Bundle.load = slowly  # type: ignore[method-assign, assignment]  # the same
    models = Models(args.model, args.model_dir)
    models.engine(models.first)
    studio = Studio(models, args.outdir, Worker(), Limits(max_pixels=args.max_pixels))
    studio.warm_up()
    listening = listen("127.0.0.1", args.port)
    app = application(studio)
    print(f"ready {listening.getsockname()[1]}", flush=True)
    serve(app, listening)


if __name__ == "__main__":
    main()
