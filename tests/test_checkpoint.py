"""A checkpoint is whole or absent: killed anywhere in a save, a run goes on from a whole one to the same end."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import environment
from tiny_training import state_digest, trained

from ldm.errors import MachineError, ModelError
from ldm.training import checkpoint
from ldm.training.checkpoint import Checkpoint

PROGRAM = Path(__file__).resolve().parent / "tiny_training.py"
# Each ends the process, as kill −9 would, at one point of the second save: the n-th call of a function.
KILL_POINTS = {
    "before the temporary folder": ("os.fsync", 0),
    "in the middle of a file": ("checkpoint.write_tensors", 2),
    "before the manifest": ("checkpoint.write_manifest", 1),
    "before the rename": ("os.rename", 1),
    "after the rename": ("checkpoint.save_text", 1),
    "before older ones are removed": ("checkpoint._prune", 1),
}
KILLER = """
import os, runpy, sys
import ldm.training.checkpoint as checkpoint
target, count = sys.argv[1], int(sys.argv[2])
module, name = (os if target.startswith("os.") else checkpoint), target.split(".")[1]
real, state = getattr(module, name), {"saves": 0, "calls": 0}
real_save = checkpoint.save

def save(*arguments):
    state["saves"] += 1
    if state["saves"] == 2 and target == "os.fsync":
        os._exit(9)
    return real_save(*arguments)

def deadly(*arguments, **options):
    if state["saves"] == 2:
        state["calls"] += 1
        if state["calls"] == count:
            if target == "checkpoint.write_tensors":
                arguments[0].write_bytes(b"half of a file")
            os._exit(9)
    return real(*arguments, **options)

checkpoint.save = save
setattr(module, name, deadly)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SHORT = ("steps=6", "save_every=2", "keep=1")


def program(folder: Path, *before: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, *before, str(PROGRAM), "unet", str(folder), *SHORT]
    root = str(PROGRAM.parent.parent)
    return subprocess.run(command, env={**environment(), "PYTHONPATH": root}, capture_output=True, check=False)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The state that six steps end in."""
    folder = tmp_path_factory.mktemp("whole")
    for _ in trained("unet", folder, steps=6, save_every=2, keep=1):
        pass
    return state_digest(folder)


@pytest.mark.slow
@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_in_a_save_it_goes_on_to_the_same_end(point: str, uninterrupted: str, tmp_path: Path) -> None:
    target, call = KILL_POINTS[point]
    assert program(tmp_path, "-c", KILLER, target, str(call)).returncode == 9
    for _ in trained("unet", tmp_path, steps=6, save_every=2, keep=1):
        pass
    assert state_digest(tmp_path) == uninterrupted
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.slow
def test_killed_at_random_times_it_goes_on_to_the_same_end(uninterrupted: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    command = [sys.executable, str(PROGRAM), "unet", str(tmp_path), *SHORT]
    for _ in range(6):
        running = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert running.stdout is not None
        running.stdout.readline()  # its first step
        time.sleep(rng.random() * 0.5)
        running.kill()
        running.wait()
    for _ in trained("unet", tmp_path, steps=6, save_every=2, keep=1):
        pass
    assert state_digest(tmp_path) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(number: int, code: int, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "unet", str(tmp_path), "steps=400", "save_every=400", "ema_decay=0.7"]
    running = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE)
    assert running.stdout is not None
    running.stdout.readline()
    running.send_signal(number)
    assert running.wait(timeout=60) == code
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    step = checkpoint.read(newest).step
    assert 0 < step < 400
    resumed = trained("unet", tmp_path, steps=400, save_every=400, ema_decay=0.7)
    assert next(resumed).step == step + 1


def some(step: int) -> Checkpoint:
    return Checkpoint(step, {"model": {"w": torch.full((3,), float(step))}}, {"seen": [1.5, step]})


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, some(4))
    saved = checkpoint.read(folder)
    assert saved.step == 4 and saved.numbers == {"seen": [1.5, 4]}
    assert torch.equal(saved.tensors["model"]["w"], torch.full((3,), 4.0))
    assert {path.name for path in folder.iterdir()} == {"MANIFEST.json", "state.json", "model.safetensors"}


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, some(step), keep=2, best=step == 2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000004", "step_00000005"]


def flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose(folder: Path) -> None:
    (folder / "state.json").unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def foreign(folder: Path) -> None:
    empty(folder)
    (folder / "holiday.txt").write_text("sun")
    checkpoint.write_manifest(folder)


@pytest.mark.parametrize("damage", [flip, cut, lose, empty, foreign])
def test_a_damaged_checkpoint_is_passed_over_and_said(damage, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    checkpoint.save(tmp_path, some(3))
    damage(checkpoint.save(tmp_path, some(6)))
    assert checkpoint.newest(tmp_path) == tmp_path / "step_00000003"
    assert "step_00000006" in capsys.readouterr().err
    damage(tmp_path / "step_00000003")
    with pytest.raises(ModelError, match="not one of its 2 checkpoints is whole"):
        checkpoint.newest(tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, some(3))

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "flush", full)
        with pytest.raises(MachineError, match=r"step_00000006: cannot be written .*free space"):
            checkpoint.save(tmp_path, some(6))
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000003", "latest"}
    checkpoint.save(tmp_path, some(6))
    assert checkpoint.newest(tmp_path) == tmp_path / "step_00000006"


def test_too_small_a_disk_is_said_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"checkpoints need 1000000000.0 GB, .* GB are free"):
        checkpoint.check_space(tmp_path / "not" / "there", 10**18)


def test_no_pickle_is_in_a_checkpoint(tmp_path: Path) -> None:
    for _ in trained("vae", tmp_path, steps=2, save_every=2):
        pass
    (folder,) = tmp_path.glob("step_*")
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert {path.name for path in folder.iterdir()} == {*manifest, "MANIFEST.json"}
    assert os.listdir(tmp_path) and not list(tmp_path.glob(".tmp-*"))
