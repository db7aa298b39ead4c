"""The system's Chromium and a server to look at; skipped where there is none."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Server, User

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


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page on the tiny model, whose steps take a tenth of a second."""
    flags = ("--model", tiny_folder, "--step-seconds", "0.1")
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
