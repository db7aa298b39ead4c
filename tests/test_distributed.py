"""Two processes are one: the same global batches, the same losses, and a fault of one is handled by both alike."""

import fcntl
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import environment, few
from PIL import Image
from tiny_training import trained

from ldm import config as configuration
from ldm.bundle import Bundle
from ldm.data.shards import write_shards
from ldm.errors import SettingError
from ldm.training import checkpoint
from ldm.training.batch import Batch, Draws
from ldm.training.loop import Conduct
from ldm.training.optimization import OptimizationConfig, micro_batches
from ldm.training.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "tiny_training.py"
SHORT = {"steps": 6, "save_every": 3}


# Of every kind of training, and of every way to share it, what differs; first one of each way for the quick tests.
SHARED = [
    ("clip", "strategy=ddp"), ("lora", "strategy=fsdp"),
    ("vae", "strategy=ddp"), ("unet", "strategy=ddp"), ("unet", "strategy=fsdp"), ("unet", "optimizer=muon"),
    ("conditioned", "strategy=ddp"), ("conditioned", "strategy=fsdp"), ("conditioned", "optimizer=muon"),
    ("resting", "strategy=ddp"), ("resting", "strategy=fsdp"),
    ("vae", "strategy=fsdp"), ("gan", "strategy=ddp"), ("thumbnail", "strategy=ddp"), ("thumbnail", "strategy=fsdp"),
    ("clip", "strategy=fsdp"), ("sigmoid", "strategy=ddp"), ("sigmoid", "strategy=fsdp"), ("lora", "strategy=ddp"),
    ("consistency", "strategy=ddp"), ("consistency", "strategy=fsdp"),
]  # fmt: skip


def launched(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a program as `processes` processes on this machine, over gloo."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)


def two(*trainings: tuple[str, Path, str]) -> list[list[dict[str, float]]]:
    """The losses of tiny trainings by the same two processes, one after another."""
    listed: list[str] = []
    for kind, folder, setting in trainings:
        listed += ["+", kind, str(folder), *(f"{key}={value}" for key, value in SHORT.items()), setting]
    done = launched(str(PROGRAM), *listed[1:])
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / "losses.json").read_text()) for _, folder, _ in trainings]


@pytest.mark.parametrize("cases", few([SHARED[:2], SHARED[2:11], SHARED[11:]], SHARED[:2]), ids=["few", "more", "rest"])
def test_two_processes_with_four_each_are_one_with_eight(cases: list[tuple[str, str]], tmp_path: Path) -> None:
    found = two(*[(kind, tmp_path / f"{kind} {setting}", setting) for kind, setting in cases])
    for (kind, setting), together in zip(cases, found, strict=True):
        name, value = setting.split("=")
        folder = tmp_path / f"{kind} {value} alone"
        alone = [report.losses for report in trained(kind, folder, **SHORT, **{name: value})]
        assert len(together) == len(alone)
        for step, (one, other) in enumerate(zip(alone, together, strict=True)):
            for loss in one:
                # Once a judge that tells nothing yet has learned: the gradient of its last bias is nothing but
                # rounding, and Adam makes a whole step of that. What the autoencoder learned is compared all the same.
                if not (kind == "gan" and step == 5 and loss in ("fooling", "loss")):
                    assert other[loss] == pytest.approx(one[loss], rel=1e-5, abs=1e-5), (kind, setting, step, loss)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_only_if_that_is_allowed(tmp_path: Path) -> None:
    alone = [report.losses["loss"] for report in trained("unet", tmp_path / "one", **SHORT)]
    folder = tmp_path / "two"
    two(("unet", folder, "strategy=fsdp"))
    shutil.rmtree(folder / "step_00000006")
    with pytest.raises(SettingError, match=r"saved by 2 processes, now there are 1; .*--allow-world-size-change"):
        next(trained("unet", folder, **SHORT))
    conduct = Conduct(allow_world_size_change=True)
    rest = [report.losses["loss"] for report in trained("unet", folder, conduct, micro_batch_size=4, **SHORT)]
    assert rest == pytest.approx(alone[3:], abs=1e-5)
    shutil.rmtree(folder / "step_00000006")  # and from one process on to two
    rest = [losses["loss"] for losses in two(("unet", folder, "allow_world_size_change=true"))[0]]
    assert rest == pytest.approx(alone[3:], abs=1e-5)


