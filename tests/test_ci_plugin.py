"""Parity and browser tests that skip themselves fail in CI, and only there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPS = {
    "test_inside.py": "import pytest\n@pytest.mark.parity\ndef test_it():\n    pytest.skip('no reference')\n",
    "test_whole.py": "import pytest\npytest.importorskip('no_such_browser')\npytestmark = pytest.mark.browser\n",
    "test_plain.py": "import pytest\ndef test_it():\n    pytest.skip('not today')\n",
}


@pytest.mark.parametrize(("ci", "closing"), [("true", "1 failed, 1 skipped, 1 error"), ("", "3 skipped")])
def test_a_skipped_parity_test_fails_in_ci_and_only_there(tmp_path: Path, ci: str, closing: str) -> None:
    for name, source in SKIPS.items():
        (tmp_path / name).write_text(source)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  parity\n  browser\n")
    environment = {**os.environ, "CI": ci, "PYTEST_ADDOPTS": "", "PYTHONPATH": str(Path(__file__).parent)}
    options = ["-p", "ci_plugin", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert bool(ci) == ("test_inside.py::test_it failed after 0 s\nskipped in CI" in done.stdout)
    assert closing in done.stdout.splitlines()[-1]
    assert bool(done.returncode) == bool(ci)
