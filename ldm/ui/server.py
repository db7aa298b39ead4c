"""The server behind the page: which pictures it gives out, and how it starts and ends."""

import functools
import io
import logging
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import gradio as gr
import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from PIL import Image
from starlette.middleware import Middleware

from ldm.errors import DataError, MachineError
from ldm.ui import look
from ldm.ui.answering import OneLine
from ldm.ui.guard import MAX_UPLOAD, Guard
from ldm.ui.history import History
from ldm.ui.page import page
from ldm.ui.studio import Studio

DEFAULT_PORT, PORTS = 7860, 100
THUMB = 232  # twice what is shown, for fine screens
SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=86400"}


def application(studio: Studio, any_address: bool = False, password: str = "") -> FastAPI:
    """The page and its pictures as one application; when it ends, what is drawn is dropped at the next step."""
    history = History(studio.outdir)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        studio.worker.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/alive")
    def alive() -> Response:
        return Response("yes")

    @app.get("/pictures/{name}")
    def picture(name: str) -> Response:
        try:
            return FileResponse(history.find(name), media_type="image/png", headers=SAFE)
        except DataError:
            return Response("No such picture.", 404)

    @app.get("/thumbs/{name}")
    def small(name: str) -> Response:
        try:
            path = history.find(name)
            return Response(thumbnail(path, path.stat().st_mtime_ns), media_type="image/jpeg", headers=SAFE)
        except (DataError, OSError):
            return Response("No such picture.", 404)

    blocks = page(studio, history)
    blocks.queue(max_size=None, default_concurrency_limit=None)
    gr.mount_gradio_app(
        app, blocks, path="/", footer_links=["api"], run_history=False, allowed_paths=None,
        blocked_paths=[str(Path.cwd()), str(Path.home() / ".config")], show_error=False, max_file_size=MAX_UPLOAD,
        ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
        app_kwargs={"middleware": [Middleware(OneLine)]},
        theme=look.theme(), css=look.CSS.read_text(encoding="utf-8"), js=look.SCRIPT.read_text(encoding="utf-8"),
        head=look.head(),
    )  # fmt: skip
    app.add_middleware(Guard, any_address=any_address, password=password)
    return app


@functools.lru_cache(maxsize=512)
def thumbnail(path: Path, written: int) -> bytes:
    """A small JPEG of a picture, made once as long as the file does not change. Raises DataError for a broken one."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise DataError("picture: it cannot be read") from None
    small.thumbnail((THUMB, THUMB))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens at `port`, or at the first free one from 7860. Raises MachineError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    candidates: Sequence[int] = range(DEFAULT_PORT, DEFAULT_PORT + PORTS) if port is None else [port]
    problem = ""
    for candidate in candidates:
        made = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((host, candidate))
            made.listen(128)
            return made
        except OSError as error:
            made.close()
            problem = error.strerror or str(error)
    shown = port if port is not None else f"{DEFAULT_PORT} to {DEFAULT_PORT + PORTS - 1}"
    raise MachineError(f"port: {host}:{shown}: {problem}; use another --port, for example {(port or DEFAULT_PORT) + 1}")


class _Server(uvicorn.Server):
    """Says nothing about the streams of open pages that are cut when it ends; uvicorn reports each with a traceback."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; pages that are open then do not hold it up."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, access_log=False)
    _Server(config).run(sockets=[listening])