BAD = """
import hashlib, os, sys
sys.path.insert(0, {tests!r})
import tiny_training, torch
task = tiny_training.TASKS["unet"]
def poisoned(kind, settings):
    global module
    module, objective, batches, config, apart = task(kind, settings)
    def losses(network, batch, draws):
        values = objective(network, batch, draws)
        if draws.step == 2 and tiny_training.workers().rank == 1:
            values["loss"] = values["loss"] * float("nan")
        return values
    return module, losses, batches, config, apart
tiny_training.TASKS["unet"] = poisoned
tiny_training.main(*sys.argv[1:])
weights = b"".join(tensor.contiguous().numpy().tobytes() for tensor in module.state_dict().values())
with open(sys.argv[2] + "/weights-" + os.environ["RANK"], "w") as file:
    file.write(hashlib.sha256(weights).hexdigest())
"""


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_process_is_left_out_by_both_and_named(tmp_path: Path) -> None:
    program = tmp_path / "bad.py"
    program.write_text(BAD.format(tests=str(PROGRAM.parent)))
    done = launched(str(program), "unet", str(tmp_path / "two"), "steps=5", "save_every=5")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "skipped" in line]
    assert len(lines) == 1 and re.search(r"step 3: loss nan on rank 1, timesteps \d.*samples picture \d", lines[0])
    after = json.loads((tmp_path / "two" / "losses.json").read_text())
    assert len(after) == 5 and after[3]["loss"] > 0
    first, second = ((tmp_path / "two" / f"weights-{rank}").read_text() for rank in range(2))
    assert first == second != ""


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_the_state_of_both(tmp_path: Path) -> None:
    """With the flags that docs/training.md gives, which torchrun has for this."""
    flags = ("--shutdown-timeout=600", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1")
    (said,) = re.findall(r"`(--shutdown-timeout.*?)`", (ROOT / "docs/training.md").read_text(encoding="utf-8"))
    assert said == " ".join(flags)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *flags]
    training = [str(PROGRAM), "unet", str(tmp_path / "two"), "steps=100000", "save_every=100000"]
    running = subprocess.Popen(
        [sys.executable, *launcher, *training], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert running.stdout is not None
        assert next(line for line in running.stdout if line.startswith("step"))
        running.send_signal(signal.SIGUSR1)
        running.communicate(timeout=400)
    finally:
        running.kill()
    saved = checkpoint.newest(tmp_path / "two")
    assert saved is not None and checkpoint.verify_manifest(saved) is None


# What ends the second process in its third step, and what is said of it. scripts/train.py runs in each.
ENDS = {
    "killed": ("os.kill(os.getpid(), 9)", "processes: rank 1 is gone"),
    "raises": ("raise DataError('shards: gone; bring them back')", "shards: gone; bring them back"),
    "a bug": ("raise KeyError('x')", "a bug in this program"),
    "exits": ("os._exit(0)", "processes: rank 1 is gone"),
    "hangs": ("time.sleep(600)", "processes: rank 1 said nothing for --dist-timeout"),
}
ENDING = """
import os, runpy, sys, time
from ldm.errors import DataError
from ldm.training import farewell, update
from ldm.training.workers import workers
farewell.SECONDS, gradients, calls = 2.0, update.Update.gradients, 0
def ending(self, *arguments):
    global calls
    calls += 1
    if calls == 3 and workers().rank == 1:
        {end}
    return gradients(self, *arguments)
update.Update.gradients = ending
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DIGITS = """
name: tiny
data: {digits: bundled}
model:
  autoencoder: {kind: pixels, image_channels: 1}
  text: {kind: labels, labels: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"], width: 8}
  unet: {in_channels: 1, out_channels: 1, channels: 8, multipliers: [1, 2], res_blocks: 1, attention: [false, true],
    heads: 2, context_width: 8, groups: 4}
  sampling: {width: 28, height: 28}
unet_training:
  - {side: 28, pictures: 40, steps: 4, batch_size: 8, learning_rate: 1e-3, precision: "no", save_every: 2}
sample_prompts: ["1"]
sample_every: 100
"""


def pair(program: Path, port: int, *arguments: str) -> list["subprocess.Popen[str]"]:
    """Two processes of one run without a launcher, which would end the one for the other."""
    common = {**environment(), "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, str(program), str(ROOT / "scripts" / "train.py"), *arguments],
            env={**common, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_a_process_that_ends_or_hangs_ends_the_other_and_is_named(how: str, tmp_path: Path) -> None:
    end, words = ENDS[how]
    program, recipe = tmp_path / "ending.py", tmp_path / "tiny.yaml"
    program.write_text(ENDING.format(end=end))
    recipe.write_text(DIGITS)
    run = tmp_path / "run"
    flags = ("unet", "--config", str(recipe), "--run-dir", str(run), "--report-to", "none")
    first, second = pair(program, free_port(), *flags, "--dist-timeout", "10")
    try:
        _, said = first.communicate(timeout=400)
        if how == "hangs":
            assert second.poll() is None
        else:
            said += second.communicate(timeout=60)[1]
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 5
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert words in error and "Traceback" not in said
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and ("KeyError: 'x'" if how == "a bug" else words) in status["error"]
    assert status["rank"] == (1 if how in ("raises", "a bug") else 0)
    again = ("--allow-world-size-change", "unet_training.0.micro_batch_size=4")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *flags, *again],
        env=environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_processes_leave_the_folder_of_another_run_as_it_is_and_say_so_once(tmp_path: Path) -> None:
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(DIGITS)
    run.mkdir()
    flags = ("unet", "--config", str(recipe), "--run-dir", str(run), "--report-to", "none")
    program = tmp_path / "plain.py"
    program.write_text("import runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = "".join(one.communicate(timeout=400)[1] for one in pair(program, free_port(), *flags))
    assert (
        len([line for line in said.splitlines() if line.startswith("error: ")]) == 1 and "another run is using" in said
    )
    assert [path.name for path in run.iterdir()] == [".lock"]
    said = "".join(one.communicate(timeout=400)[1] for one in pair(program, free_port(), *flags, "data.digits=nowhere"))
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1 and "nowhere" in said


@pytest.mark.slow
def test_accelerate_launches_training(tmp_path: Path) -> None:
    """Without GPUs one process, whatever is asked for; docs/training.md says so."""
    (tmp_path / "tiny.yaml").write_text(DIGITS)
    flags = ["unet", "--config", str(tmp_path / "tiny.yaml"), "--run-dir", str(tmp_path / "run"), "--report-to", "none"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launcher, "--main_process_port", str(free_port()), str(ROOT / "scripts" / "train.py"), *flags],
        env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["world"]) == ("finished", 1)


ENCODING = """
import os, runpy, sys, time
from ldm.training import farewell, stages
farewell.SECONDS, parts = 2.0, stages.encoded_parts
def ending(*arguments):
    yield 0
    {end}
stages.encoded_parts = ending
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "raises", "hangs"])
def test_who_waits_for_latents_notices_that_nobody_makes_them(how: str, tmp_path: Path) -> None:
    end, words = ENDS[how]
    program, recipe = tmp_path / "encoding.py", tmp_path / "tiny.yaml"
    program.write_text(ENCODING.format(end=end.replace("DataError", "OSError")))
    recipe.write_text(DIGITS)
    flags = ("unet", "--config", str(recipe), "--run-dir", str(tmp_path / "run"), "--report-to", "none")
    first, second = pair(program, free_port(), *flags, "--dist-timeout", "10")
    try:
        said = second.communicate(timeout=400)[1]
    finally:
        first.kill()
        second.kill()
    assert second.returncode == 5 and "Traceback" not in said
    if how != "raises":
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert words.replace("rank 1", "rank 0") in error
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and status["rank"] == (0 if how == "raises" else 1)


