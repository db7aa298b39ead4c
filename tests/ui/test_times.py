"""How long a person waits, on a model of the bundle's size; to be run on a machine that does nothing else."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import Server, User

pytestmark = [pytest.mark.browser, pytest.mark.slow]

STEP = 0.3
NOTE_FIRST_FRAME = """() => {
  window.times = {};
  new MutationObserver(() => {
    const now = performance.now(), words = document.querySelector("#status").textContent;
    if (!window.times.feedback && document.querySelector("#status .line.running")) window.times.feedback = now;
    if (!window.times.frame && document.querySelector("#stage img.soft")) {
      window.times.frame = now;
      window.times.words = words;
    }
  }).observe(document.body, { childList: true, subtree: true, attributes: true });
  const button = document.querySelector("#generate");
  button.addEventListener("click", () => { window.times.click = performance.now(); }, true);
}"""


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page on the bundled model, at its own pace."""
    made = Server(outdir=tmp_path_factory.mktemp("outputs")).start()
    yield made
    assert made.end() in (0, -signal.SIGTERM)


@pytest.fixture(scope="module")
def paced(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page on the tiny model, whose steps take 0.3 s."""
    flags = ("--model", tiny_folder, "--step-seconds", str(STEP))
    made = Server(*flags, outdir=tmp_path_factory.mktemp("outputs")).start()
    yield made
    made.end()


def test_the_first_page_can_be_used_in_a_second_and_a_half(chromium: Any, bundled: Server) -> None:
    user = User(chromium, bundled.address)
    began = time.monotonic()
    user.opens()
    seconds = time.monotonic() - began
    print(f"usable after {seconds:.2f} s")
    user.context.close()
    assert seconds <= 1.5


def test_feedback_comes_at_once_and_the_first_frame_before_the_second_step(chromium: Any, paced: Server) -> None:
    user = User(chromium, paced.address).opens().writes("a star", steps=8)
    user.page.evaluate(NOTE_FIRST_FRAME)
    user.presses("Generate")
    user.waits_for_the_end()
    times = user.page.evaluate("window.times")
    print(f"feedback {times['feedback'] - times['click']:.0f} ms, frame {times['frame'] - times['click']:.0f} ms")
    user.context.close()
    assert times["feedback"] - times["click"] <= 200
    assert "step 1 of 8" in times["words"]


def test_stop_is_idle_after_one_step_and_half_a_second(chromium: Any, paced: Server) -> None:
    user = User(chromium, paced.address).opens().writes("a star", steps=60)
    user.presses("Generate")
    user.page.wait_for_selector("#stage img.soft")
    began = time.monotonic()
    user.presses("Stop")
    user.waits_for_the_end()
    seconds = time.monotonic() - began
    print(f"idle after {seconds:.2f} s, a step is {STEP} s")
    user.context.close()
    assert seconds <= STEP + 0.5


def run(server: Server, preview: bool) -> tuple[float, int]:
    """Press Generate as the page does, but without a browser; seconds until the end, and the frames that came."""
    config = httpx.get(server.address + "config").json()
    button = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "generate")
    (event,) = (one for one in config["dependencies"] if [button, "click"] in map(list, one["targets"]))
    settings = ["ddim", "trailing", 4.0, 1, "Keep", 256, 256, preview]
    data = ["a red circle", "", "Square", None, 30, 1, "shapes-256", *settings]
    session = f"times{time.monotonic_ns()}"
    began, frames = time.monotonic(), 0
    join = {"data": data, "fn_index": event["id"], "session_hash": session}
    httpx.post(server.address + "gradio_api/queue/join", json=join).raise_for_status()
    stream = server.address + f"gradio_api/queue/data?session_hash={session}"
    with httpx.stream("GET", stream, timeout=120) as answer:
        for line in answer.iter_lines():
            frames += "data:image/jpeg" in line
            if "process_completed" in line:
                assert "Done in" in line
                return time.monotonic() - began, frames
    raise AssertionError("the stream ended before the picture was done")


def test_previews_add_five_percent_at_most(bundled: Server) -> None:
    run(bundled, True)
    pairs = [(run(bundled, False), run(bundled, True)) for _ in range(5)]
    assert all(not bare[1] and shown[1] >= 3 for bare, shown in pairs)
    # The fastest of each: what else the machine does only ever adds.
    bare, shown = (min(pair[which][0] for pair in pairs) for which in (0, 1))
    print(f"without previews {bare:.2f} s, with them {shown:.2f} s: {shown / bare - 1:+.1%}")
    assert shown <= 1.05 * bare
