"""What tests share: shapes checked against their annotations, no network, a tiny model, and how scripts are run."""

import importlib.util
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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

import torch  # noqa: E402

from ldm import cli  # noqa: E402
from ldm.bundle import Bundle, build  # noqa: E402
from ldm.config import parse_yaml, validate  # noqa: E402
from ldm.models.model_config import ModelConfig  # noqa: E402

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

TINY = """
autoencoder: {kind: kl, channels: 8, multipliers: [1, 1, 2, 2], res_blocks: 1, mid_attention: false, groups: 4}
text: {kind: clip, width: 32, layers: 2, heads: 4, context_length: 16, vocabulary: 1024, padding: zero}
unet:
  channels: 16
  multipliers: [1, 2]
  res_blocks: 1
  attention: [false, true]
  heads: 2
  context_width: 32
  groups: 4
prediction: v
sampling: {width: 64, height: 64, sampler: ddim, schedule: trailing, steps: 4, guidance_scale: 3.0}
"""


def tiny_model() -> Bundle:
    """A latent-diffusion model of 150,000 parameters with weights from a seed; its pictures are 64×64 of noise."""
    config = validate(parse_yaml(TINY, "tiny"), ModelConfig, "tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder, text, unet = build(config)
        for weight in unet.parameters():
            if weight.dim() > 1 and not weight.any():  # a fresh UNet says nothing: its last layers start at zero
                torch.nn.init.normal_(weight, std=0.2)
    return Bundle("tiny", config, autoencoder, text, unet)


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


def few(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Cases to parametrize a test with, of which all but the `quick` ones are slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@dataclass(frozen=True)
class Ended:
    """How a script ended: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The `error:` lines on stderr."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def command(script: str, *arguments: str | bytes | Path) -> list[str | bytes | Path]:
    """The command line that runs a script as a user does."""
    return [sys.executable, SCRIPTS / script, *arguments]


def environment() -> dict[str, str]:
    """The environment of a script that is started by a test: one thread, and nothing of the caller's debugging."""
    kept = {key: value for key, value in os.environ.items() if key != "LDM_DEBUG"}
    return {**kept, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def start(script: str, *arguments: str | bytes | Path) -> Ended:
    """Run a script in its own process and wait for its end."""
    done = subprocess.run(command(script, *arguments), capture_output=True, env=environment(), timeout=300, check=False)
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


Script = Callable[..., Ended]


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
