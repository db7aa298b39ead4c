"""What the README tells people to type exists."""

import re
import shlex
import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"python (scripts/\w+\.py[^`\n#]*)", README)))


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_scripts_know_their_flags(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, *words = shlex.split(command.strip())
    if words in ([], ["--help"]):
        assert (ROOT / script).is_file()
        return
    spec = util.spec_from_file_location("read_script", ROOT / script)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    monkeypatch.setattr(sys, "argv", [script, *words])
    spec.loader.exec_module(module)
    module.parser().parse_args(words)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", README))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_linked_files_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_nothing_is_left_to_fill_in() -> None:
    for page in (README, *(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))):
        assert "@@" not in page
