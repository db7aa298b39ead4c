"""Wrong input to scripts/train.py, and runs that are stopped, taken up again or held twice: exit codes and lines."""

import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import Ended, Script, tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_distributed import DIGITS, samples

from ldm import config as configuration
from ldm.bundle import Bundle
from ldm.data.shards import write_shards
from ldm.errors import SettingError
from ldm.pipeline import TextToImage
from ldm.request import GenerationRequest
from ldm.training import continuity, latents, record, update
from ldm.training.checkpoint import load_tensors
from ldm.training.loop import Report
from ldm.training.recipe import Recipe
from ldm.training.run import Run
from ldm.training.stages import averaged
from ldm.training.workers import workers


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(DIGITS)
    return path


def check(ended: Ended, code: int, *words: str) -> None:
    """The error contract: exit code, exactly one line that says what is wrong and what to do, no traceback."""
    assert ended.code == code, ended.err
    assert len(ended.errors) == 1 and "; " in ended.errors[0] and "Traceback" not in ended.err
    assert all(word in ended.errors[0] for word in words), ended.errors[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("unet_training.0.batch_sise=8", ("batch_sise", "batch_size")),
        ("unet_training.0.learning_rate=abc", ("learning_rate", "'abc'")),
        ("unet_training.0.learning_rate=0", ("learning_rate",)),
        ("unet_training.0.learning_rate=nan", ("learning_rate",)),
        ("unet_training.0.learning_rate=-1e-4", ("learning_rate",)),
        ("unet_training.0.batch_size=0", ("batch_size",)),
        ("unet_training.0.micro_batch_size=0", ("micro_batch_size",)),
        ("unet_training.0.micro_batch_size=3", ("8 samples cannot be divided equally",)),
        ("unet_training.0.steps=0", ("steps",)),
        ("unet_training.0.more_ema_decays=[0.999]", ("different numbers",)),
        ("unet_training.0.latents=data/*.tar", ("pictures or latents",)),
        ("unet_training.0.pictures=7", ("pictures 7 do not fill one batch", "8 or more")),
        ("trian.lr=1", ("trian",)),
        ("unet_training.0.steps", ("section.key=value",)),
        ("=5", ("section.key=value",)),
        ("unet_training.0.precision=fp8", ("precision",)),
        ("data.digits=nowhere", ("nowhere",)),
    ],
)
def test_a_wrong_value_is_said_before_anything_is_computed(
    train: Script, recipe: Path, tmp_path: Path, override: str, words: tuple[str, ...]
) -> None:
    ended = train("unet", "--config", recipe, "--run-dir", tmp_path / "run", override)
    check(ended, 3 if "nowhere" in override else 2, *words)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "100000"])
def test_a_limit_of_time_that_is_none_is_refused(train: Script, recipe: Path, tmp_path: Path, minutes: str) -> None:
    ended = train("unet", "--config", recipe, "--run-dir", tmp_path / "run", f"--minutes={minutes}")
    check(ended, 2, f"--minutes: got {minutes}, expected more than 0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("\tname: x", "tiny.yaml:1"),
        ("name: x\nname: y", "tiny.yaml:2: not valid YAML: key 'name' is given twice"),
        ("name: x\ndata: {digits: bundled}\nsample_prompts: [a]", "nothing is trained"),
        ("name: x\ndata:\n  digits: bundled\n  mirorr: 0.5", "tiny.yaml:4: data.mirorr: no such key (did you mean 'mi"),
        (
            "name: x\ndata: {digits: bundled}\nunet_training:\n  - side: 8\n    steps: many",
            "tiny.yaml:5: unet_training.0.steps: ",
        ),
    ],
    ids=["empty", "tab", "twice", "nothing to train", "unknown", "wrong type"],
)
def test_a_wrong_recipe_is_said_with_its_line(
    train: Script, recipe: Path, tmp_path: Path, text: str, words: str
) -> None:
    recipe.write_text(text)
    check(train("all", "--config", recipe, "--run-dir", tmp_path / "run"), 2, words)