def test_draws_of_parts_are_those_of_the_whole() -> None:
    whole = Draws(seed=3, step=5, total=8)
    known = whole.normal(2, 2), whole.integers(100), whole.uniform()
    parts = Draws(seed=3, step=5, total=8)
    for rows in (slice(0, 4), slice(4, 6), slice(6, 8)):
        part = parts.part(rows)
        for values, expected in zip((part.normal(2, 2), part.integers(100), part.uniform()), known, strict=True):
            assert torch.equal(values, expected[rows])
    assert not torch.equal(Draws(3, 6, 8).normal(2), Draws(3, 5, 8).normal(2))


def test_noise_is_normal_and_independent_between_samples_steps_and_draws() -> None:
    draws = Draws(seed=3, step=5, total=64)
    found = torch.cat(
        [draws.normal(1000), draws.normal(1000), Draws(3, 6, 64).normal(1000), Draws(4, 5, 64).normal(1000)]
    )
    assert abs(found.mean()) < 0.01 and abs(found.std() - 1) < 0.01
    correlation = torch.corrcoef(found) - torch.eye(256)
    assert correlation.abs().max() < 0.17  # of 32,640 pairs; one number in 1.4 million lies beyond √1000 · 0.17 = 5.4 σ


def test_a_process_draws_noise_for_its_own_samples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *given, **named: drawn.append(given) or randn(*given, **named))
    assert Draws(seed=0, step=0, total=2048).part(slice(32, 34)).normal(4, 8, 8).shape == (2, 4, 8, 8)
    assert len(drawn) == 2


