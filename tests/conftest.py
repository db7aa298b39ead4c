"""What surrounds all tests: shapes checked against their annotations, no network; and fixtures that many ask for."""

import importlib.util
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

# Workers beside each other have one core each: more threads than that would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# Before anything of ldm is imported: every annotated function then checks the shapes it gets and returns.
# The samplers are left out: they name tensors without importing torch; the pipeline is, because behind the hook
# `inference_mode` no longer knows its generators, which then run with gradients.
_checked = [
    "ldm.nn",
    "ldm.models",
    "ldm.diffusion.denoiser",
    "ldm.diffusion.forward",
    "ldm.diffusion.guidance",
    "ldm.diffusion.noise",
    "ldm.images",
]
jaxtyping.install_import_hook(_checked, "beartype.beartype")

from helpers import SCRIPTS, Ended, Script, tiny_model  # noqa: E402

from ldm import cli  # noqa: E402
from ldm.bundle import Bundle  # noqa: E402


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model, less than 1 MB."""
    return tiny_model().save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_folder: Path) -> Bundle:
    """The tiny model, loaded from its folder."""
    return Bundle.load(str(tiny_folder))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that opens a connection to anything but this machine fails."""
    connect: Callable[[socket.socket, Any], None] = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test opened a connection to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Script]:
    """Scripts called inside this process, which spares the seconds of importing torch."""

    def script(name: str) -> Script:
        path = SCRIPTS / name
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)

        def call(*arguments: str | Path) -> Ended:
            monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
            with pytest.raises(SystemExit) as caught:
                cli.run(module.main)
            printed = capsys.readouterr()
            return Ended(int(caught.value.code or 0), printed.out, printed.err)

        return call

    return script


@pytest.fixture
def train(in_process: Callable[[str], Script], monkeypatch: pytest.MonkeyPatch) -> Script:
    """scripts/train.py called inside this process; it draws no samples, which is the pipeline's and tested there."""
    monkeypatch.setattr("ldm.training.stages.averaged", lambda *_: None)
    script = in_process("train.py")
    return lambda *arguments: script(*arguments, "--report-to", "none")


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[..., None]]:
    """The `main` of a script, called inside this process with flags of any type; what it raises comes through."""

    def script(name: str) -> Callable[..., None]:
        main = runpy.run_path(str(SCRIPTS / name))["main"]

        def call(*arguments: object) -> None:
            monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
            main()

        return call

    return script


@pytest.fixture
def prepare(raising: Callable[[str], Callable[..., None]]) -> Callable[..., None]:
    """scripts/prepare_data.py's main, called with these flags."""
    return raising("prepare_data.py")


@pytest.fixture
def txt2img(in_process: Callable[[str], Script]) -> Script:
    """scripts/txt2img.py called inside this process."""
    return in_process("txt2img.py")