def test_a_run_taken_up_again_is_the_same_run(train: Script, recipe: Path, tmp_path: Path) -> None:
    flags = ("unet", "--config", recipe, "--run-dir", tmp_path / "run")
    assert train(*flags).code == 0
    check(train(*flags, "model.unet.channels=16"), 2, "model.unet.channels was 8 and is 16")
    check(train(*flags, "unet_training.0.batch_size=4"), 2, "unet_training.0.batch_size was 8 and is 4")
    check(train(*flags, "data.crop=random"), 2, "data.crop was centre and is random")
    slower = train(*flags, "unet_training.0.learning_rate=5e-4")
    assert slower.code == 0 and "learning_rate was 0.001 and is 0.0005, but that stage is finished" in slower.err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    shown = train(*flags, "model.examples=['7', '4']")
    assert shown.code == 0 and "model.examples.1 was None and is 4" in shown.err


SETTINGS = {
    "any": ("seed", "data.crop", "model.unet.channels"),
    "autoencoder": ("autoencoder_training.crop",),
    "clip": ("clip_training.batch_size", "clip.width"),
    "thumbnail": ("thumbnail_training", "thumbnail_training.steps"),
    "unet-0": ("unet_training.0.pictures", "unet_training.0.train_text, there or later"),
    "unet-1": ("unet_training.1.pictures", "unet_training.1.train_text"),
    "lora": ("lora_training.rank",),
    "consistency": ("consistency_training.side",),
    "evaluator": ("evaluator_training.batch_size", "evaluator.clip.width"),
}


@pytest.mark.parametrize(
    ("begun", "settled"),
    [
        ("", ""),
        ("checkpoints/clip", "any autoencoder clip"),
        ("text.safetensors", "any autoencoder clip"),
        ("unet-0.safetensors", "any autoencoder clip thumbnail unet-0"),
        ("checkpoints/unet-1", "any autoencoder clip thumbnail unet-0 unet-1"),
        ("unet-consistency.safetensors", "any autoencoder clip thumbnail unet-0 unet-1 lora consistency"),
        ("checkpoints/evaluator", "any evaluator"),
    ],
)
def test_a_setting_is_settled_once_its_stage_or_one_behind_it_has_begun(
    recipe: Path, tmp_path: Path, begun: str, settled: str
) -> None:
    run = Run(configuration.load(recipe, Recipe), tmp_path)
    if begun:
        (tmp_path / begun).mkdir(parents=True)
        if begun.endswith("safetensors"):
            (tmp_path / begun).rmdir()
            (tmp_path / begun).touch()
    found = {stage for stage, names in SETTINGS.items() for name in names if continuity.begun(name, run)}
    assert sorted(found) == sorted(settled.split())
    assert all(len({continuity.begun(name, run) for name in names}) == 1 for names in SETTINGS.values())


def test_a_stage_that_has_not_begun_takes_another_recipe(train: Script, recipe: Path, tmp_path: Path) -> None:
    flags = ("--config", recipe, "--run-dir", tmp_path / "run")
    assert train("unet", *flags).code == 0
    second = (
        '  - {side: 28, pictures: 12, steps: 1, batch_size: 2, learning_rate: 1e-3, precision: "no"}\nsample_prompts'
    )
    recipe.write_text(DIGITS.replace("sample_prompts", second))
    check(train("unet", *flags, "unet_training.0.batch_size=4"), 2, "unet_training.0.batch_size was 8 and is 4")
    assert train("unet", *flags).code == 0
    assert (tmp_path / "run" / "unet-1.safetensors").is_file()
    recipe.write_text(DIGITS)
    check(train("unet", *flags), 2, "this run began with another recipe, unet_training.1.")


def test_a_further_stage_may_train_the_tower_if_those_before_it_read_tokens_all_the_same(
    recipe: Path, tmp_path: Path
) -> None:
    digits = configuration.load(recipe, Recipe)
    (stage,), run = digits.unet_training, Run(digits, tmp_path)

    def training(*train_text: bool) -> dict[str, object]:
        stages = tuple(stage.model_copy(update={"train_text": one}) for one in train_text)
        return continuity.settings(digits.model_copy(update={"unet_training": stages}))

    run.product("unet-0").touch()
    for before in (training(True), training(True, False)):
        continuity.compare(before, training(True, True), run)
    continuity.compare(training(False), training(False, False), run)
    for before in (training(False), training(False, False)):
        with pytest.raises(SettingError, match=r"unet_training.0.train_text, there or later was False and is True"):
            continuity.compare(before, training(False, True), run)
    run.product("unet-1").touch()
    with pytest.raises(SettingError, match=r"unet_training.1.train_text, there or later was False and is True"):
        continuity.compare(training(True, False), training(True, False, True), run)


