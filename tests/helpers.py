"""What tests and their fixtures share: a tiny model, which cases are quick, and scripts in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.bundle import Bundle, build
from ldm.config import parse_yaml, validate
from ldm.models.model_config import ModelConfig

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
