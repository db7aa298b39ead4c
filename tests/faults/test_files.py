"""Model files that are torn, false, hostile or something else: exit code 4, one line, at once, and nothing is run."""

import json
import os
import pickle
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SCRIPTS, Script, start, tiny_model
from test_cli import check

from ldm.formats import keys
from ldm.formats.export import exported, to_single_file
from ldm.formats.fill import whole
from ldm.formats.tensors import MemoryTensor, StoredTensor, read_header
from ldm.formats.write import write_tensors

Header = dict[str, Any]


@pytest.fixture(scope="session")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a single file, less than 1 MB."""
    model = tiny_model()
    parts: dict[str, dict[str, StoredTensor]] = {
        part: {name: MemoryTensor(tensor) for name, tensor in getattr(model, part).state_dict().items()}
        for part in ("autoencoder", "text", "unet")
    }
    path = tmp_path_factory.mktemp("files") / "one.safetensors"
    to_single_file(path, exported(model.config, parts, path))
    return path


@pytest.fixture
def describe(in_process: Callable[[str], Script]) -> Script:
    return in_process("describe.py")


class Payload:
    """What an attacker puts into a pickle: unpickling it runs a command."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.flag}",)


def hostile(path: Path, kind: str) -> Path:
    """A pickle at `path` whose payload makes the file `flag` beside it. Returns that file."""
    flag = path.with_name("flag")
    content = {"state_dict": {"a": torch.zeros(2)}, "x": Payload(flag)}
    if kind == "raw":
        path.write_bytes(pickle.dumps(Payload(flag)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return flag


@pytest.mark.parametrize("kind", ["zip", "legacy", "raw"])
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_hostile_pickle_is_not_run_whatever_its_name(
    in_process: Callable[[str], Script], tmp_path: Path, kind: str, name: str
) -> None:
    flag = hostile(tmp_path / name, kind)
    words = "is a pickle file; convert it: python scripts/convert.py"
    path, out = str(tmp_path / name), tmp_path / "out"
    check(in_process("describe.py")(path), 4, words)
    check(in_process("txt2img.py")("-p", "a", "--model", path, "--outdir", out), 4, words)
    check(in_process("evaluate.py")("--model", path), 4, words)
    converted = in_process("convert.py")("--to", "bundle", path, out)
    check(converted, 4, "not a PyTorch file of tensors" if kind == "raw" else "unsafe: it asks for posix.system")
    assert not flag.exists() and not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["../app.py", "--model", "{model}", "--port", "{port}"],
        [
            "train.py",
            "lora",
            "--config",
            "{recipe}",
            "--base",
            "{model}",
            "--run-dir",
            "{folder}/run",
            "data.shards={folder}",
        ],
    ],
    ids=["app", "train"],
)
@pytest.mark.slow
def test_a_hostile_pickle_is_not_run_by_what_starts_slowly(tmp_path: Path, arguments: list[str]) -> None:
    flag = hostile(tmp_path / "model.ckpt", "zip")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "one.tar").touch()
    recipe = SCRIPTS.parent / "configs/shapes.yaml"
    places = {"model": tmp_path / "model.ckpt", "folder": tmp_path, "recipe": recipe, "port": port}
    ended = start(*(argument.format(**places) for argument in arguments))
    check(ended, 4, "is a pickle file; convert it: python scripts/convert.py")
    assert not flag.exists()


def test_a_safetensors_file_called_ckpt_opens(describe: Script, one_file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(one_file, tmp_path / "one.ckpt"))
    assert describe(path).code == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "it has 0 bytes"),
        (lambda data: data[:4], "it has 4 bytes"),
        (lambda data: data[:100], "not a whole safetensors file"),
        (lambda data: data[: len(data) // 2], "not a whole safetensors file"),
        (lambda data: data[:-1], "not a whole safetensors file"),
        (lambda data: data + b"\0", "not a whole safetensors file"),
        (lambda data: b"<!DOCTYPE html><html><body>Not found", "is a web page, not a model"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (lambda data: (2**40).to_bytes(8, "little") + data[8:], "a header of 1099511627776 bytes"),
        (lambda data: bytes(200), "not a whole safetensors file"),
    ],
    ids=["empty", "4 bytes", "100 bytes", "half", "last byte", "one more", "web page", "LFS", "2^40", "zeros"],
)
def test_a_file_that_is_not_whole(
    describe: Script, one_file: Path, tmp_path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(damage(one_file.read_bytes()))
    began = time.monotonic()
    check(describe(path), 4, words)
    assert time.monotonic() - began < 2


def with_header(source: Path, path: Path, change: Callable[[Header], object]) -> Path:
    """A copy of a safetensors file with another header."""
    data = source.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


CONV_IN = f"{keys.UNET}input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header[CONV_IN].update(data_offsets=[0, 2304]), "where it does not fit"),
        (lambda header: header[CONV_IN].update(shape=[16, 4, 3, 2]), "where it does not fit"),
        (lambda header: header[CONV_IN].update(shape=[-16, -4, 3, 3]), "has a strange shape or place"),
        (lambda header: header[CONV_IN].update(dtype="F5"), "has the unknown number format 'F5'"),
        (lambda header: header[CONV_IN].pop("dtype"), "no or a strange 'dtype'"),
        (lambda header: header.update(__metadata__={"a": 1}), "its metadata is not text"),
        (lambda header: header.update(x=[]), "not a whole safetensors file"),
        (lambda header: header["__metadata__"].update({"ldm.config": "{"}), "in its metadata is not a config"),
        (lambda header: header["__metadata__"].pop("ldm.config"), "cross-attention 32, expected 768 or 1024"),
    ],
    ids=["overlap", "size", "negative", "format", "no format", "metadata", "list", "torn config", "no config"],
)
def test_a_header_that_is_false(
    describe: Script, one_file: Path, tmp_path: Path, change: Callable[[Header], object], words: str
) -> None:
    check(describe(with_header(one_file, tmp_path / "x.safetensors", change)), 4, words)


