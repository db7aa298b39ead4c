"""What a person writes behind `make image` arrives at the script as it was typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# In place of the interpreter: prints what the script would get.
ECHO = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"


def make_image(*variables: str) -> subprocess.CompletedProcess[str]:
    ours = {"MAKEFLAGS", "MAKELEVEL", "PROMPT", "MODEL", "STEPS", "SEED"}  # of the make that runs the tests
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    command = ["make", "image", f"RUN={ECHO}", "INSTALLED=", *variables]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle",
        """it's a "red" $HOME $(shell echo hi) ${PATH} $$ `id` $(id); # | & > x \\ * ~ !""",
        "-n",
        "ein grüner Stern\nüber einem Herz",
    ],
)
def test_the_prompt_arrives_as_it_was_typed(prompt: str) -> None:
    assert json.loads(make_image(f"PROMPT={prompt}").stdout) == ["scripts/txt2img.py", f"--prompt={prompt}"]


def test_settings_are_passed_when_given() -> None:
    given = make_image("PROMPT=a star", "SEED=7", "STEPS=3", "MODEL=my models/$a")
    assert json.loads(given.stdout)[1:] == ["--prompt=a star", "--model=my models/$a", "--steps=3", "--seed=7"]


def test_a_missing_prompt_is_said_before_anything_is_installed() -> None:
    ended = make_image()
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: PROMPT: no prompt is given; ")
