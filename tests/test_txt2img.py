"""scripts/txt2img.py: from a command line to pictures with their settings inside."""

import io
import json
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Ended, command, environment, start
from PIL import Image

from ldm import images, outputs
from ldm.bundle import Bundle
from ldm.images import read_settings
from ldm.pipeline import TextToImage
from ldm.request import GenerationRequest

Script = Callable[..., Ended]


def seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow  # means something on a quiet machine only; what it must not import is below
def test_help_is_quick() -> None:
    spent = []
    for _ in range(3):
        before = seconds_of_children()
        assert start("txt2img.py", "--help").code == 0
        spent.append(seconds_of_children() - before)
    assert min(spent) < 0.3, spent


def test_help_is_complete() -> None:
    ended = start("txt2img.py", "--help")
    assert ended.code == 0
    positions = [ended.out.index(word) for word in ("examples:", "basic:", "advanced:", "output:")]
    assert positions == sorted(positions)
    assert ended.out.count("python scripts/txt2img.py") == 2
    assert "--ddim_steps" not in ended.out
    assert all(name in ended.out for name in ("euler_ancestral", "karras"))


def imported(*flags: str) -> subprocess.CompletedProcess[str]:
    """The script, telling on stderr what it imports."""
    words = [sys.executable, "-X", "importtime", *command("txt2img.py", *flags)[1:]]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_help_does_without_numpy() -> None:
    ended = imported("--help")
    assert ended.returncode == 0 and " ldm.request" in ended.stderr
    assert " numpy" not in ended.stderr and " torch" not in ended.stderr


def test_wrong_setting_is_refused_without_importing_torch() -> None:
    ended = imported("-p", "x", "--steps", "0")
    assert ended.returncode == 2
    modules = {line.rsplit("|", 1)[1].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "ldm.request" in modules
    assert not modules & {"torch", "open_clip", "PIL", "tqdm"}


def test_last_line_of_stdout_is_the_picture(tiny_folder: Path, tmp_path: Path) -> None:
    """The real script in its own process: the one path that users take."""
    outdir = tmp_path / "new" / "out"
    ended = start("txt2img.py", "-p", "a red circle", "--model", tiny_folder, "--outdir", outdir, "--seed", "3")
    assert (ended.code, ended.errors) == (0, []), ended.err
    assert ended.out == f"{outdir / '0001-a-red-circle.png'}\n"
    assert "seed: 3" in ended.err and "1 image in" in ended.err
    assert "\r" not in ended.err and "it/s" not in ended.err, "a progress bar is for terminals only"
    with Image.open(ended.out.strip()) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_settings_in_the_picture_draw_the_same_pixels(txt2img: Script, tiny_folder: Path, tmp_path: Path) -> None:
    first = txt2img("-p", "a \x1b[31mred\x07 👩‍🚀", "--model", tiny_folder, "--outdir", tmp_path, "--steps", "3")
    assert first.code == 0
    assert "warning: prompt: control characters were removed" in first.err
    path = Path(first.out.strip())
    stored = read_settings(path)
    assert stored is not None
    assert stored["prompt"] == "a red 👩‍🚀" and stored["model"] == "tiny"
    assert f"seed: {stored['seed']}" in first.err
    assert str(tmp_path) not in json.dumps(stored), "a picture does not tell the folders of its maker"
    request, _ = GenerationRequest.from_settings(stored)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in request.settings().items() if value is not False]
    second = txt2img(*flags, "--model", tiny_folder, "--outdir", tmp_path)
    assert second.code == 0, second.err
    with Image.open(path) as one, Image.open(second.out.strip()) as two:
        assert one.tobytes() == two.tobytes()
    assert path.read_bytes() == Path(second.out.strip()).read_bytes()


