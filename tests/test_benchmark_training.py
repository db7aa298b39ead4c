"""The benchmark of training steps: both programs train the same network, and the figures are what they say."""

import json
import runpy
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import SCRIPTS, Script

from ldm.evaluation import speed

TINY = ("--channels", "32", "--side", "8", "--batch", "1", "--rounds", "6")
SCRIPT = runpy.run_path(str(SCRIPTS / "benchmark_training.py"))


@pytest.fixture
def benchmark(in_process: Callable[[str], Script], monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.setattr(speed, "roofline", lambda *_: speed.Roofline(1e12, 1e12))
    return in_process("benchmark_training.py")


def test_a_ratio_has_the_interval_of_the_sign_test() -> None:
    assert SCRIPT["advantage"]([1.0] * 20, [2.0] * 20) == (2.0, 2.0, 2.0)
    # X(6) to X(15) of 20 hold the median with 95.9 %, X(7) to X(14) with 88.5 %.
    assert SCRIPT["advantage"]([1.0] * 20, [float(i) for i in range(20, 0, -1)]) == (10.5, 6.0, 15.0)


@pytest.mark.slow
def test_our_step_alone_is_measured(benchmark: Script, tmp_path: Path) -> None:
    ended = benchmark(*TINY, "--no-theirs", "--muon", "--out", tmp_path / "out.json")
    assert ended.code == 0, ended.err
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [len(one["seconds"]) for one in figures["contenders"].values()] == [6, 6]
    assert "| ldm | " in ended.out and "| ldm, Muon | " in ended.out
    refused = benchmark(*TINY[:-1], "5")
    assert refused.code == 2 and "--rounds: got 5" in refused.err


@pytest.mark.slow
@pytest.mark.parity
def test_both_train_the_same_network_on_the_same_loss(benchmark: Script, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    args = Namespace(channels=32, side=8, batch=64, sd15=False)
    config = SCRIPT["model"](args)
    given = SCRIPT["numbers"](args, torch.device("cpu"))
    losses = [SCRIPT["ours"](config, given, 6, tmp_path)().losses["loss"], SCRIPT["theirs"](config, given)()]
    # Of a network with random weights: 1 of the noise and the mean square of its output, which are the same for both
    # but for the noise and timesteps that each draws; a network of other weights would be far off.
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] > 1.2
    ended = benchmark(*TINY)
    assert ended.code == 0, ended.err
    assert "ldm: " in ended.out and " times as fast as diffusers (95 % interval " in ended.out