def test_what_is_free_to_change_is_taken_from_there_on(
    train: Script, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("unet", "--config", recipe, "--run-dir", tmp_path / "run", "unet_training.0.warmup_steps=0")
    interrupted(train, monkeypatch, *flags, "unet_training.0.decay=0")
    made = (tmp_path / "run" / "latents" / "28.safetensors").stat().st_mtime_ns
    changed = ("unet_training.0.learning_rate=5e-4", "unet_training.0.save_every=1", "data.workers=1")
    ended = train(*flags, "unet_training.0.decay=0", *changed)
    assert ended.code == 0 and "learning_rate was 0.001 and is 0.0005 from here on" in ended.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows] == [0.001, 0.001, 0.0005, 0.0005]
    kept = {path.name for path in (tmp_path / "run" / "checkpoints" / "unet-0").glob("step_*")}
    assert kept == {"step_00000003", "step_00000004"}
    assert (tmp_path / "run" / "latents" / "28.safetensors").stat().st_mtime_ns == made, "they are the same latents"


def interrupted(train: Script, monkeypatch: pytest.MonkeyPatch, *flags: object) -> Ended:
    """Train, and be told to stop after the first step."""
    step = record.Record.step

    def signalled(self: record.Record, stage: str, report: Any) -> None:
        step(self, stage, report)
        if report.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(record.Record, "step", signalled)
        return train(*flags)


