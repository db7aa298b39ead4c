"""A real server in a process of its own, and the people who look at it."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

SERVED = Path(__file__).with_name("served.py")
OTHER_MODEL = "<img src=x onerror=document.title='taken'>"
EXAMPLES = ("an orange star", "<b>a blue heart</b>")
PATIENCE = 180_000  # milliseconds; what should come at once may come late on a busy machine


class Server:
    """The page on a model, at an address."""

    def __init__(self, *flags: str | Path, outdir: Path) -> None:
        self.outdir, self.flags = outdir, flags
        self.cache, self.log = (outdir.with_name(f"{outdir.name}.{kind}") for kind in ("cache", "log"))
        self.process: subprocess.Popen[str] | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> "Server":
        """Start it, at the same port as before where it was started before, and wait until it says that it is ready."""
        port = ["--port", str(self.port)] if self.port else []
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment = {**os.environ, **threads, "GRADIO_TEMP_DIR": str(self.cache)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, SERVED, "--outdir", self.outdir, *port, *self.flags],
                stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready "), f"the server ended with {self.process.wait()}:\n{self.said()}"
        self.port = int(line.split()[1])
        urllib.request.urlopen(self.address + "alive", timeout=30).read()
        return self

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; its exit code."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(120)

    def said(self) -> str:
        """What it has said on stderr."""
        return self.log.read_text(encoding="utf-8")

    def pictures(self) -> list[str]:
        """The names of the pictures in its folder."""
        return sorted(path.name for path in self.outdir.glob("[!.]*.png"))


class User:
    """One person at one window, who notes what goes wrong: errors in the console, and requests that leave here."""

    def __init__(self, chromium: Any, address: str, **window: Any) -> None:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **window})
        context.set_default_timeout(PATIENCE)
        self._looks_at(context, address)

    def in_another_tab(self) -> "User":
        """The same person with a second tab, which shares what the browser keeps."""
        other = User.__new__(User)
        other._looks_at(self.context, self.address)
        return other

    def _looks_at(self, context: Any, address: str) -> None:
        self.context, self.address = context, address
        self.page = context.new_page()
        self.wrong: list[str] = []
        self.heard: list[str] = []  # all errors in the console, also those that are to be expected
        self.page.on("console", lambda said: self._hear(said.type, said.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url))
        self.page.on("dialog", lambda dialog: dialog.accept())

    def _hear(self, kind: str, text: str) -> None:
        if kind == "error":
            self.heard.append(text)
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
                self.opens_advanced()
            self.page.fill("#seed input", str(seed))
            self.page.get_by_label("Keep").check()
        self.page.locator("#prompt textarea").focus()
        return self

    def opens_advanced(self) -> None:
        """Show the fields that are hidden at first."""
        self.page.get_by_role("button", name="Advanced").click()
        self.page.wait_for_selector("#seed input", state="visible")
        self._waits_for_paint()

    def _waits_for_paint(self) -> None:
        """What is opened gets its first values once more before it is painted: nobody could have typed before, but a
        test can, in a window that is not in front or on a busy machine; Gradio then overwrites what it typed."""
        self.page.bring_to_front()
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def presses(self, name: str) -> None:
        """Click the button of that name."""
        self.page.get_by_role("button", name=name, exact=True).click()

    def goes_to(self, screen: str) -> None:
        """Open a screen by its tab."""
        self.page.get_by_role("tab", name=screen, exact=True).click()
        self._waits_for_paint()

    @property
    def status(self) -> str:
        return str(self.page.inner_text("#status .line"))

    def sees(self, words: str, where: str = "#status") -> None:
        """Wait until these words stand there; where they never do, say what this user sees instead."""
        from playwright.sync_api import TimeoutError

        try:
            self.page.locator(where).get_by_text(words).first.wait_for()
        except TimeoutError as error:
            seen = self.page.inner_text(where), self.page.locator(".toast-body").all_inner_texts(), self.heard
            raise AssertionError(f"no {words!r} in {where}, but {seen}") from error

    def waits_for_the_end(self) -> str:
        """Wait until nothing runs for this user; the status line."""
        self.page.wait_for_selector("#status .line:not(.running)")
        self.page.wait_for_function("() => !document.body.dataset.running")
        return self.status
