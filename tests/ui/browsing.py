"""A real server in a process of its own, and the people who look at it."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

SERVED = Path(__file__).with_name("served.py")
PATIENCE = 60_000  # milliseconds; what should come at once may come late on a busy machine


class Server:
    """The page on a model, at an address."""

    def __init__(self, *flags: str | Path, outdir: Path) -> None:
        self.outdir, self.flags = outdir, flags
        self.process: subprocess.Popen[str] | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> "Server":
        """Start it, at the same port as before where it was started before, and wait until it says that it is ready."""
        port = ["--port", str(self.port)] if self.port else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [sys.executable, SERVED, "--outdir", self.outdir, *port, *self.flags],
            stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready "), f"the server ended with {self.process.wait()}"
        self.port = int(line.split()[1])
        urllib.request.urlopen(self.address + "alive", timeout=30).read()
        return self

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; its exit code."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(30)

    def pictures(self) -> list[str]:
        """The names of the pictures in its folder."""
        return sorted(path.name for path in self.outdir.glob("[!.]*.png"))


class User:
    """One person at one window, who notes what goes wrong: errors in the console, and requests that leave here."""

    def __init__(self, chromium: Any, address: str, **window: Any) -> None:
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **window})
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.address = address
        self.wrong: list[str] = []
        self.page.on("console", lambda said: self._hear(said.type, said.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url))
        self.page.on("dialog", lambda dialog: dialog.accept())

    def _hear(self, kind: str, text: str) -> None:
        # What is on its way when a page is left is aborted, and Gradio says so.
        if kind == "error" and "AbortError" not in text and "Connection errored out" not in text:
            self.wrong.append(text)

    def _note(self, url: str) -> None:
        if not url.startswith((self.address, "data:", "blob:")):
            self.wrong.append(f"left this machine: {url}")

    def opens(self) -> "User":
        """Go to the page and wait until it can be used."""
        self.page.goto(self.address)
        self.page.wait_for_selector("#prompt textarea")
        self.page.wait_for_selector("#status[aria-live]")
        return self

    def writes(self, prompt: str, steps: int = 4, images: int = 1, seed: int | None = None) -> "User":
        """Fill in the fields."""
        self.page.fill("#prompt textarea", prompt)
        self.page.fill("#steps input[type=number]", str(steps))
        self.page.fill("#num-images input[type=number]", str(images))
        if seed is not None:
            if not self.page.is_visible("#seed input"):
                self.page.get_by_role("button", name="Advanced").click()
            self.page.fill("#seed input", str(seed))
            self.page.get_by_label("Keep").check()
        self.page.locator("#prompt textarea").focus()
        return self

    def presses(self, name: str) -> None:
        """Click the button of that name."""
        self.page.get_by_role("button", name=name, exact=True).click()

    def goes_to(self, screen: str) -> None:
        """Open a screen by its tab."""
        self.page.get_by_role("tab", name=screen, exact=True).click()

    @property
    def status(self) -> str:
        return str(self.page.inner_text("#status .line"))

    def sees(self, words: str, where: str = "#status") -> None:
        """Wait until these words stand there."""
        self.page.locator(where).get_by_text(words).first.wait_for()

    def waits_for_the_end(self) -> str:
        """Wait until nothing runs for this user; the status line."""
        self.page.wait_for_selector("#status .line:not(.running)")
        self.page.wait_for_function("() => !document.body.dataset.running")
        return self.status
