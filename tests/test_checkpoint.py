"""A checkpoint is whole or absent: killed anywhere in a save, a run goes on from a whole one to the same end."""

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import environment
from tiny_training import state_digest, trained

from ldm import files
from ldm.errors import MachineError, ModelError
from ldm.training import checkpoint
from ldm.training.checkpoint import Checkpoint
from ldm.training.loop import Conduct
from ldm.training.signals import Stopped, caught

PROGRAM = Path(__file__).resolve().parent / "tiny_training.py"
# Each ends the process, as kill −9 would, at one point of the second save: the n-th call of a function.
KILL_POINTS = {
    "before the temporary folder": ("os.fsync", 0),
    "in the middle of a file": ("checkpoint.write_tensors", 2),
    "before the manifest": ("checkpoint.write_manifest", 1),
    "before the rename": ("os.replace", 1),
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
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000006", "latest"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_times_it_goes_on_to_the_same_end(tmp_path: Path) -> None:
    rng, long = random.Random(0), {"steps": 400, "save_every": 1, "keep": 1}
    for _ in trained("unet", tmp_path / "whole", **long):
        pass
    arguments = [f"{name}={value}" for name, value in long.items()]
    command = [sys.executable, str(PROGRAM), "unet", str(tmp_path / "parts"), *arguments]
    killed = 0
    for _ in range(20):
        running = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert running.stdout is not None
        running.stdout.readline()  # its first step; most of the time it is saving
        time.sleep(rng.random() * 0.3)
        running.kill()
        killed += running.wait() == -signal.SIGKILL
    assert killed == 20, "a run that had ended before it was killed shows nothing"
    for _ in trained("unet", tmp_path / "parts", **long):
        pass
    assert state_digest(tmp_path / "parts") == state_digest(tmp_path / "whole")


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


def test_a_signal_that_comes_while_a_checkpoint_is_written_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_tensors

    def interrupted(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        write(path, tensors)
        os.kill(os.getpid(), signal.SIGTERM)

    with caught() as stop:
        running = trained("unet", tmp_path, Conduct(stop), save_every=2)
        next(running)
        monkeypatch.setattr(checkpoint, "write_tensors", interrupted)
        with pytest.raises(Stopped, match="SIGTERM"):
            list(running)
    steps = ["step_00000002", "step_00000003"]  # the one that was being written, and the one that was asked for
    assert sorted(path.name for path in tmp_path.glob("step_*")) == steps
    assert all(checkpoint.verify_manifest(tmp_path / step) is None for step in steps)


def test_a_second_interrupt_ends_at_once() -> None:
    with caught() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_child_that_inherits_the_handlers_dies_of_a_signal() -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def waits() -> None:
        ready.set()
        while True:  # a signal just before a sleep is handled behind it
            time.sleep(0.1)

    with caught() as stop:
        child = context.Process(target=waits)
        child.start()
        assert ready.wait(30) and child.pid is not None
        os.kill(child.pid, signal.SIGTERM)
        child.join(30)
        child.kill()
    assert child.exitcode == -signal.SIGTERM and stop.number == 0


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
def test_a_damaged_checkpoint_is_passed_over_and_said(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(tmp_path, some(3))
    damage(checkpoint.save(tmp_path, some(6)))
    assert checkpoint.newest(tmp_path) == tmp_path / "step_00000003"
    assert "step_00000006" in capsys.readouterr().err
    damage(tmp_path / "step_00000003")
    with pytest.raises(ModelError, match="not one of its 2 checkpoints is whole"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("damaged", [1, 2])
def test_damaged_checkpoints_do_not_take_the_place_of_those_that_follow(
    damaged: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 10, 11)[: 1 + damaged]:
        checkpoint.save(tmp_path, some(step), keep=9, best=step == 10)
    for folder in sorted(tmp_path.glob("step_*"))[1:]:
        (folder / "state.json").unlink()
    assert checkpoint.newest(tmp_path) == tmp_path / "step_00000005"
    checkpoint.save(tmp_path, some(7), keep=damaged)
    assert checkpoint.newest(tmp_path) == tmp_path / "step_00000007"
    assert len(list(tmp_path.glob("step_*"))) == damaged, "what is kept is whole"


def fill_disk(monkeypatch: pytest.MonkeyPatch, tries: int) -> None:
    """The disk is full so many times that something is flushed, and waiting takes no time."""
    flush, left = files.flush, iter(range(tries))

    def full(path: Path) -> None:
        if next(left, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    monkeypatch.setattr(files, "flush", full)
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(tmp_path, some(3))
    with monkeypatch.context() as patch:
        fill_disk(patch, tries=99)
        with pytest.raises(MachineError, match=r"step_00000006: cannot be written .*free space"):
            checkpoint.save(tmp_path, some(6))
    said = [line for line in capsys.readouterr().err.splitlines() if "No space left on device; make room" in line]
    assert len(said) == 5 and said[0].endswith("5 times more") and said[-1].endswith("1 times more")
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000003", "latest"}
    checkpoint.save(tmp_path, some(6))
    assert checkpoint.newest(tmp_path) == tmp_path / "step_00000006"


def test_a_run_waits_for_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, tries=3)
    assert checkpoint.newest(tmp_path) != checkpoint.save(tmp_path, some(6)) == checkpoint.newest(tmp_path)


def test_a_disk_that_refuses_while_a_file_is_written_is_said_at_once(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, some(3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(MachineError, match=r"step_00000006: cannot be written \(File too large\)"):
            checkpoint.save(tmp_path, Checkpoint(6, {"model": {"w": torch.ones(1000)}}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000003", "latest"}


def test_too_small_a_disk_is_said_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"checkpoints need 1000000000.0 GB, .* GB are free"):
        checkpoint.check_space(tmp_path / "not" / "there", keep=3, size=25 * 10**16)


def test_checkpoints_that_lie_there_need_no_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3, 4):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, left=5 - step: SimpleNamespace(free=10 * left))
        checkpoint.check_space(tmp_path, keep=3, size=10)
        with pytest.raises(MachineError, match="checkpoints need"):
            checkpoint.check_space(tmp_path, keep=3, size=11)
        (tmp_path / f"step_{step:08d}").mkdir()


def test_no_pickle_is_in_a_checkpoint(tmp_path: Path) -> None:
    for _ in trained("vae", tmp_path, steps=2, save_every=2):
        pass
    (folder,) = tmp_path.glob("step_*")
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert {path.name for path in folder.iterdir()} == {*manifest, "MANIFEST.json"}
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "latest"}
