"""Wrong input to scripts/txt2img.py: one `error:` line, the right exit code, at once, and nothing is left behind."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import SCRIPTS, Ended, start
from safetensors.torch import load_file, save_file

from ldm.files import sha256
from ldm.formats.manifest import MANIFEST

Script = Callable[..., Ended]


def check(ended: Ended, code: int, words: str) -> None:
    """The error contract: exit code, exactly one line that says what is wrong and what to do, no traceback."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert len(ended.errors) == 1, ended.err
    assert words in ended.errors[0]
    assert "; " in ended.errors[0] and len(ended.errors[0]) <= 310
    assert "Traceback" not in ended.err and "\x1b" not in ended.err


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--prompt", "  "], 2, "prompt: the prompt is empty; "),
        (["--steps", "0"], 2, "steps: 0 is not between 1 and 1000; use 30"),
        (["--guidance-scale", "nan"], 2, "guidance_scale: nan is not a number; use 7.5"),
        (["--size", "512x500"], 2, "512x500: height must be a multiple of 16; nearest: 496 or 512"),
        (["--seed", str(2**40)], 2, "seed: 1099511627776 is not between -1 and 4294967295"),
        (["--sampler", "eular"], 2, "sampler: no sampler 'eular' (did you mean 'euler'?); use one of ddpm, "),
        (["--model", "no/such/model"], 4, "no/such/model: no such model"),
        (["--outdir", "{file}/out"], 5, "/out: cannot write there: Not a directory; choose another folder"),
    ],
    ids=["empty prompt", "steps 0", "guidance nan", "size 500", "seed 2^40", "sampler", "missing model", "folder"],
)
def test_the_eight_wrong_inputs_of_a_user(
    txt2img: Script, tiny_folder: Path, tmp_path: Path, flags: list[str], code: int, words: str
) -> None:
    (tmp_path / "file").touch()
    given = [flag.format(file=tmp_path / "file") for flag in flags]
    defaults = {"--prompt": "a", "--model": str(tiny_folder), "--outdir": str(tmp_path / "out")}
    rest = [part for flag, value in defaults.items() if flag not in given for part in (flag, value)]
    check(txt2img(*given, *rest), code, words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bytes_that_are_not_text_are_refused_before_computing() -> None:
    check(start("txt2img.py", "--prompt", b"caf\xe9"), 2, "prompt: character 4 is not valid Unicode; ")


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--negative-prompt", "blurred"], 2, "only a negative prompt, what to avoid, is given"),
        (["-p", "a", "--se", "5"], 2, "--se: no such flag (did you mean "),
        (["-p", "a", "--stepps", "5"], 2, "--stepps: no such flag (did you mean '--steps'?)"),
        (["-p"], 2, "-p/--prompt: expected one argument"),
        (["-p", "a", "--steps", "٣"], 2, "is not a whole number"),
        (["-p", "a", "--steps", "1_0"], 2, "steps: 1_0 is not a whole number"),
        (["-p", "a", "--seed", "1e5"], 2, "seed: 1e5 is not a whole number"),
        (["-p", "a", "-n", "0"], 2, "num_images: 0 is not between 1 and 10000"),
        (["-p", "a", "--guidance-scale", "7,5"], 2, "guidance_scale: 7,5 is not a number; use 7.5"),
        (["-p", "a", "--size", "512"], 2, "size: 512 is not WIDTHxHEIGHT"),
        (["-p", "a", "--size", "64x64", "--width", "64"], 2, "size: given together with --width"),
        (["-p", "a", "--dtype", "float61"], 2, "dtype: no dtype 'float61' (did you mean 'float16'?)"),
        (["-p", "a", "--device", "gpu"], 2, "device: no device 'gpu'"),
        (["-p", "a", "--schedule", "karas"], 2, "(did you mean 'karras'?)"),
        (["-p", "a", "--preview-every", "0"], 2, "preview_every: 0 is not between"),
        (["-p", "a", "--output", "x.jpg"], 2, "output: x.jpg does not end in .png"),
        (["-p", "a", "--output", "x.png", "-n", "2"], 2, "output: names one picture"),
        (["-p", "a", "--output", "x.png", "--outdir", "y"], 2, "output: given together with --outdir"),
        (["-p", "\x1b[31m" * 4000], 2, "characters are too many"),
        (["--from-file", "no-such-file.txt"], 3, "no-such-file.txt: No such file or directory"),
    ],
)
def test_wrong_flags(txt2img: Script, flags: list[str], code: int, words: str) -> None:
    check(txt2img(*flags), code, words)