def test_several_prompts_images_and_json_lines(
    txt2img: Script, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"from stdin\r\n\r\n")))
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n", encoding="utf-8-sig")
    ended = txt2img(
        *("-p", "../CON", "-p", "-", "--from-file", file, "--model", tiny_folder, "--outdir", tmp_path / "out"),
        *("--seed", "4294967295", "-n", "2", "--steps", "1", "--json", "--quiet"),
    )
    assert (ended.code, ended.err) == (0, "")
    lines: list[dict[str, Any]] = [json.loads(line) for line in ended.out.splitlines()]
    names = [Path(line["path"]).name for line in lines]
    assert names == [
        *("0001-con_.png", "0002-con_.png"),
        *("0003-from-stdin.png", "0004-from-stdin.png"),
        *("0005-a-red-circle.png", "0006-a-red-circle.png"),
    ]
    assert [line["seed"] for line in lines] == [4294967295, 0] * 3
    assert [line["settings"]["seed"] for line in lines] == [4294967295, 0] * 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_a_grid_has_every_picture_at_its_place(txt2img: Script, tiny_folder: Path, tmp_path: Path) -> None:
    asked = ("-p", "a star", "-p", "a moon", "--model", tiny_folder, "--outdir", tmp_path, "--steps", "1")
    sheet = tmp_path / "new" / "all.png"
    ended = txt2img(*asked, "--num-images", "3", "--batch-size", "2", "--grid", sheet)
    assert ended.code == 0 and len(ended.out.split()) == 6, ended.err
    with Image.open(sheet) as image:
        assert image.size == (3 * 64 + 2 * 4, 2 * 64 + 4)
        for place, path in enumerate(ended.out.split()):
            row, column = divmod(place, 3)
            corner = 68 * column, 68 * row
            with Image.open(path) as one:
                assert image.crop((*corner, corner[0] + 64, corner[1] + 64)).tobytes() == one.tobytes()
    again = txt2img(*asked, "--grid", sheet)
    assert again.code == 2 and again.errors == [
        f"error: grid: {sheet} exists and is never overwritten; give another name or remove it"
    ]
    alone = ("-p", "a star", "--model", tiny_folder, "--output", tmp_path / "one.png")
    for name in (tmp_path / "one.png", f"{tmp_path}/./one.png"):
        assert "grid: is the name that --output has" in txt2img(*alone, "--grid", name).err
    assert not (tmp_path / "one.png").exists()


def test_only_folders_that_are_written_to_must_be_writable(
    txt2img: Script, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved: list[Path] = []
    monkeypatch.setattr(outputs, "check_writable", proved.append)
    flags = ("-p", "a star", "--model", tiny_folder, "--steps", "1")
    assert txt2img(*flags, "--outdir", tmp_path / "a").code == 0
    assert txt2img(*flags, "--output", tmp_path / "b" / "one.png", "--grid", tmp_path / "c" / "all.png").code == 0
    assert proved == [tmp_path / "a", tmp_path / "b", tmp_path / "c"]


@pytest.mark.parametrize(("count", "each", "layout"), [(7, 1, (3, 3)), (4, 4, (2, 2)), (6, 2, (2, 3)), (1, 1, (1, 1))])
def test_a_sheet_of_many_pictures_is_made_of_smaller_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, each: int, layout: tuple[int, int]
) -> None:
    for most in (10_000_000, 5_000):
        monkeypatch.setattr(images, "MAX_SHEET_PIXELS", most)
        sheet = images.ContactSheet(count, each, 120, 60)
        for _ in range(count):
            sheet.add(Image.new("L", (120, 60), 40))
        sheet.save(tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as image:
            assert image.width * image.height <= most and image.getpixel((0, 0)) == (40, 40, 40)
            if most > 5_000:
                assert image.size == (124 * layout[0] - 4, 64 * layout[1] - 4)


def test_previews_lie_beside_the_picture_and_change_nothing(txt2img: Script, tiny_folder: Path, tmp_path: Path) -> None:
    flags = ("-p", "a", "--model", tiny_folder, "--seed", "1", "--steps", "4", "--outdir", tmp_path)
    plain = txt2img(*flags)
    previewed = txt2img(*flags, "--preview-every", "2")
    assert Path(plain.out.strip()).read_bytes() == Path(previewed.out.strip()).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("0001-a.png", "0002-a.png", "0002-a.step002.png", "0002-a.step004.png")
    ]
    with Image.open(tmp_path / "0002-a.step002.png") as preview:
        assert preview.size == (64, 64)


def test_old_names_of_flags_work(txt2img: Script, tiny_folder: Path, tmp_path: Path) -> None:
    ended = txt2img(
        *("--prompt", "a", "--ckpt", tiny_folder, "--ddim_steps", "2", "--scale", "1.5", "--H", "64", "--W", "80"),
        *("--n_samples", "2", "--scheduler", "karras", "--precision", "float16", "--outdir", tmp_path, "--json"),
    )
    assert ended.code == 0, ended.err
    assert "float16 is not for CPUs, computing in float32" in ended.err
    settings = [json.loads(line)["settings"] for line in ended.out.splitlines()]
    assert len(settings) == 2
    wanted = {"steps": 2, "guidance_scale": 1.5, "width": 80, "height": 64, "schedule": "karras"}
    assert all(settings[0][key] == value for key, value in wanted.items())


def test_words_that_do_not_fit_are_named(txt2img: Script, tiny_folder: Path, tmp_path: Path) -> None:
    prompt = "a red circle and " * 8 + "zebra"
    ended = txt2img("-p", prompt, "--model", tiny_folder, "--steps", "1", "--outdir", tmp_path)
    assert ended.code == 0
    assert [line for line in ended.err.splitlines() if line.startswith("warning: ") and line.endswith("zebra")]