def test_a_part_of_a_batch_keeps_what_is_shared() -> None:
    batch = Batch((torch.arange(4), torch.arange(4) * 10), (torch.ones(1),), ("a", "b", "c", "d"))
    part = batch.part(slice(1, 3))
    assert part.rows[1].tolist() == [10, 20] and part.keys == ("b", "c") and part.shared == batch.shared


def test_a_share_is_divided_into_equal_micro_batches() -> None:
    config = OptimizationConfig(steps=1, batch_size=24, micro_batch_size=4, learning_rate=1.0)
    assert [(part.start, part.stop) for part in micro_batches(config, world=2)] == [(0, 4), (4, 8), (8, 12)]
    with pytest.raises(SettingError, match="24 samples cannot be divided equally over 5 processes"):
        micro_batches(config, world=5)
    assert os.environ.get("WORLD_SIZE") is None, "this test is one process"


SHRUNK = {
    "model.autoencoder": "{kind: kl, channels: 8, multipliers: [1, 2], res_blocks: 1, mid_attention: true, groups: 4}",
    "model.text": "{kind: clip, width: 16, layers: 2, heads: 2, context_length: 8, vocabulary: 600}",
    "model.unet": "{channels: 8, multipliers: [1, 2], res_blocks: 1, attention: [true, false], heads: 2, groups: 4, "
    "context_width: 16}",
    "model.sampling": "{width: 32, height: 32}",
    "clip": "{embedding: 16, image_size: 32, width: 4, layers: [1, 1, 1, 1]}",
    "data.workers": "0",
    "sample_prompts": "[a red circle]",
}
QUICKLY = {"steps": "2", "batch_size": "4", "warmup_steps": "0", "precision": "'no'"}


def shrunk(name: str, shards: str, strategy: str) -> list[str]:
    """Overrides that make a recipe's networks and batches tiny and its stages two steps long, and leave all else."""
    recipe = configuration.load(ROOT / "configs" / f"{name}.yaml", Recipe)
    stages = ["autoencoder_training", *(f"unet_training.{i}" for i in range(len(recipe.unet_training)))]
    found = {**SHRUNK, "data.shards": shards}
    for stage in stages:
        found |= {f"{stage}.{key}": value for key, value in {**QUICKLY, "micro_batch_size": "1"}.items()}
        found[f"{stage}.strategy"] = strategy
    found |= {f"clip_training.{key}": value for key, value in {**QUICKLY, "strategy": strategy}.items()}
    found |= {f"{stage}.side": "32" for stage in stages[1:]} | {f"{stage}.compile": "false" for stage in stages[1:]}
    found |= {"autoencoder_training.crop": "32", "autoencoder_training.sides": "[32]"}
    judge = "{channels: 4, layers: 1, groups: 2}" if strategy == "ddp" else "null"
    found |= {"autoencoder_training.discriminator": judge, "autoencoder_training.discriminator_start": "1"}
    return [f"{key}={value}" for key, value in found.items()]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_recipes_of_stable_diffusion_run_all_stages_on_two_processes(name: str, strategy: str, tmp_path: Path) -> None:
    write_shards(samples(40), tmp_path / "data", 20, "shapes")
    flags = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--run-dir", str(tmp_path / "run")]
    overrides = shrunk(name, str(tmp_path / "data" / "*.tar"), strategy)
    done = launched(str(ROOT / "scripts" / "train.py"), "all", *flags, *overrides)
    assert done.returncode == 0, done.stderr
    assert Bundle.load(str(tmp_path / "run" / name)).config.prediction == {"sd15": "eps", "sd21": "v"}[name]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = Counter(row["stage"] for row in rows)
    assert set(steps.values()) == {2} and {"autoencoder", "clip", "unet-0", "unet-2"} <= set(steps)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


def samples(count: int) -> Iterator[dict[str, object]]:
    """Captioned pictures of one colour, 32×32."""
    for i in range(count):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (i * 6, 255 - i * 6, 128)).save(file, "PNG")
        yield {"__key__": f"{i:04d}", "png": file.getvalue(), "txt": f"shade {i % 7}"}
