"""The page draws with the engine of the command line, shows what others wrote as text, and answers only its own."""

import base64
import functools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from ldm.bundle import Bundle
from ldm.errors import DataError, MachineError, SettingError
from ldm.formats.export_bundle import to_bundle
from ldm.formats.read import open_model
from ldm.images import read_settings, save_png
from ldm.pipeline import TextToImage
from ldm.request import GenerationRequest
from ldm.training.consistency import few_steps

gr = pytest.importorskip("gradio")

from starlette.responses import Response  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402
from starlette.types import Receive, Scope, Send  # noqa: E402

from ldm.ui import about, api, fields, guard, markup  # noqa: E402
from ldm.ui.axes import axis, sheets, table  # noqa: E402
from ldm.ui.compare import plan  # noqa: E402
from ldm.ui.history import History, search  # noqa: E402
from ldm.ui.info import changes, examine, read_text  # noqa: E402
from ldm.ui.models import Models  # noqa: E402
from ldm.ui.server import application, listen  # noqa: E402
from ldm.ui.showing import Shown, generate  # noqa: E402
from ldm.ui.studio import Studio  # noqa: E402
from ldm.ui.watching import View  # noqa: E402
from ldm.ui.worker import Place, State, Worker  # noqa: E402

HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def studio(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    made = Studio(Models(str(tiny_folder), []), tmp_path_factory.mktemp("outputs"), Worker())
    yield made
    made.worker.close(60)


@pytest.fixture(scope="module")
def client(studio: Studio) -> TestClient:
    return TestClient(application(studio), base_url="http://127.0.0.1:7860")


def typed(studio: Studio, **changed: object) -> dict[str, object]:
    """The fields of the Create screen after somebody typed something."""
    return {**fields.defaults("tiny", studio.models), **changed}


def drawn(studio: Studio, **changed: object) -> list[Shown]:
    return list(generate(studio, History(studio.outdir), "a", typed(studio, **changed)))


def written(folder: Path, name: str, settings: object) -> Path:
    """A PNG whose text is these settings as JSON, or this text as it is."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("ldm", settings if isinstance(settings, str) else json.dumps(settings))
    Image.new("RGB", (4, 4)).save(folder / name, pnginfo=text)
    return folder / name


def test_a_picture_appears_by_previews_and_is_the_engines_own(studio: Studio, tiny_bundle: Bundle) -> None:
    shown = drawn(studio, prompt="a red circle", steps=4, seed=5, seed_mode=fields.KEEP_SEED)
    assert any("data:image/jpeg" in (moment.stage or "") for moment in shown[:-1])
    last = shown[-1]
    assert last.pictures is not None and "Done in" in last.status and "seed 5" in last.status
    (known,) = TextToImage(tiny_bundle)(GenerationRequest(prompt="a red circle", steps=4, seed=5))
    path = last.pictures[0].path
    assert Image.open(path).tobytes() == known.image.tobytes()
    settings = read_settings(path)
    assert settings is not None and settings["prompt"] == "a red circle" and settings["model_sha256"]


def test_without_preview_only_the_words_change(studio: Studio) -> None:
    assert not any("data:image" in (moment.stage or "") for moment in drawn(studio, prompt="a star", preview=False))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt", " ", "prompt is empty; write what you want to see"),
        ("prompt", None, "prompt is empty"),
        ("negative_prompt", [HOSTILE], "is not text"),
        ("schedule", "karas", "did you mean &#x27;karras"),
        ("guidance_scale", math.nan, "not a number"),
        ("steps", 2.5, "not a whole number"),
        ("steps", "\ud800", "\\ud800 is not a whole number"),
        ("width", 65, "nearest: 64 or 80"),
        ("model", HOSTILE, "no model"),
        ("num_images", 5, "at most 4"),
    ],
)
def test_a_bad_field_is_named_and_nothing_is_drawn(studio: Studio, field: str, value: object, words: str) -> None:
    before = sorted(studio.outdir.iterdir())
    (shown,) = drawn(studio, **{"prompt": "a star", field: value})
    assert words in shown.status and 'data-state="failed"' in shown.status and HOSTILE not in shown.status
    assert "--" not in shown.status, "words of the command line"
    assert shown.stage is None and sorted(studio.outdir.iterdir()) == before


def test_every_text_from_outside_is_escaped(tmp_path: Path) -> None:
    path = written(tmp_path, f"0001-{'x'}.png", {"prompt": HOSTILE, HOSTILE: HOSTILE})
    history = History(tmp_path)
    picture = markup.Picture(0, path, {"seed": HOSTILE})
    made = [
        markup.status(HOSTILE, detail=HOSTILE, field=HOSTILE),
        markup.failure(HOSTILE),
        markup.stage(1, [picture], alt=HOSTILE),
        markup.links([picture]),
        markup.thumbnails(history.entries(), HOSTILE),
        markup.thumbnails([], HOSTILE),
        markup.table(examine(read_text(path)).ignored.items(), HOSTILE),
        markup.changes_table([(HOSTILE, HOSTILE, HOSTILE)]),
    ]
    assert [text for text in made if "<img src=x" in text] == []


def test_shape_and_quality_follow_the_models_size(studio: Studio) -> None:
    config = studio.models.config("tiny")  # 64×64 in multiples of 16
    assert [fields.size_of_shape(shape, config) for shape in fields.SHAPES] == [(64, 64), (48, 80), (80, 48)]
    assert fields.shape_of_size(48, 80, config) == "Portrait" and fields.shape_of_size(64, 96, config) is None
    assert [fields.steps_of_quality(quality, config) for quality in fields.QUALITIES] == [2, 4, 8]  # its own is 4
    quality = [fields.quality_of_steps(steps, "tiny", studio.models) for steps in (8, 5)]
    assert quality == ["Best", None]


def test_fast_is_the_few_step_model_that_shares_networks_with_the_chosen_one(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    whole = tiny_bundle.save(tmp_path / "whole")
    opened = open_model(whole)
    to_bundle(tmp_path / "whole-lcm", few_steps(opened.config), opened.parts, sharing="whole")
    to_bundle(tmp_path / "alone-lcm", few_steps(opened.config), opened.parts)
    (tmp_path / "alone-lcm" / "manifest.json").unlink()
    models = Models(str(whole), [tmp_path])
    assert "alone-lcm" in models.names
    assert models.few_steps == {"whole": "whole-lcm", "emoji-256": "emoji-256-lcm"}
    distilled = {"model": "whole-lcm", "steps": 4, "sampler": "lcm", "schedule": "leading", "guidance_scale": 1.0}
    assert fields.of_quality("Fast", "whole", models) == distilled
    assert fields.of_quality("Fast", "whole-lcm", models) == {"steps": 4}
    assert fields.of_quality("Best", "whole", models) == {"steps": 8}
    own = fields.defaults("whole", models)
    for quality, steps in (("Balanced", 4), ("Best", 8)):  # back to the whole model, as it wants to be drawn with
        assert fields.of_quality(quality, "whole-lcm", models) == {name: own[name] for name in distilled} | {
            "steps": steps
        }
    assert [fields.quality_of_steps(steps, "whole-lcm", models) for steps in (4, 8)] == ["Fast", None]
    assert [fields.quality_of_steps(steps, "whole", models) for steps in (2, 4, 8)] == [None, "Balanced", "Best"]
    assert fields.of_quality("Fast", "shapes-256", models) == {"steps": 8}, "one without has half of its own steps"
    with pytest.raises(SettingError, match="no quality"):
        fields.of_quality("Fastest", "whole", models)

    studio = Studio(models, tmp_path / "outputs", Worker())
    try:
        planned = plan(studio, ("Quality", "Fast, Best", "nothing", ""), {"prompt": "a circle"}, "whole")
        drawn = [(order.model, order.request.sampler, order.request.steps) for order in planned.orders]
        assert drawn == [("whole-lcm", "lcm", 4), ("whole", own["sampler"], 8)]
        planned = plan(studio, ("Quality", "Fast, Best", "Sampler", "ddim"), {"prompt": "a circle"}, "whole")
        drawn = [(order.model, order.request.sampler, order.request.steps) for order in planned.orders]
        assert drawn == [("whole", "ddim", 2), ("whole", "ddim", 8)], "the other axis says with what it is drawn"
    finally:
        studio.worker.close(60)


def test_waiting_and_progress_are_said_in_words() -> None:
    def said(state: State, ahead: int = 0, begins: float | None = None, done: float = 0.0, total: int = 1) -> str:
        view = View(state, Place(ahead, begins), 1, total, 12, 30, done, 12.0, "", ())
        return re.sub("<[^>]*>", "", markup.progress(view))

    assert said(State.WAITING, 2, 14.2) == "You are 2nd in line · about 14 s"
    assert said(State.WAITING, 13) == "You are 13th in line" and said(State.WAITING, 21) == "You are 21st in line"
    assert said(State.RUNNING, done=0.8) == "Drawing · step 12 of 30 · about 3 s left"
    assert said(State.RUNNING, total=4, done=0.1) == "Image 2 of 4 · step 12 of 30 · about 2 min left"
    assert "in line" not in said(State.WAITING)  # about to begin


def test_about_says_what_is_loaded_and_where(studio: Studio) -> None:
    studio.models.engine("tiny")
    facts = about.facts(studio)
    for words in ("tiny", studio.models.engine("tiny").bundle.sha256, "cpu, float32", str(studio.outdir), "gradio "):
        assert words in facts
    assert about.card(studio) == "The model tiny brings no card."
    card = studio.models.offers["tiny"].path / about.MODEL_CARD
    card.write_text("# The card", encoding="utf-8")
    assert about.card(studio) == "# The card"
    card.unlink()


def test_tokens_are_counted_and_the_words_that_are_not_read_are_named(studio: Studio) -> None:
    config = studio.models.config("tiny")
    assert fields.tokens("", config) == (0, 14, "")
    count, room, cut = fields.tokens("red " * 14 + "circle <end_of_text> star", config)
    assert count > room == 14 and cut.startswith("circle") and cut.endswith("star")


# History and PNG info


def test_history_has_every_picture_of_the_folder_and_nothing_else(tmp_path: Path) -> None:
    for name, prompt in (("0001-a.png", "a red circle"), ("mine.png", "a blue star")):
        save_png(Image.new("RGB", (4, 4)), tmp_path / name, {"prompt": prompt, "model": "tiny"})
        os.utime(tmp_path / name, (len(name), len(name)))
    for name in ("page.html", ".hidden.png", "0001-a.step004.png", "0002-x.png.part"):
        (tmp_path / name).write_text("x")
    (tmp_path / "link.png").symlink_to("/etc/passwd")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    entries = History(tmp_path).entries()
    assert [entry.name for entry in entries] == ["broken.png", "0001-a.png", "mine.png"]
    assert [entry.name for entry in search(entries, "CIRCLE red")] == ["0001-a.png"]
    assert search(entries, "red", model="other") == [] == search(entries, starred=True)


def test_stars_stay_and_the_trash_takes_no_name_twice(tmp_path: Path) -> None:
    for _ in range(2):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "0001-a.png", {"prompt": "a"})
        History(tmp_path).star("0001-a.png")
        moved = History(tmp_path).trash("0001-a.png")
        History(tmp_path)
    assert moved.name == "0001-a.2.png" and (tmp_path / ".trash" / "0001-a.png").exists()
    assert History(tmp_path).entries() == []


@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd", "..", ".stars", ".x.png", "a/b.png", "x\0.png", "no.png"])
def test_a_name_that_is_no_picture_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path.parent / "x.png").write_bytes(b"")
    with pytest.raises(DataError):
        History(tmp_path).find(name)


def test_settings_of_a_picture_come_back_and_say_what_they_change(studio: Studio) -> None:
    shown = drawn(studio, prompt="a red circle", steps=3, seed=7, seed_mode=fields.KEEP_SEED)
    assert shown[-1].pictures is not None
    text = read_text(shown[-1].pictures[0].path)
    settings = json.loads(text)
    info = examine(text, {settings["model_sha256"]: "tiny"})
    assert info.model == "tiny" and "steps" in info.usable
    assert [key for key, *_ in changes(info, typed(studio, prompt="a red circle", seed=8))] == ["steps", "seed"]
    made = fields.from_picture(info.usable, info.model, studio.models)
    again = drawn(studio, **made)[-1].pictures
    assert again is not None
    assert Image.open(again[0].path).tobytes() == Image.open(shown[-1].pictures[0].path).tobytes()


@pytest.mark.parametrize(
    ("settings", "usable"),
    [
        ({"prompt": HOSTILE, "outdir": "/etc", "model": "/etc/passwd"}, {"prompt"}),
        ({"prompt": "a", "steps": 1e9, "guidance_scale": "nan", "seed": -5}, {"prompt"}),
        ({"prompt": ["a"], "width": "wide"}, set()),
        ("[" * 90_000, set()),
        ("{not json", set()),
        ("[1, 2]", set()),
        ("a star\nSteps: 20, Sampler: Euler a, Seed: 5", set()),  # as AUTOMATIC1111 writes it
    ],
)
def test_a_hostile_picture_gives_only_valid_settings(tmp_path: Path, settings: object, usable: set[str]) -> None:
    info = examine(read_text(written(tmp_path, "x.png", settings)))
    assert set(info.usable) == usable and info.model == ""


def test_files_that_are_no_small_png_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"<svg/>")
    Image.new("1", (13_000, 13_000)).save(tmp_path / "b.png")
    written(tmp_path, "c.png", "x" * 200_000)
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(DataError, match="picture: "):
            read_text(tmp_path / name)


# Compare


def test_a_table_has_a_cell_for_each_pair_and_one_seed_for_all() -> None:
    cells = table(axis("Guidance", "1, 4"), axis("Prompt word", "circle, star"), {"prompt": "a circle", "seed": -1})
    assert [(cell["guidance_scale"], cell["prompt"]) for cell in cells] == [
        ("1", "a circle"), ("4", "a circle"), ("1", "a star"), ("4", "a star"),
    ]  # fmt: skip
    assert len({cell["seed"] for cell in cells}) == 1 and cells[0]["seed"] != -1


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (("Steps", ""), ("nothing", ""), "steps: no values"),
        (("Steps", "1, 1"), ("nothing", ""), "given twice"),
        (("Steps", "1, x"), ("nothing", ""), "not a whole number"),
        (("Steps", "1, 2"), ("Steps", "3"), "on both axes"),
        (("Quality", "Balanct"), ("nothing", ""), "did you mean 'Balanced'"),
        (("Quality", "Fast"), ("Steps", "3"), "quality: it is on both axes"),
        (("Sampler", "eulr"), ("nothing", ""), "did you mean 'euler'.*Create screen"),
        (("Stepz", "1"), ("nothing", ""), "axis: no axis 'Stepz' .did you mean 'Steps'"),
        (("Prompt word", "square, star"), ("nothing", ""), "not in the prompt"),
        (("Model", "/etc/passwd"), ("nothing", ""), "no model"),
        (("Seed", ",".join(map(str, range(65)))), ("nothing", ""), "65 pictures are too many"),
    ],
)
def test_a_bad_axis_is_refused(studio: Studio, x: tuple[str, str], y: tuple[str, str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        plan(studio, (*x, *y), {"prompt": "a circle", "seed": 1}, "tiny")


def test_a_quality_is_the_number_of_steps_of_each_cells_model(studio: Studio) -> None:
    planned = plan(studio, ("Quality", "fast, Best", "nothing", ""), {"prompt": "a circle", "steps": 7}, "tiny")
    assert [order.request.steps for order in planned.orders] == [2, 8]
    planned = plan(studio, ("Model", "tiny, shapes-256", "Quality", "Balanced"), {"prompt": "a circle"}, "tiny")
    own = [studio.models.config(name).sampling.steps for name in ("tiny", "shapes-256")]
    assert [order.request.steps for order in planned.orders] == own and own[0] != own[1]


def test_sheets_have_every_picture_at_its_place_and_at_most_32_megapixels() -> None:
    x, y = axis("Steps", "1,2"), axis("Seed", "1,2,3")
    colours = [(index * 40, 0, 0) for index in range(6)]
    (sheet,) = sheets(x, y, [Image.new("RGB", (64, 64), colour) for colour in colours])
    centres = [sheet.getpixel((120 + column * 64 + 32, 28 + row * 64 + 32)) for row in range(3) for column in range(2)]
    assert centres == colours
    many = sheets(x, y, [Image.new("RGB", (2048, 2048)), *[None] * 5])
    assert len(many) == 1 or all(one.width * one.height <= 32_000_000 for one in many)
    large = sheets(x, axis("Seed", "1,2,3,4,5"), [Image.new("RGB", (2048, 2048)), *[None] * 9])
    assert len(large) > 1 and all(one.width * one.height <= 32_000_000 for one in large)


# The server


def test_pictures_are_served_by_name_and_nothing_else_is(studio: Studio, client: TestClient) -> None:
    path = written(studio.outdir, "9000-served.png", {"prompt": "x"})
    (studio.outdir / "page.html").write_text("<script>alert(1)</script>")
    answer = client.get("/pictures/9000-served.png")
    assert answer.status_code == 200 and answer.content == path.read_bytes()
    assert answer.headers["content-type"] == "image/png" and answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/thumbs/9000-served.png").headers["content-type"] == "image/jpeg"
    for name in ("page.html", "../app.py", "..%2f..%2fetc%2fpasswd", "%2e%2e/app.py", ".stars", "9000-served.png%00"):
        assert client.get(f"/pictures/{name}").status_code in (403, 404), name
        assert client.get(f"/thumbs/{name}").status_code in (403, 404), name
    root = Path(__file__).parent.parent
    for target in ("/etc/passwd", f"{root}/app.py", f"{root}/README.md", str(path), "http://169.254.169.254/", ".."):
        answer = client.get(f"/gradio_api/file={target}")
        assert answer.status_code in (403, 404), (target, answer.status_code)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[x"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 403),
    ],
)
def test_only_pages_of_this_server_are_answered(client: TestClient, headers: dict[str, str], status: int) -> None:
    assert client.get("/alive", headers=headers).status_code == status
    call = {"data": [], "fn_index": 0, "session_hash": "x"}
    assert (client.post("/gradio_api/queue/join", json=call, headers=headers).status_code == 403) == (status == 403)


def test_a_password_is_asked_for_everywhere(studio: Studio) -> None:
    guarded = TestClient(application(studio, any_address=True, password="ada:secret"), base_url="http://10.1.2.3")
    good = {"authorization": "Basic " + base64.b64encode(b"ada:secret").decode()}
    bad = {"authorization": "Basic " + base64.b64encode(b"ada:wrong").decode()}
    for path in ("/", "/alive", "/pictures/x.png", "/config", "/gradio_api/info"):
        assert guarded.get(path).status_code == guarded.get(path, headers=bad).status_code == 401, path
    assert guarded.get("/alive", headers=good).status_code == 200


def test_the_page_may_ask_nobody_else(client: TestClient) -> None:
    answer = client.get("/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False and not config.get("run_history")


def test_a_large_upload_is_refused(client: TestClient) -> None:
    assert guard.MAX_UPLOAD == 20 * 1024 * 1024
    sizes = {20 * 1024 * 1024: 200, 20 * 1024 * 1024 + 1: 413, 21 * 1024 * 1024: 413}
    for size, status in sizes.items():
        answer = client.post("/gradio_api/upload", files={"files": ("x.png", b"x" * size)})
        assert answer.status_code == status, size


def test_uploads_within_an_hour_have_a_limit_and_other_requests_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(guard, "monotonic", lambda: now)
    monkeypatch.setattr(guard, "MAX_UPLOADS", 2500)

    async def inside(scope: Scope, receive: Receive, send: Send) -> None:
        await Response("in")(scope, receive, send)

    client = TestClient(guard.Guard(inside), base_url="http://127.0.0.1:7860")

    def answer(path: str, content: Any) -> int:
        return client.post(f"/gradio_api/{path}", content=content).status_code

    assert [answer("upload", b"x" * 1000) for _ in range(3)] == [200, 200, 413]
    now = guard.UPLOADS_KEPT_SECONDS + 1.0
    assert answer("upload", b"x" * 1000) == 200
    assert answer("upload", iter([b"x"])) == 411  # who does not say how much
    assert [answer("run/predict", b"x" * (guard.MAX_BODY + more)) for more in (0, 1)] == [200, 413]


def test_the_endpoints_have_the_command_lines_names(client: TestClient) -> None:
    endpoints = client.get("/gradio_api/info").json()["named_endpoints"]
    assert set(endpoints) == {"/txt2img", "/compare", "/info"}
    names = {parameter["parameter_name"] for parameter in endpoints["/txt2img"]["parameters"]}
    # The page draws one picture after the other, whatever is asked for.
    assert names == set(GenerationRequest.model_fields) - {"batch_size", "batch_exact"} | {"model"}


def test_a_program_may_ask_for_what_the_command_line_may(studio: Studio, tiny_bundle: Bundle) -> None:
    asked: dict[str, Any] = {
        "negative_prompt": "a blue star", "guidance_scale": 3.0, "sampler": "euler_ancestral", "sigmas": "14,3,0.5,0",
        "convention": "exact", "guidance_rescale": 0.5, "guidance_interval": [0.2, 20.0], "perp_neg": 1.0,
        "rng": "philox", "reuse": 2, "seed": 5,
    }  # fmt: skip
    draw = functools.partial(api.Endpoints(studio, History(studio.outdir)).txt2img, gr.Request(session_hash="a"))
    (picture,) = draw("a red circle", **asked)
    (known,) = TextToImage(tiny_bundle)(GenerationRequest(prompt="a red circle", **asked))
    assert Image.open(str(picture["file"])).tobytes() == known.image.tobytes()
    assert picture["settings"] == known.settings
    for name, value, words in (
        ("convention", "comfy", "convention: no convention 'comfy'"),
        ("guidance_interval", "3,0.2", "guidance_interval: 3,0.2 is not LOW,HIGH"),
        ("timesteps", [1, 2], "timesteps: the numbers do not fall"),
    ):
        with pytest.raises(gr.Error, match=words):
            draw("a red circle", **{**asked, "sigmas": None, name: value})


def test_a_taken_port_is_said_and_the_next_one_found() -> None:
    first = listen("127.0.0.1", None)
    port = first.getsockname()[1]
    with pytest.raises(MachineError, match=f"port: 127.0.0.1:{port}: .*use another --port, for example {port + 1}"):
        listen("127.0.0.1", port)
    second = listen("127.0.0.1", None)
    assert second.getsockname()[1] > port
    first.close()
    second.close()
