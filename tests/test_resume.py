"""A run is a function of (config, seed, step): cut in two and resumed, it ends bit for bit as one that was not."""

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from helpers import few
from tiny_training import KINDS, MODEL, Task, state_digest, trained
from torch import nn

from ldm.data.loading import Streams, loaded
from ldm.errors import NotFiniteError, SettingError
from ldm.training import checkpoint, loop, state
from ldm.training.batch import Batch, Draws
from ldm.training.checkpoint import Checkpoint
from ldm.training.diffusion import latent_batches
from ldm.training.latents import LatentCache
from ldm.training.loop import Batches, Conduct
from ldm.training.optimization import LossScale, OptimizationConfig
from ldm.training.signals import Stopped, StopRequest
from ldm.training.update import Losses, Update
from ldm.training.workers import workers

SHORT: dict[str, Any] = {"steps": 6, "save_every": 3}


def run(kind: str, folder: Path, until: int | None = None, **settings: Any) -> str:
    """Train, leaving off after step `until` as a killed process would; the digest of the newest state."""
    for report in trained(kind, folder, **settings):
        if report.step == until:
            break
    return state_digest(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The digest that a run without a break ends with; it is made once for all tests that compare with it."""

    @cache
    def ended(kind: str, **settings: Any) -> str:
        return run(kind, tmp_path_factory.mktemp(kind), **settings)

    return ended


def stopped_after(kind: str, folder: Path, reports: int) -> None:
    """Train, and ask to stop after so many reports; the step that is under way then is the last."""
    stop = StopRequest()
    running = trained(kind, folder, Conduct(stop))
    for _ in range(reports):
        next(running)
    stop.note(signal.SIGUSR1, None)
    assert next(running).stopping
    with pytest.raises(Stopped, match="SIGUSR1"):
        next(running)


@pytest.mark.parametrize("kind", few(KINDS, "vae", "clip", "unet", "lora"))
def test_ten_steps_and_ten_more_are_twenty(kind: str, whole: Callable[..., str], tmp_path: Path) -> None:
    run(kind, tmp_path, until=13)  # killed three steps behind its checkpoint
    assert run(kind, tmp_path) == whole(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "conditioned"])
def test_ten_steps_of_muon_and_ten_more_are_twenty(kind: str, whole: Callable[..., str], tmp_path: Path) -> None:
    run(kind, tmp_path, until=13, optimizer="muon")
    assert run(kind, tmp_path, optimizer="muon") == whole(kind, optimizer="muon") != whole(kind)


def test_a_run_stopped_twice_within_an_epoch_ends_as_one_that_was_not(
    whole: Callable[..., str], tmp_path: Path
) -> None:
    # The third epoch of 28 pictures in batches of 8 begins with step 8 and ends within step 11.
    stopped_after("unet", tmp_path, reports=8)
    assert (tmp_path / "step_00000009").is_dir()
    stopped_after("unet", tmp_path, reports=0)
    assert (tmp_path / "step_00000010").is_dir()
    assert run("unet", tmp_path) == whole("unet")


def through_a_loader(*arguments: Any, **more: Any) -> Batches:
    """Batches of latents that come as those of shards do: starting a loader draws from the global generator."""
    batches = latent_batches(*arguments, **more)
    return lambda start: loaded(Streams(lambda *_: batches(start), 0, 1), None, 0, 60.0, "here")


def test_dropout_is_a_function_of_the_step_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropping = MODEL.replace("groups: 4}\nsampling", "groups: 4, dropout: 0.3}\nsampling")
    assert dropping != MODEL
    monkeypatch.setattr("tiny_training.MODEL", dropping)
    monkeypatch.setattr("tiny_training.latent_batches", through_a_loader)
    whole = run("unet", tmp_path / "whole", steps=6, save_every=3)
    run("unet", tmp_path / "parts", until=4, steps=6, save_every=3)
    torch.randn(17)  # whatever happens to the global generator in between
    assert run("unet", tmp_path / "parts", steps=6, save_every=3) == whole


def forget_moments(kept: state.Trainee) -> None:
    kept.optimizer.state.clear()


def forget_average(kept: state.Trainee) -> None:
    kept.averages[1].updates += 1


def forget_skipped(kept: state.Trainee) -> None:
    kept.skipped += 1


def forget_weights(kept: state.Trainee) -> None:
    with torch.no_grad():
        next(iter(kept.trained.values()))[0] += 1e-6


@pytest.mark.parametrize(
    "broken", few([forget_moments, forget_average, forget_skipped, forget_weights], forget_moments, forget_weights)
)
def test_a_restore_that_leaves_something_out_is_found(
    broken: Callable[[state.Trainee], None],
    whole: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run("unet", tmp_path, until=4, **SHORT)

    def restore(saved: Checkpoint, into: state.Trainee) -> None:
        state.restore(saved, into)
        broken(into)

    expected = whole("unet", **SHORT)
    monkeypatch.setattr(loop, "restore", restore)
    assert run("unet", tmp_path, **SHORT) != expected


def test_data_that_begins_anew_on_resuming_is_found(
    whole: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole("unet", **SHORT)
    run("unet", tmp_path, until=4, **SHORT)
    task = tiny_training.TASKS["unet"]

    def from_the_start(kind: str, settings: dict[str, Any]) -> Task:
        module, objective, batches, config, apart = task(kind, settings)
        return module, objective, lambda _: batches(0), config, apart

    monkeypatch.setitem(tiny_training.TASKS, "unet", from_the_start)
    assert run("unet", tmp_path, **SHORT) != expected


def test_micro_batches_change_rounding_only(tmp_path: Path) -> None:
    short: dict[str, Any] = {"steps": 4, "save_every": 2}
    once = [report.losses["loss"] for report in trained("unet", tmp_path / "once", **short)]
    parts = [report.losses["loss"] for report in trained("unet", tmp_path / "parts", micro_batch_size=2, **short)]
    again = [
        report.losses["loss"] for report in trained("unet", tmp_path / "again", gradient_checkpointing=True, **short)
    ]
    assert parts == pytest.approx(once, abs=1e-5) and again == pytest.approx(once, abs=1e-6)


def test_an_autoencoder_can_forget_its_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short: dict[str, Any] = {"steps": 2, "save_every": 2}
    once, again = (
        [report.losses for report in trained("vae", tmp_path / str(forget), gradient_checkpointing=forget, **short)]
        for forget in (False, True)
    )
    assert again == [pytest.approx(losses, abs=1e-5) for losses in once]


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="8 samples cannot be divided equally over 1 processes in parts of 3"):
        next(trained("unet", tmp_path, micro_batch_size=3))


def poisoned_at(steps: set[int], sample: int) -> Callable[[str, dict[str, Any]], Task]:
    """The UNet's objective that gives a loss that is no number for one sample in some steps."""
    task = tiny_training.TASKS["unet"]

    def poisoned(kind: str, settings: dict[str, Any]) -> Task:
        module, objective, batches, config, apart = task(kind, settings)

        def losses(network: nn.Module, batch: Batch, draws: Draws) -> Losses:
            values = objective(network, batch, draws)
            if draws.step in steps:
                mask = torch.zeros(len(batch))
                mask[sample] = float("nan")
                values["error"] = values["error"] + mask
                values["loss"] = values["error"].mean()
            return values

        return module, losses, batches, config, apart

    return poisoned


def test_one_bad_update_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(tiny_training.TASKS, "unet", poisoned_at({2}, sample=5))
    *_, last = trained("unet", tmp_path, steps=5)
    assert last.skipped == 1 and last.losses["loss"] > 0
    line = next(line for line in capsys.readouterr().err.splitlines() if "step 3" in line)
    assert "loss nan on rank 0" in line and line.count("picture") == 1 and "timesteps" in line


def test_too_many_bad_updates_stop_the_run_and_leave_the_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = run("unet", tmp_path, until=3, save_every=2)
    monkeypatch.setitem(tiny_training.TASKS, "unet", poisoned_at(set(range(2, 20)), sample=0))
    with pytest.raises(NotFiniteError, match=r"step 7: .*5 updates in a row"):
        list(trained("unet", tmp_path, save_every=2))
    assert state_digest(tmp_path) == good


def test_a_latent_that_is_no_number_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny_training.LatentCache

    def poisoned(mean: torch.Tensor, *rest: Any) -> LatentCache:
        mean[5] = float("nan")
        return made(mean, *rest)

    monkeypatch.setattr(tiny_training, "LatentCache", poisoned)
    *_, last = trained("unet", tmp_path, steps=7)
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == last.skipped > 0
    assert all(line.count("picture") == 1 and "samples picture 5" in line for line in lines)


def test_a_gradient_that_is_infinite_is_left_out_and_all_samples_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tiny_training.TASKS["unet"]

    def steep(kind: str, settings: dict[str, Any]) -> Task:
        module, objective, batches, config, apart = task(kind, settings)
        weight = next(module.parameters())
        weight.register_hook(lambda gradient: gradient * float("inf"))
        return module, objective, batches, config, apart

    monkeypatch.setitem(tiny_training.TASKS, "unet", steep)
    with pytest.raises(NotFiniteError, match="5 updates in a row"):
        list(trained("unet", tmp_path))
    first = capsys.readouterr().err.splitlines()[0]
    assert "the loss was finite, its gradient was not" in first and first.count("picture") == 8
    assert not list(tmp_path.glob("step_*"))


def test_a_loss_scale_is_restored_and_its_fall_below_one_ends_the_run(tmp_path: Path) -> None:
    config = OptimizationConfig(steps=1, batch_size=1, learning_rate=1.0, precision="fp16")
    before, after = (state.trainee(torch.nn.Linear(2, 2), config) for _ in range(2))
    before.scale.value, before.scale.good = 4.0, 17
    state.restore(checkpoint.read(checkpoint.save(tmp_path, state.capture(3, before, 1))), after)
    assert (after.scale.value, after.scale.good) == (4.0, 17)
    update = Update(after, after.module, lambda *_: {}, config, [], [], workers())
    for _ in range(2):
        update.leave_out(1, [], "overflow")
    assert after.bad == 0 and after.skipped == 2
    with pytest.raises(NotFiniteError, match="loss scale fell below 1"):
        update.leave_out(1, [], "overflow")


def test_a_process_that_does_not_write_keeps_no_copy_of_the_state() -> None:
    config = OptimizationConfig(steps=1, batch_size=1, learning_rate=1.0)
    learner = state.trainee(torch.nn.Linear(2, 2), config)
    learner.module(torch.ones(1, 2)).sum().backward()
    learner.optimizer.step()
    written, helped = (state.capture(1, learner, 2, take=take) for take in (True, False))
    assert {name: part.keys() for name, part in written.tensors.items()} == {
        name: part.keys() for name, part in helped.tensors.items()
    }
    assert all(tensor.numel() for part in written.tensors.values() for tensor in part.values())
    assert not any(tensor.numel() for part in helped.tensors.values() for tensor in part.values())


def test_a_network_that_cannot_learn_is_refused() -> None:
    config = OptimizationConfig(steps=1, batch_size=1, learning_rate=1.0)
    with pytest.raises(SettingError, match="no parameter that learns"):
        state.trainee(torch.nn.Linear(2, 2).requires_grad_(False), config)


def test_fp16_lowers_its_scale_where_gradients_overflow_and_raises_it_again() -> None:
    scale = LossScale("fp16")
    for _ in range(17):
        scale.update(finite=False)
    assert scale.value == 0.5 and LossScale("bf16").value == 1.0
    for _ in range(2000):
        scale.update(finite=True)
    assert scale.value == 1.0 and scale.good == 0


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    for _ in trained("unet", tmp_path, steps=8, keep_best=True, keep=1, save_every=2):
        pass
    best = (tmp_path / "best").read_text().strip()
    assert {path.name for path in tmp_path.glob("step_*")} == {best, "step_00000008"}
    assert (tmp_path / "latest").read_text() == "step_00000008\n"