def test_flag_given_twice_is_not_silent(txt2img: Script) -> None:
    ended = txt2img("-p", "a", "--steps", "5", "--steps", "0")
    assert "warning: --steps: given more than once; 0 counts" in ended.err
    check(ended, 2, "steps: 0 is not between")


def test_bad_line_of_a_prompt_file_is_named(txt2img: Script, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n" + "x" * 10_001, encoding="utf-8")
    check(txt2img("--from-file", file), 3, "prompts.txt:2: prompt: 10001 characters are too many")
    file.write_bytes(b"")
    check(txt2img("--from-file", file), 3, "prompts.txt: no prompt in it")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_device_that_is_not_there(txt2img: Script, tiny_folder: Path, tmp_path: Path) -> None:
    ended = txt2img("-p", "a", "--model", tiny_folder, "--outdir", tmp_path, "--device", "cuda")
    check(ended, 5, "device: cuda: CUDA is not available here; use --device cpu")


def test_output_that_exists_is_kept(txt2img: Script, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_text("precious")
    check(txt2img("-p", "a", "--model", tiny_folder, "--output", path), 2, "exists and is never overwritten")
    assert path.read_text() == "precious"
    made = txt2img("-p", "a", "--model", tiny_folder, "--output", tmp_path / "new" / ".." / "y.png", "--steps", "1")
    assert made.code == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["x.png", "y.png"]


@pytest.mark.parametrize("name", ["tiny_", "Tiny"])
def test_missing_model_names_the_nearest(txt2img: Script, tiny_folder: Path, name: str) -> None:
    check(txt2img("-p", "a", "--model", tiny_folder.parent / name), 4, "no such model (did you mean 'tiny'?)")


def renew_manifest(folder: Path) -> None:
    """Make the manifest agree with the files, as an honest copy of a damaged model would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sha256"] = {name: sha256(folder / name) for name in manifest["sha256"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def torn(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))


def not_finite(path: Path) -> None:
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, path)


def renamed(path: Path) -> None:
    tensors = load_file(path)
    tensors["conv_in.offset"] = tensors.pop("conv_in.bias")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "honest", "words"),
    [
        (lambda path: flipped(path), False, "unet.safetensors: sha256 differs"),
        (lambda path: torn(path, 5000), False, "unet.safetensors: sha256 differs"),
        (lambda path: torn(path, 0), True, "unet.safetensors: not a whole safetensors file"),
        (lambda path: torn(path, 4), True, "unet.safetensors: not a whole safetensors file"),
        (lambda path: torn(path, 100), True, "unet.safetensors: not a whole safetensors file"),
        (lambda path: torn(path, -1), True, "unet.safetensors: not a whole safetensors file"),
        (not_finite, True, "unet.safetensors: conv_in.bias holds 1 values that are not finite"),
        (renamed, True, "1 missing: conv_in.bias; 1 unexpected: conv_in.offset"),
        (lambda path: path.unlink(), False, "unet.safetensors: no such file"),
    ],
    ids=["flip", "torn", "empty", "4 bytes", "100 bytes", "last byte", "nan", "key", "missing"],
)
def test_damaged_weights(
    txt2img: Script, tiny_folder: Path, tmp_path: Path, damage: Callable[[Path], None], honest: bool, words: str
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    damage(folder / "unet.safetensors")
    if honest:
        renew_manifest(folder)
    check(txt2img("-p", "a", "--model", folder, "--outdir", tmp_path / "out"), 4, words)
    assert not (tmp_path / "out").exists()


def test_reader_of_stdout_that_leaves_is_no_error() -> None:
    code = "from ldm.cli import run; run(lambda: [print('x' * 9999) for _ in range(99)])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=SCRIPTS.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 128 + signal.SIGPIPE
