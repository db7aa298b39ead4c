"""Skipped parity tests fail in CI, and only there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INSIDE = "import pytest\n@pytest.mark.parity\ndef test_it():\n    pytest.skip('no reference')\n"
WHOLE = "import pytest\npytest.importorskip('no_such_reference')\npytestmark = pytest.mark.parity\n"
PLAIN = "import pytest\ndef test_it():\n    pytest.skip('not today')\ndef test_other():\n    pass\n"


def run(folder: Path, source: str, ci: str) -> str:
    (folder / "test_made_up.py").write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = parity\n")
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-p", "ci_plugin", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    return f"{done.returncode} {done.stdout.splitlines()[-1]}"


@pytest.mark.parametrize("source", [INSIDE, WHOLE])
def test_skipped_parity_test_fails_in_ci(tmp_path: Path, source: str) -> None:
    assert "error" in run(tmp_path, source, "true") or "failed" in run(tmp_path, source, "true")


@pytest.mark.parametrize("source", [INSIDE, WHOLE])
def test_skipped_parity_test_is_fine_elsewhere(tmp_path: Path, source: str) -> None:
    assert "1 skipped" in run(tmp_path, source, "")


def test_other_skips_are_fine_in_ci(tmp_path: Path) -> None:
    assert run(tmp_path, PLAIN, "true").startswith("0 ")
