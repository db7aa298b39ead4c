"""What a real server does with requests that no page sends: wrong, large, slow, or in somebody else's name."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Server

gradio_client = pytest.importorskip("gradio_client")

import httpx  # noqa: E402
from PIL import Image  # noqa: E402

from ldm.images import save_png  # noqa: E402
from ldm.ui.about import CLIENT  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
SENT = "sent7f3a"  # so that it is found in a log
WRONG: tuple[object, ...] = (
    None, True, -1, 2.5, 10**30, float("nan"), float("inf"), "", SENT, f"<b>{SENT}</b>\r\n", "\ud800", SENT * 1000,
    [], [SENT, [SENT]], {}, {"__type__": "update", "value": SENT}, {"name": SENT}, {"name": ["0", None]},
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, {"path": f"http://169.254.169.254/{SENT}"},
    list(range(20_000)), json.loads("[" * 200 + "]" * 200),
)  # fmt: skip


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.address}gradio_api/", timeout=180) as client:
        yield client


def functions(server: Server) -> list[dict[str, Any]]:
    """Everything that a page or a program can call, as the server describes it."""
    return list(httpx.get(f"{server.address}config", timeout=180).json()["dependencies"])


def asked(http: httpx.Client, function: int, data: list[object], **more: object) -> httpx.Response:
    body = {"data": data, "fn_index": function, "session_hash": "somebody", **more}
    return http.post("run/predict", content=json.dumps(body), headers={"content-type": "application/json"})


def body(chance: random.Random, functions: list[dict[str, Any]], number: int) -> tuple[str, str]:
    """A path and a body, one of which is wrong in some way, or both."""
    one = chance.choice(functions)
    right = len(one["inputs"])
    count = chance.choice([right, right, right, 0, right + 1, right + 100, max(0, right - 1)])
    data = [chance.choice(WRONG) for _ in range(count)]
    named = {name: chance.choice(WRONG) for name in chance.sample(["prompt", "x", "y", "seed", SENT, "name"], 3)}
    about = {"session_hash": f"fuzz{number % 7}", "event_data": chance.choice(WRONG), "trigger_id": one["id"]}
    joined = {"data": data, "fn_index": chance.choice([one["id"]] * 9 + [9999]), **about}
    path, content = chance.choice(
        [
            ("run/predict", joined),
            ("queue/join", joined),
            ("queue/join", {key: joined[key] for key in chance.sample(sorted(joined), 2)}),
            (f"call/{chance.choice(['txt2img', 'compare', 'info', 'nothing'])}", {"data": data}),
            (f"call/v2/{chance.choice(['txt2img', 'compare', 'info', 'nothing'])}", named),
            ("component_server", {**about, "component_id": chance.choice(WRONG), "fn_name": SENT, "data": SENT}),
            ("cancel", {**about, "fn_index": 1, "event_id": SENT}),
            ("reset", {"event_id": chance.choice(WRONG)}),
        ]
    )
    text = json.dumps(content)
    return path, text[: chance.choice([len(text)] * 9 + [len(text) // 2])]


@pytest.mark.slow
def test_three_hundred_wrong_requests_leave_a_server_that_draws_and_a_log_without_them(
    server: Server, http: httpx.Client
) -> None:
    chance, known, before = random.Random(0), functions(server), len(server.said())
    for number in range(300):
        path, content = body(chance, known, number)
        answer = http.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code < 600
        if number % 10 == 0:  # a stream that nobody has
            http.get("queue/data", params={"session_hash": f"nobody{number}"})
    assert server.process is not None and server.process.poll() is None
    (picture,) = gradio_client.Client(server.address, verbose=False).predict(
        "a star", steps=2, seed=5, api_name="/txt2img"
    )
    assert picture["seed"] == 5 and Path(picture["file"]).is_file()
    said = server.said()[before:]
    assert [line for line in said.splitlines() if not line.startswith("refused: ")] == []
    assert len(said.splitlines()) > 100 and SENT not in said


def test_what_is_wrong_with_a_request_is_answered_in_a_line(server: Server, http: httpx.Client) -> None:
    (draw,) = (one for one in functions(server) if one["api_name"] == "txt2img")
    count = len(draw["inputs"])
    error = asked(http, draw["id"], ["a star"]).json()["error"]
    assert error == f"txt2img: 1 values were sent where it takes {count}; reload the page, or see its API"
    error = asked(http, draw["id"], ["a star", *[None] * (count - 1)]).json()["error"]
    assert error.startswith("negative_prompt: None is not text; ")
    assert "no such thing" in asked(http, 9999, []).text


def test_files_of_the_machine_are_not_read_by_naming_them_as_uploads(
    server: Server, http: httpx.Client, tmp_path: Path
) -> None:
    save_png(Image.new("RGB", (4, 4)), tmp_path / "x.png", {"prompt": SENT})
    config = httpx.get(f"{server.address}config", timeout=180).json()
    files = {part["id"] for part in config["components"] if part["type"] == "file"}
    readers = [one for one in config["dependencies"] if files & set(one["inputs"])]
    assert len(readers) >= 3
    for one in readers:
        for path in (str(tmp_path / "x.png"), "http://127.0.0.1:1/x.png", "file:///x.png", "../x.png", "/etc/passwd"):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            answer = asked(http, one["id"], [file if part in files else None for part in one["inputs"]])
            assert answer.status_code == 500 and SENT not in answer.text, (path, answer.text)
            assert re.search("not of the kind it takes|Invalid file type", answer.json()["error"])


def test_what_one_page_runs_is_not_stopped_by_others(server: Server, http: httpx.Client) -> None:
    client = gradio_client.Client(server.address, verbose=False)
    job = client.submit("a star", steps=20, seed=6, api_name="/txt2img")
    stops = [one["id"] for one in functions(server) if not one["inputs"] and not one["outputs"]]  # Stop and Skip
    assert len(stops) >= 3
    while not job.done():
        for stop in stops:
            asked(http, stop, [])
            asked(http, stop, [], session_hash=None)
        time.sleep(0.1)
    assert job.result()[0]["seed"] == 6


@pytest.mark.slow
def test_a_large_upload_is_refused_and_a_slow_one_holds_nobody_up(server: Server) -> None:
    def upload(length: int) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=180)
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {length}\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n".encode())
        return connection

    with upload(25 * 2**20) as large:
        assert large.recv(100).startswith(b"HTTP/1.1 413 ")
    slow = [upload(2**20) for _ in range(60)]  # more than there are threads
    try:
        for path in ("", "alive", "config"):
            assert httpx.get(f"{server.address}{path}", timeout=180).status_code == 200
    finally:
        for connection in slow:
            connection.close()


@pytest.mark.slow
def test_two_hundred_small_uploads_leave_a_server_that_answers(server: Server, http: httpx.Client) -> None:
    slowest = 0.0
    for number in range(200):
        answer = http.post("upload", files={"files": (f"{number}.png", f"{number}".encode())})
        assert answer.status_code == 200
        if number % 20 == 0:
            began = time.monotonic()
            assert httpx.get(server.address, timeout=180).status_code == 200
            slowest = max(slowest, time.monotonic() - began)
    print(f"the page in {slowest:.2f} s at most")
    kept = sum(path.stat().st_size for path in server.cache.rglob("*") if path.is_file())
    assert kept < 2**20


@pytest.mark.slow
def test_the_client_on_the_about_screen_runs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    exec(CLIENT.replace("http://127.0.0.1:7860", server.address), {})
    printed = capsys.readouterr().out.splitlines()[-1]
    assert ".png" in printed and "'prompt': 'a red circle'" in printed
    assert CLIENT in (ROOT / "docs/app.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--listen",), ("--listen", "--auth", "ada:secret")])
def test_the_app_opens_warns_where_everybody_may_draw_and_leaves_nothing_behind(
    tiny_folder: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, ROOT / "app.py", "--model", tiny_folder, "--outdir", tmp_path / "out", "--device", "cpu"]
    started = subprocess.Popen(
        [*command, "--port", str(port), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TMPDIR": str(temporary)},
    )  # fmt: skip
    assert started.stdout is not None
    line = started.stdout.readline()
    try:
        assert line == f"Open http://{'localhost' if flags else '127.0.0.1'}:{port} in a browser\n"
        address = f"http://127.0.0.1:{port}/"
        assert httpx.get(address, timeout=180).status_code == (401 if "--auth" in flags else 200)
        foreign = httpx.get(address, headers={"Host": "192.0.2.1"}, timeout=180).status_code
        assert foreign == {(): 403, ("--listen",): 200}.get(flags, 401)
    finally:
        started.send_signal(signal.SIGTERM)
        _, said = started.communicate(timeout=180)
    assert started.returncode == 128 + signal.SIGTERM
    assert ("warning: host: everybody" in said) == (flags == ("--listen",)), said
    assert len(said.splitlines()) <= 1 and list(temporary.iterdir()) == []


@pytest.mark.slow
def test_five_hundred_pictures_leave_nothing_in_memory_or_open(tiny_folder: Path, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    server = Server("--model", tiny_folder, "--step-seconds", "0.005", outdir=tmp_path / "outputs").start()
    try:
        assert server.process is not None
        process, client = psutil.Process(server.process.pid), gradio_client.Client(server.address, verbose=False)
        began = time.monotonic()
        for number in range(500):
            if number == 50:  # everything that is made once is there
                memory, files, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
            client.predict("a star", steps=2, seed=number, api_name="/txt2img")
        grown = (process.memory_info().rss - memory) / 2**20
        print(f"{time.monotonic() - began:.0f} s, {grown:+.1f} MiB, {process.num_fds() - files:+d} files")
        assert grown < 50 and process.num_fds() <= files + 2 and process.num_threads() <= threads + 2
        assert httpx.get(f"{server.address}gradio_api/queue/status").json()["queue_size"] == 0
        assert len(server.pictures()) == 500 and not list(server.cache.rglob("*.*"))
        assert re.findall("Traceback|bug", server.said()) == []
    finally:
        assert server.end() in (0, -signal.SIGTERM)
