"""Names of pictures: never taken twice, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ldm.errors import MachineError, SettingError
from ldm.outputs import check_new, check_writable, preview_path, reserved

WRITER = """
import sys
from pathlib import Path
from ldm.outputs import reserved

for index in range(50):
    with reserved(Path(sys.argv[1]), "a") as path:
        assert not path.exists()
        path.write_text(sys.argv[2])
"""


def test_two_processes_at_once_get_different_names(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name], cwd=root) for name in "xy"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{number:04d}-a.png" for number in range(1, 101)]
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["x"] * 50 + ["y"] * 50


def test_numbers_go_on_after_the_highest_and_a_reserved_one_is_skipped(tmp_path: Path) -> None:
    for name in ("0007-b.png", "0007-b.step001.png", "notes.txt", "12-short.png"):
        (tmp_path / name).touch()
    with reserved(tmp_path, "a") as first, reserved(tmp_path, "c") as second:
        assert (first.name, second.name) == ("0008-a.png", "0009-c.png")
        assert not first.exists(), "a reservation is not an empty picture"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_reservation_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), reserved(tmp_path / "new", "a"):
        raise KeyboardInterrupt
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(("owner", "call"), [(os, "close"), (Path, "unlink")], ids=["made", "removed"])
def test_ctrl_c_while_a_reservation_is_made_or_removed_leaves_none(
    owner: Any, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain = signal.signal(signal.SIGINT, signal.default_int_handler), getattr(owner, call)

    def interrupted(*words: Any, **more: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        plain(*words, **more)

    monkeypatch.setattr(owner, call, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt), reserved(tmp_path / "new", "a"):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert list((tmp_path / "new").iterdir()) == []


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        with pytest.raises(MachineError, match="cannot write there: Not a directory; choose"):
            check_writable(folder)


def test_check_leaves_no_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_only_our_own_old_leftovers_are_removed(tmp_path: Path) -> None:
    ours = [".0001.reserved", ".0002-a.png.77.tmp"]
    others = [".0003.hidden", ".keep", "0001-a.png", "0002.reserved"]
    for name in (*ours, *others):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, time.time() - 3 * 24 * 3600))
    (tmp_path / ".0009.reserved").touch()
    check_writable(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".0009.reserved"}


def test_exact_name_must_be_free_and_a_png(tmp_path: Path) -> None:
    check_new(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b[1].png").touch()
    preview_path(tmp_path / "c.png", 4).touch()
    for name in ("link.png", "b[1].png", "c.png"):
        with pytest.raises(SettingError, match="exists and is never overwritten"):
            check_new(tmp_path / name)
    with pytest.raises(SettingError, match=r"does not end in \.png"):
        check_new(tmp_path / "a.jpg")