def changed(source: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a safetensors file with other tensors."""
    file = read_header(source)
    tensors = {name: whole(stored, name) for name, stored in file.tensors.items()}
    change(tensors)
    write_tensors(path, {name: MemoryTensor(tensor) for name, tensor in tensors.items()}, file.metadata)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(CONV_IN.replace("weight", "bias")), "1 missing: "),
        (lambda tensors: tensors.update({"model.diffusion_model.more": torch.zeros(2)}), "1 unexpected: "),
        (
            lambda tensors: tensors.update({CONV_IN: torch.zeros(16, 9, 3, 3)}),
            f"1 of another shape: {CONV_IN} (16, 9, 3, 3), expected (16, 4, 3, 3)",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_a_file_that_does_not_fit_its_config(
    txt2img: Script,
    one_file: Path,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    words: str,
) -> None:
    path = changed(one_file, tmp_path / "x.safetensors", change)
    check(txt2img("-p", "a", "--model", path, "--outdir", tmp_path / "out"), 4, words)
    assert not (tmp_path / "out").exists()


def not_finite(data: bytearray, begin: int) -> None:
    data[begin : begin + 4] = b"\x00\x00\xc0\x7f"


def test_numbers_that_are_not_finite(
    txt2img: Script, in_process: Callable[[str], Script], one_file: Path, tmp_path: Path
) -> None:
    path, data = tmp_path / "x.safetensors", bytearray(one_file.read_bytes())
    stored = read_header(one_file).tensors[CONV_IN]
    assert stored.dtype == "F32"
    not_finite(data, stored.begin)
    path.write_bytes(data)
    check(txt2img("-p", "a", "--model", path, "--outdir", tmp_path / "out"), 4, "holds 1 values that are not finite")
    ended = in_process("convert.py")("--to", "single-file", path, tmp_path / "y.safetensors")
    check(ended, 4, f"{CONV_IN}: holds numbers that are not finite")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("dtype", ["I32", "U32", "F64"])
def test_weights_in_another_number_format(txt2img: Script, one_file: Path, tmp_path: Path, dtype: str) -> None:
    def change(header: Header) -> None:
        header[CONV_IN].update(dtype=dtype)
        if dtype == "F64":
            header[CONV_IN]["shape"][0] //= 2

    path = with_header(one_file, tmp_path / "x.safetensors", change)
    words = "1 of another shape" if dtype == "F64" else f"is {dtype}, expected fp32, fp16 or bf16"
    check(txt2img("-p", "a", "--model", path, "--outdir", tmp_path / "out"), 4, words)


def test_parts_that_do_not_fit_each_other(in_process: Callable[[str], Script], one_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert in_process("convert.py")("--to", "diffusers", one_file, folder).code == 0
    for part, key, value, words in (
        ("vae", "latent_channels", 8, "the autoencoder has 8 latent channels, the UNet reads 4"),
        ("unet", "cross_attention_dim", 64, "the text encoder is 32 wide, the UNet's cross-attention expects 64"),
    ):
        path = folder / part / "config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {key: value}))
        check(in_process("convert.py")("--to", "bundle", folder, tmp_path / "out"), 4, words)
        path.write_text(before)


def test_a_changed_byte_of_a_bundle_is_not_copied(
    in_process: Callable[[str], Script], tiny_folder: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    data = bytearray((source / "unet.safetensors").read_bytes())
    data[-100] ^= 1
    (source / "unet.safetensors").write_bytes(data)
    ended = in_process("convert.py")("--to", "single-file", source, tmp_path / "x.safetensors")
    check(ended, 4, "unet.safetensors: sha256 differs")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_no_file(describe: Script, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    (tmp_path / "folder").mkdir()
    for place, words in (
        (tmp_path / "pipe", "neither a file nor a folder"),
        (Path("/dev/zero"), "neither a file nor a folder"),
        (tmp_path / "lost", "; "),
        (tmp_path / "round", "; "),
        (tmp_path / "folder", "not a model folder"),
        (tmp_path / "no", "no such model"),
    ):
        check(describe(place), 4, words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights(describe: Script, one_file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(one_file, tmp_path / "x.safetensors"))
    path.chmod(0)
    check(describe(path), 4, "cannot be read (Permission denied)")