def test_a_run_does_not_go_on_with_other_data(train: Script, recipe: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_shards(samples(8), tmp_path / name, 4, "shades")
    base, run = tiny_model().save(tmp_path / "base"), tmp_path / "run"
    recipe.write_text(LORA)
    flags = ("lora", "--config", recipe, "--run-dir", run, "--base", base)
    assert train(*flags, f"data.shards={tmp_path / 'one'}").code == 0
    check(train(*flags, f"data.shards={tmp_path / 'two'}"), 2, "data.shards was", "one and is", "two")


def test_a_folder_that_another_run_uses_is_refused(train: Script, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check(train("unet", "--config", recipe, "--run-dir", tmp_path / "run"), 2, "another run is using this folder")
    assert train("unet", "--config", recipe, "--run-dir", tmp_path / "run").code == 0, "a lock dies with its process"


def test_a_signal_saves_and_ends_with_75(
    train: Script, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("unet", "--config", recipe, "--run-dir", tmp_path / "run", "unet_training.0.save_every=100")
    drawn: list[int] = []
    monkeypatch.setattr("ldm.training.stages.averaged", lambda bundle, report: drawn.append(report.step))
    ended = interrupted(train, monkeypatch, *flags, "sample_every=1")
    assert ended.code == 75 and "stopped by SIGTERM; the state is saved" in ended.err
    assert drawn == [1], "who waits for the end does not wait for pictures"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "saved"
    assert (tmp_path / "run" / "checkpoints" / "unet-0" / "step_00000002").is_dir()
    assert train(*flags).code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_a_signal_while_pictures_are_drawn_does_not_wait_for_them(
    train: Script, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = TextToImage.draw

    def signalled(self: TextToImage, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, *arguments)

    monkeypatch.setattr("ldm.training.stages.averaged", averaged)
    monkeypatch.setattr(TextToImage, "draw", signalled)
    assert train("unet", "--config", recipe, "--run-dir", tmp_path / "run", "sample_every=1").code == 75
    assert (tmp_path / "run" / "checkpoints" / "unet-0" / "step_00000002").is_dir()
    assert not list((tmp_path / "run" / "samples").glob("*.png"))


def test_checkpoints_of_which_none_is_whole_end_with_4(train: Script, recipe: Path, tmp_path: Path) -> None:
    flags = ("unet", "--config", recipe, "--run-dir", tmp_path / "run")
    assert train(*flags).code == 0
    for state in (tmp_path / "run" / "checkpoints" / "unet-0").glob("step_*/state.json"):
        state.unlink()
    (tmp_path / "run" / "unet-0.safetensors").unlink()
    check(train(*flags), 4, "not one of its 2 checkpoints is whole")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


LORA = """
name: tiny-lora
data: {shards: nothing/*.tar}
lora_training: {side: 64, steps: 2, batch_size: 2, learning_rate: 1e-3, precision: "no", rank: 2}
sample_prompts: [a]
"""


def test_an_adaptation_needs_its_base_and_keeps_to_it(train: Script, recipe: Path, tmp_path: Path) -> None:
    write_shards(samples(8), tmp_path / "data", 4, "shades")
    recipe.write_text(LORA)
    data = f"data.shards={tmp_path / 'data'}/*.tar"
    flags = ("lora", "--config", recipe, "--run-dir", tmp_path / "run", data)
    check(train(*flags), 2, "--base")
    base = tiny_model().save(tmp_path / "base")
    assert train(*flags, "--base", base).code == 0
    assert (tmp_path / "run" / "lora.safetensors").is_file() and (tmp_path / "run" / "tiny-lora").is_dir()
    other = tiny_model()
    other.unet.conv_in.bias.data += 1
    check(
        train(*flags, "--base", other.save(tmp_path / "other")),
        4,
        "this run began with base (sha256",
        "now it is other",
    )


def test_a_word_is_learned_for_its_base(train: Script, recipe: Path, tmp_path: Path) -> None:
    write_shards(samples(8), tmp_path / "data", 4, "shades")
    recipe.write_text(
        LORA.replace("lora_training", "inversion_training").replace("rank: 2", 'word: "<hue>", begin: the')
    )
    flags = ("inversion", "--config", recipe, "--run-dir", tmp_path / "run", f"data.shards={tmp_path / 'data'}")
    check(train(*flags), 2, "--base")
    model = tiny_model()
    assert train(*flags, "--base", model.save(tmp_path / "base")).code == 0
    word = load_tensors(tmp_path / "run" / "word.safetensors")
    assert {name: tensor.shape for name, tensor in word.items()} == {"<hue>": (1, 32)}


def test_a_distilled_model_is_a_bundle_that_draws_in_four_steps(train: Script, recipe: Path, tmp_path: Path) -> None:
    write_shards(samples(8), tmp_path / "data", 4, "shades")
    recipe.write_text(LORA.replace("lora_training", "consistency_training").replace("rank: 2", "guidance_scale: 3"))
    data = f"data.shards={tmp_path / 'data'}/*.tar"
    flags = ("consistency", "--config", recipe, "--run-dir", tmp_path / "run", data, "sample_every=1")
    check(train(*flags), 2, "--base")
    model = tiny_model()
    torch.nn.init.normal_(model.unet.conv_out.weight)
    assert train(*flags, "--base", model.save(tmp_path / "base")).code == 0
    made = Bundle.load(str(tmp_path / "run" / "tiny-lora"))
    sampling = made.config.sampling
    assert (sampling.sampler, sampling.steps, sampling.guidance_scale) == ("lcm", 4, 1.0)
    assert not torch.equal(made.unet.conv_out.weight, model.unet.conv_out.weight.half().float())
    looks: list[int] = []
    made.unet.register_forward_pre_hook(lambda _, given: looks.append(len(given[2])))  # texts
    assert len(list(TextToImage(made)(GenerationRequest(prompt="a", seed=0)))) == 1 and looks == [1, 1, 1, 1]


def test_a_signal_while_latents_are_made_ends_with_75(
    train: Script, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, encode = ("unet", "--config", recipe, "--run-dir", tmp_path / "run"), latents.encode

    def signalled(*arguments: Any) -> Any:
        for report in encode(*arguments):
            os.kill(os.getpid(), signal.SIGUSR1)
            yield report

    with monkeypatch.context() as patch:
        patch.setattr(latents, "encode", signalled)
        assert train(*flags).code == 75
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "saved"
    assert not (tmp_path / "run" / "log.jsonl").exists() and train(*flags).code == 0


def test_a_log_that_cannot_be_written_does_not_end_the_run(train: Script, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    (tmp_path / "run" / "status.json").mkdir()
    ended = train("unet", "--config", recipe, "--run-dir", tmp_path / "run")
    assert ended.code == 0 and "log.jsonl: Is a directory" in ended.err and "status.json: Is a directory" in ended.err


def test_a_log_that_is_removed_and_a_clock_that_jumps_do_not_end_the_run(
    train: Script, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps, step = itertools.cycle([1e9, 2e9, 0.0]), record.Record.step

    def unlucky(self: record.Record, stage: str, report: Any) -> None:
        step(self, stage, report)
        if report.step == 2:
            (tmp_path / "run" / "log.jsonl").unlink()

    monkeypatch.setattr(record.Record, "step", unlucky)
    monkeypatch.setattr(record.time, "time", lambda: next(jumps))
    assert train("unet", "--config", recipe, "--run-dir", tmp_path / "run").code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 4] and all(row["rate"] > 0 for row in rows)


def test_tensorboard_is_told_every_number_unless_another_is_chosen(tmp_path: Path) -> None:
    me = workers()  # before any tracker: accelerate's ask who they are
    (tracker,) = record.trackers(None, "tiny", tmp_path)
    kept = record.Record(tmp_path, me, [tracker])
    for step in (1, 2):
        kept.step("unet", Report(step, 2, {"loss": 1.0 / step}, 1e-3, 1.0, 5.0, 0, dict))
    kept.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("unet/loss")] == [(1, 1.0), (2, 0.5)]
    assert {"unet/learning_rate", "unet/grad_norm", "unet/rate", "unet/skipped"} < set(read.Tags()["scalars"])
    assert record.trackers("none", "tiny", tmp_path) == []


def test_a_folder_that_tensorboard_cannot_write_to_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    assert record.trackers("tensorboard", "tiny", tmp_path) == []
    assert "tensorboard cannot write there" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread ends
def test_a_tracker_that_cannot_write_any_more_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    me = workers()  # before any tracker: accelerate's ask who they are
    kept = record.Record(tmp_path, me, record.trackers(None, "tiny", tmp_path))
    for step in range(1, 5):
        kept.step("unet", Report(step, 4, {"loss": 1.0}, 1e-3, 1.0, 5.0, 0, dict))
        if step == 1:
            shutil.rmtree(tmp_path / "tensorboard")
    kept.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    assert capsys.readouterr().err.count("tensorboard cannot write (No such file or directory)") == 1


class FakeRun:
    """A run of W&B that keeps what it is told."""

    def __init__(self, **how: Any) -> None:
        self.how, self.defined, self.logged = how, list[tuple[str, str]](), list[tuple[dict[str, Any], int | None]]()

    def define_metric(self, name: str, step_metric: str) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((values, step))


def test_stages_that_count_from_one_are_one_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(fake, "init", FakeRun, raising=False)
    me = workers()  # before any tracker: accelerate's ask who they are
    for stages in (("vae", "unet"), ("unet",)):  # and the second time it goes on
        (tracker,) = record.trackers("wandb", "tiny", tmp_path)
        kept = record.Record(tmp_path, me, [tracker])
        for stage in stages:
            for step in (1, 2):
                kept.step(stage, Report(step, 3, {"loss": math.nan}, 1e-3, 1.0, 5.0, 0, dict))
        run = tracker.tracker
        assert run.how["project"] == "tiny" and run.how["resume"] == "allow" and run.how["dir"] == str(tmp_path)
        assert run.how["id"] == (tmp_path / "wandb.txt").read_text().strip()
        assert run.defined == [(f"{stage}/*", f"{stage}/step") for stage in stages]
        told = [values[f"{stage}/step"] for stage in stages for values, _ in run.logged if f"{stage}/loss" in values]
        assert told == [1, 2] * len(stages)
        assert {step for _, step in run.logged} == {None}, "W&B drops what is behind its last step"


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    kept = record.Record(tmp_path, workers())
    kept.step("unet", Report(3, 3, {"loss": math.nan}, 1e-3, math.inf, 5.0, 1, dict))
    for file in ("log.jsonl", "status.json"):
        row = json.loads((tmp_path / file).read_text(), parse_constant=lambda name: pytest.fail(name))
        assert row["loss"] is None and row["grad_norm"] is None and row["skipped"] == 1


def test_what_ends_a_run_before_it_begins_is_in_its_status(train: Script, recipe: Path, tmp_path: Path) -> None:
    flags = ("unet", "--config", recipe, "--run-dir", tmp_path / "run")
    assert train(*flags).code == 0
    status = tmp_path / "run" / "status.json"
    assert json.loads(status.read_text())["state"] == "finished"
    ended = train(*flags, "data.digits=null", f"data.shards={tmp_path / 'not mounted'}")
    assert ended.code == 3
    said = json.loads(status.read_text())
    assert said["state"] == "failed" and "not mounted" in said["error"]


def test_a_bug_is_a_failure_too(train: Script, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> None:
        raise RuntimeError("a kernel that is none")

    monkeypatch.setattr(update.Update, "gradients", wrong)
    assert train("unet", "--config", recipe, "--run-dir", tmp_path / "run").code == 1
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and status["error"] == "RuntimeError: a kernel that is none"


# A recipe that has all stages, which none of these tests begins.
WHOLE = """
name: tiny-whole
data: {shards: SHARDS}
model:
  autoencoder: {kind: kl, channels: 8, multipliers: [1, 2], res_blocks: 1, mid_attention: false, groups: 4}
  text: {kind: clip, width: 16, layers: 1, heads: 2, context_length: 8, vocabulary: 600, padding: zero}
  unet: {channels: 8, multipliers: [1, 2], res_blocks: 1, attention: [false, true], heads: 2, context_width: 16,
    groups: 4}
  sampling: {width: 32, height: 32}
clip: {embedding: 8, image_size: 32, width: 4, layers: [1, 1, 1, 1]}
autoencoder_training: {steps: 2, batch_size: 2, learning_rate: 1e-3, crop: 16, sides: [32]}
clip_training: {steps: 2, batch_size: 2, learning_rate: 1e-3}
unet_training: [{side: 32, steps: 2, batch_size: 2, learning_rate: 1e-3}]
sample_prompts: [a]
"""


@pytest.mark.parametrize(
    ("stage", "overrides", "words"),
    [
        ("unet", (), "there is no autoencoder in"),
        ("unet", ("autoencoder_training=null",), "there is no autoencoder in"),
        ("all", ("clip=null", "clip_training=null"), "there is no text tower in"),
        ("all", ("autoencoder_training=null",), "there is no autoencoder in"),
        ("all", ("clip=null",), "clip and clip_training come together"),
        ("vae", ("autoencoder_training=null",), "vae: this recipe has no section for it"),
        ("clip", ("clip=null", "clip_training=null"), "clip: this recipe has no section for it"),
        ("thumbnail", (), "thumbnail: this recipe has no section for it"),
        ("evaluator", (), "evaluator: this recipe has no section for it"),
        ("unet", ("unet_training=[]",), "unet: this recipe has no section for it"),
        ("all", ("fine_tune=true",), "--base: fine_tune begins with"),
        ("vae", ("autoencoder_training.crop=15",), "expected a multiple of 2"),
        ("vae", ("autoencoder_training.from_base=true",), "--base: autoencoder_training.from_base begins with"),
        ("clip", ("clip_training.from_base=true",), "--base: clip_training.from_base begins with"),
    ],
)
def test_what_a_stage_lacks_is_said_before_anything_is_computed(
    train: Script, recipe: Path, tmp_path: Path, stage: str, overrides: tuple[str, ...], words: str
) -> None:
    write_shards(samples(8), tmp_path / "data", 4, "shades")
    recipe.write_text(WHOLE.replace("SHARDS", str(tmp_path / "data")))
    check(train(stage, "--config", recipe, "--run-dir", tmp_path / "run", *overrides), 2, words)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_recipe_of_an_autoencoder_alone_ends_with_it(train: Script, recipe: Path, tmp_path: Path) -> None:
    write_shards(samples(8), tmp_path / "data", 4, "shades")
    recipe.write_text(WHOLE.replace("SHARDS", str(tmp_path / "data")))
    alone = ("clip=null", "clip_training=null", "unet_training=[]")
    assert train("all", "--config", recipe, "--run-dir", tmp_path / "run", *alone).code == 0
    assert (tmp_path / "run" / "autoencoder.safetensors").is_file()


def test_an_autoencoder_can_begin_as_that_of_the_base(train: Script, recipe: Path, tmp_path: Path) -> None:
    write_shards(samples(8), tmp_path / "data", 4, "shades")
    recipe.write_text(WHOLE.replace("SHARDS", str(tmp_path / "data")))
    shape = "model.autoencoder.multipliers=[1,1,2,2]"
    flags = ("vae", "--config", recipe, "--base", tiny_model().save(tmp_path / "base"), shape)
    still = ("autoencoder_training.from_base=true", "autoencoder_training.learning_rate=1e-20")
    ended = train(*flags, "--run-dir", tmp_path / "run", *still)
    assert ended.code == 0, ended.err
    base = load_tensors(tmp_path / "base" / "autoencoder.safetensors")
    learned = load_tensors(tmp_path / "run" / "autoencoder.safetensors")
    assert base and all(torch.allclose(learned[name], base[name].float(), atol=1e-6) for name in base)
    other = train(*flags, "--run-dir", tmp_path / "other", *still, "model.autoencoder.res_blocks=2")
    check(other, 2, "from_base: model.autoencoder.res_blocks is 2, that of base 1; use 1")


def test_a_text_tower_can_begin_as_that_of_the_base(train: Script, recipe: Path, tmp_path: Path) -> None:
    write_shards(samples(8), tmp_path / "data", 4, "shades")
    recipe.write_text(WHOLE.replace("SHARDS", str(tmp_path / "data")))
    model = tiny_model()
    shape = model.config.text.model_dump(mode="json")
    text = (f"model.text={json.dumps(shape)}", f"model.unet.context_width={shape['width']}")
    flags = ("clip", "--config", recipe, "--base", model.save(tmp_path / "base"), *text)
    base = load_tensors(tmp_path / "base" / "text.safetensors")
    for run, begins in (("run", True), ("anew", False)):
        settings = (f"clip_training.from_base={str(begins).lower()}", "clip_training.learning_rate=1e-20")
        ended = train(*flags, "--run-dir", tmp_path / run, *settings)
        assert ended.code == 0, ended.err
        learned = load_tensors(tmp_path / run / "text.safetensors")
        assert base and all(torch.allclose(learned[name], base[name].float(), atol=1e-6) for name in base) is begins
    other = train(*flags, "--run-dir", tmp_path / "other", "clip_training.from_base=true", "model.text.layers=3")
    check(other, 2, f"from_base: model.text.layers is 3, that of base {shape['layers']}; use {shape['layers']}")
    tower = {"clip": {"embedding": 8, "image_size": 32, "width": 4, "layers": [1, 1, 1, 1]}, "text": shape}
    learning = {"from_base": True, "steps": 2, "batch_size": 2, "learning_rate": 1e-3}
    judge = (f"evaluator={json.dumps(tower)}", f"evaluator_training={json.dumps(learning)}")
    check(train(*flags, "--run-dir", tmp_path / "judge", *judge), 2, "must not begin as what it judges")


@pytest.mark.parametrize("stage", ["lora", "consistency"])
def test_sides_that_an_adaptation_cannot_have_are_said(train: Script, recipe: Path, tmp_path: Path, stage: str) -> None:
    write_shards(samples(8), tmp_path / "data", 4, "shades")
    settings = {"lora": "rank: 2", "consistency": "guidance_scale: 3"}[stage]
    recipe.write_text(
        LORA.replace("lora_training", f"{stage}_training").replace("rank: 2", settings).replace("side: 64", "side: 72")
    )
    flags = (stage, "--config", recipe, "--run-dir", tmp_path / "run", f"data.shards={tmp_path / 'data'}")
    check(train(*flags, "--base", tiny_model().save(tmp_path / "base")), 2, "72", "multiple of 16")


def test_too_little_memory_says_what_to_lower(
    train: Script, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(update.Update, "gradients", full)
    check(train("unet", "--config", recipe, "--run-dir", tmp_path / "run"), 5, "micro_batch_size", "fsdp")


def test_numbers_that_are_not_finite_end_with_6(
    train: Script, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update.Update, "clip", lambda self: float("nan"))
    flags = ("unet", "--config", recipe, "--run-dir", tmp_path / "run", "unet_training.0.steps=8")
    check(train(*flags), 6, "step 5", "5 updates in a row were not finite")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