def test_text_tower_goes_before_pictures_are_drawn_if_few_texts_are_asked_for(
    txt2img: Script, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers, alive = list[weakref.ref[Any]](), list[bool]()
    load, stream = Bundle.load, TextToImage.stream

    def remember(*where: Any) -> Bundle:
        bundle = load(*where)
        towers.append(weakref.ref(bundle.text))
        return bundle

    def look(pipeline: TextToImage, request: GenerationRequest) -> Any:
        alive.append(towers[-1]() is not None)
        return stream(pipeline, request)

    monkeypatch.setattr(Bundle, "load", remember)
    monkeypatch.setattr(TextToImage, "stream", look)
    flags = ("--model", tiny_folder, "--seed", "1", "--steps", "1", "--quiet", "--negative-prompt", "b")
    few = txt2img("-p", "a", "-p", "c", *flags, "--perp-neg", "1", "--outdir", tmp_path / "few")
    assert (few.code, alive) == (0, [False, False])
    (tmp_path / "many.txt").write_text("\n".join(["a", *(f"word {i}" for i in range(64))]))
    many = txt2img("--from-file", tmp_path / "many.txt", *flags, "--perp-neg", "1", "--outdir", tmp_path / "many")
    assert many.code == 0 and len(alive) == 2 + 65 and all(alive[2:])
    first = (Path(ended.out.split()[0]).read_bytes() for ended in (few, many))
    assert next(first) == next(first)


def test_dry_run_shows_the_plan_and_writes_nothing(txt2img: Script, tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / "unet.safetensors").rename(tiny_folder / "hidden")
    try:
        flags = ("-p", "a", "--model", tiny_folder, "--outdir", tmp_path / "out", "-n", "5", "--batch-size", "2")
        plan = json.loads(txt2img(*flags, "--dry-run", "--json").out)
        words = txt2img(*flags, "--dry-run").out
    finally:
        (tiny_folder / "hidden").rename(tiny_folder / "unet.safetensors")
    assert not (tmp_path / "out").exists()
    assert plan["timesteps"] == [999.0, 749.0, 499.0, 249.0]
    assert len(plan["sigmas"]) == 5 and plan["sigmas"][-1] == 0.0
    assert (plan["model_calls"], plan["latents_per_model_call"]) == (12, 4)
    assert (plan["sampler"], plan["width"], plan["guidance_scale"]) == ("ddim", 64, 3.0)
    assert "model_calls: 12\n" in words


def test_dry_run_shows_what_a_convention_makes_of_it(txt2img: Script, tiny_folder: Path) -> None:
    flags = ("-p", "a", "--model", tiny_folder, "--dry-run", "--json", "--steps", "30")
    plan = json.loads(txt2img(*flags, "--schedule", "leading", "--convention", "compvis").out)
    assert (len(plan["timesteps"]), plan["timesteps"][0], plan["model_calls"]) == (31, 991.0, 31)
    assert plan["start_scale"] == pytest.approx((1 + plan["sigmas"][0] ** 2) ** 0.5, rel=1e-4)
    assert plan["sigmas"][-1] == pytest.approx(0.02917, abs=1e-5)
    other = txt2img(*flags, "--sampler", "DPM++ 2M Karras", "--convention", "compvis")
    assert "compvis has no dpmpp_2m on karras: drawn as exact does" in other.err
    plan = json.loads(other.out)
    assert (plan["sampler"], plan["schedule"], plan["model_calls"]) == ("dpmpp_2m", "karras", 30)
    adaptive = json.loads(txt2img(*flags, "--sampler", "dpm_adaptive").out)
    assert adaptive["model_calls"] == "depends on the picture"


def test_levels_may_be_listed(txt2img: Script, tiny_folder: Path) -> None:
    flags = ("-p", "a", "--model", tiny_folder, "--dry-run", "--json")
    plan = json.loads(txt2img(*flags, "--sigmas", "14.6,3,0.5,0").out)
    assert (plan["sigmas"], plan["steps"], plan["model_calls"]) == ([14.6, 3.0, 0.5, 0.0], 3, 3)
    plan = json.loads(txt2img(*flags, "--timesteps", "999,500", "--sampler", "heun").out)
    assert (plan["timesteps"], plan["steps"], plan["model_calls"]) == ([999.0, 500.0], 2, 3)
    assert txt2img(*flags, "--sigmas", "3,0", "--steps", "4").errors == [
        "error: sigmas: 1 steps, but steps is 4; leave steps out"
    ]


def test_ctrl_c_keeps_what_is_finished(tiny_folder: Path, tmp_path: Path) -> None:
    flags = ("-p", "a", "--model", tiny_folder, "--outdir", tmp_path, "-n", "500", "--batch-size", "1")
    process = subprocess.Popen(
        command("txt2img.py", *flags),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        # A shell that starts the tests in the background has them ignore Ctrl-C, and their children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "error:" not in err
    listed = {Path(line).name for line in (first + rest).splitlines()}
    found = {path.name for path in tmp_path.iterdir()}
    assert listed and listed <= found
    assert not [name for name in found if name.startswith(".")], "no reservation and no temporary file is left"
    for name in found:
        with Image.open(tmp_path / name) as image:
            image.load()
