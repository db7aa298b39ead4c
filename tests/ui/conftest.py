"""The system's Chromium and a server to look at; skipped where there is none."""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import EXAMPLES, OTHER_MODEL, Server, User

from ldm.bundle import Bundle

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright; run: make install")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine; install it, for example: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def other_models(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one more model, of other weights, with a hostile name, which says what it can draw."""
    folder = tmp_path_factory.mktemp("other")
    other = Bundle.load(str(tiny_folder))
    with torch.no_grad():
        next(iter(other.unet.parameters())).mul_(1.5)
    other = replace(other, config=other.config.model_copy(update={"examples": EXAMPLES}))
    other.save(folder / OTHER_MODEL)
    return folder


@pytest.fixture(scope="module")
def server(tiny_folder: Path, other_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page on the tiny model, whose steps take a tenth of a second, and on another; each takes half to load."""
    flags = ("--model", tiny_folder, "--model-dir", other_models, "--step-seconds", "0.1", "--load-seconds", "0.5")
    made = Server(*flags, outdir=tmp_path_factory.mktemp("outputs")).start()
    yield made
    assert made.end() in (0, -signal.SIGTERM)


@pytest.fixture
def user(chromium: Any, server: Server) -> Iterator[User]:
    """Somebody who has opened the page, and to whom nothing goes wrong unnoticed."""
    made = User(chromium, server.address).opens()
    yield made
    made.context.close()
    assert made.wrong == []
