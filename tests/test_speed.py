"""The benchmark counts what it says it counts, and its contests are of the same work."""

import json
import os
import re
import runpy
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import SCRIPTS, Script, few

from ldm.errors import MachineError
from ldm.evaluation import bundled, contests, speed, stand_in
from ldm.evaluation.bundled import BUNDLED
from ldm.evaluation.contests import BEST, CONTESTS, DEFAULT, OURS, PLAIN, Bench
from ldm.evaluation.plots import bars, logarithmic
from ldm.evaluation.processes import ended
from ldm.evaluation.speed import Comparison, Operations, Roofline, Timing, compare, operations
from ldm.models.autoencoder import Gaussian
from ldm.models.text import open_clip_module

CPU = torch.device("cpu")
QUICK = ("text", "unet", "decode", "encode")
TINY = {
    "autoencoder": {"kind": "kl", "channels": 8, "multipliers": [1, 1, 2, 2], "res_blocks": 1, "groups": 4},
    "text": {"kind": "clip", "tokenizer": "hf", "width": 32, "layers": 2, "heads": 4},
    "unet": {
        "channels": 16,
        "multipliers": [1, 2, 2],
        "res_blocks": 1,
        "attention": [True, True, False],
        "heads": 2,
        "context_width": 32,
        "groups": 4,
    },
    "sampling": {"width": 64, "height": 64, "schedule": "leading", "convention": "diffusers", "steps": 2},
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the same kind, as small as it can be."""
    monkeypatch.setattr(stand_in, "VALUES", TINY)


def test_operations_of_stable_diffusion_are_the_known_ones() -> None:
    made = stand_in.shapes()
    with torch.device("meta"):
        x, t, text = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)
    assert operations(lambda: made.unet(x, t, text)).total == pytest.approx(803.3e9, rel=1e-3)
    assert operations(lambda: made.autoencoder.decode(x)).total == pytest.approx(2514e9, rel=1e-3)


def test_operations_of_a_convolution_and_a_product() -> None:
    image, weight, a = (torch.empty(shape, device="meta") for shape in ((2, 3, 8, 8), (5, 3, 3, 3), (7, 9)))

    def work() -> None:
        torch.nn.functional.conv2d(image, weight, padding=1)
        torch.matmul(a, a.T)

    assert operations(work) == Operations(2.0 * 2 * 5 * 64 * 27, 2.0 * 7 * 7 * 9)
    assert Roofline(convolution=10.0, product=100.0).floor(Operations(20.0, 50.0)) == 2.5


def test_contenders_take_turns_and_every_second_round_goes_backwards() -> None:
    asked: list[str] = []
    made = compare("x", {name: lambda name=name: asked.append(name) for name in "abc"}, 3, CPU)
    assert "".join(asked) == "abc" + "abc" + "cba" + "abc"
    assert all(len(timing.seconds) == 3 for timing in made.timings.values())


def test_contenders_that_settle_work_once_before_each_turn_that_counts() -> None:
    asked: list[str] = []
    made = compare("x", {name: lambda name=name: asked.append(name) for name in "ab"}, 2, CPU, settle=True)
    assert "".join(asked) == "ab" + "aabb" + "bbaa"
    assert all(len(timing.seconds) == 2 for timing in made.timings.values())


def test_on_a_gpu_graphs_are_recorded_first_and_short_work_is_done_several_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, asked = [0.0], list[str]()

    def work(name: str, seconds: float) -> None:
        asked.append(name)
        now[0] += seconds

    monkeypatch.setattr(speed, "synchronise", lambda device: None)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    contenders = {name: partial(work, name, seconds) for name, seconds in (("a", 0.03), ("b", 1.0))}
    made = compare("x", contenders, 2, torch.device("cuda"))
    assert "".join(asked) == "aaa" + "a" + "bbb" + "b" + "aaab" + "baaa"
    assert made.timings["a"].seconds == pytest.approx([0.03, 0.03])
    assert made.timings["b"].seconds == pytest.approx([1.0, 1.0])


def test_figures_are_kept_where_a_later_part_fails(
    in_process: Callable[[str], Script], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(bench: Bench) -> Iterator[Comparison]:
        yield Comparison("x", {OURS: Timing([2.0], [0.0])}, Operations())
        raise MachineError("memory: not enough")

    monkeypatch.setitem(CONTESTS, "text", fails)
    monkeypatch.setattr(speed, "roofline", lambda *_: Roofline(1.0, 1.0))
    ended = in_process("benchmark.py")("--only", "text", "--quick", "--out", tmp_path / "x.json")
    assert ended.code == 5, ended.err
    assert json.loads((tmp_path / "x.json").read_text())["x"]["contenders"][OURS]["seconds"] == [2.0]


def test_ratios_are_those_of_the_same_round() -> None:
    timings = {"ours": Timing([1.0, 2.0, 4.0], [0.0] * 3), "theirs": Timing([2.0, 3.0, 12.0], [0.0, 0.3, 0.3])}
    made = Comparison("x", timings, Operations())
    assert made.ratio("theirs") == (2.0, 1.5, 3.0)
    assert not made.quiet, "others had 30 % of the machine in most of its turns"


def test_others_are_who_used_the_processors_and_is_not_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "STAT", tmp_path / "stat")
    tick = os.sysconf("SC_CLK_TCK")

    def busy(seconds: float) -> None:
        """User 2 s more each time, of which the guests' share at the end is a part; idle and waiting do not count."""
        (tmp_path / "stat").write_text(f"cpu  {int(seconds * tick)} 0 0 {900 * tick} {70 * tick} 0 0 0 55 55\ncpu0 1")

    busy(100.0)
    before, own = speed.foreign(), sum(os.times()[:4])
    busy(102.0)
    assert speed.foreign() - before == pytest.approx(2.0 - (sum(os.times()[:4]) - own), abs=0.02)
    (tmp_path / "stat").unlink()
    assert speed.foreign() == 0.0, "nobody tells"


@pytest.mark.parametrize("name", ["layers", "networks"])
def test_what_is_computed_otherwise_has_the_plain_result(
    tiny: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []

    def once(what: str, contenders: dict[str, Callable[[], object]], *rest: object, **how: object) -> Comparison:
        ours, plain = (tensor_of(contenders[who]()) for who in (OURS, PLAIN))
        assert ours.norm() > 0 and float((ours - plain).norm() / plain.norm()) < 1e-5, what
        compared.append(what)
        return Comparison(what, {who: Timing([1.0], [0.0]) for who in contenders}, Operations())

    monkeypatch.setattr(contests, "compare", once)
    assert list(CONTESTS[name](Bench(CPU, torch.float32, 64, 1, 1, compiled=False, with_theirs=False)))
    assert len(set(compared)) == {"layers": 5, "networks": 2}[name]


def test_the_bundle_is_measured_and_its_options_are_set_beside_plain_pictures(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "SHAPES", str(tiny_folder))
    options = {"plain": {}, "the same": {"reuse": 1}, "reuse": {"reuse": 2}, "merged": {"merge_tokens": 0.75}}
    monkeypatch.setattr(bundled, "OPTIONS", options)
    monkeypatch.setattr(bundled, "PROMPTS", 2)
    bench = Bench(CPU, torch.float32, 64, 2, 1, compiled=False, with_theirs=False)
    bench.rooflines = {str(torch.float32): Roofline(1e12, 1e12)}
    picture, preview, step, decode = BUNDLED["bundle"](bench)
    assert picture.operations.total == 4 * step.operations.total + decode.operations.total
    assert preview.operations == step.operations and 0 < step.of_roofline[OURS] < 1
    (found,) = BUNDLED["options"](bench)
    same, reused, merged = (found.differs[name] for name in list(options)[1:])
    assert (same.latent, same.psnr) == (0.0, 100.0)
    assert all(0 < other.latent < 1 and 5 < other.psnr < 100 for other in (reused, merged))
    assert same.ssim == pytest.approx(1.0) and all(-1 < other.ssim < 0.9999 for other in (reused, merged))
    assert found.values()["differs"] == {name: vars(found.differs[name]) for name in list(options)[1:]}


@pytest.mark.parametrize("dtype", few([torch.bfloat16, torch.float32], torch.bfloat16))
def test_pictures_in_half_precision_are_set_beside_those_in_fp32(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(bundled, "SHAPES", str(tiny_folder))
    monkeypatch.setattr(bundled, "PROMPTS", 2)
    monkeypatch.setattr(bundled, "STEPS", 3)
    bench = Bench(CPU, dtype, 64, 1, 1, compiled=False, with_theirs=False)
    bench.rooflines = dict.fromkeys(("torch.float32", "torch.bfloat16"), Roofline(1e12, 1e12))
    (found,) = BUNDLED["precision"](bench)
    assert list(found.timings) == ["torch.float32", "torch.bfloat16"] and list(found.differs) == ["torch.bfloat16"]
    half = found.differs["torch.bfloat16"]
    assert 1e-4 < half.latent < 0.1 and 20 < half.psnr < 90 and 0.9 < half.ssim < 1


def test_bars_are_as_long_as_ratios_say() -> None:
    drawn = bars({"a": {"x": (2.0, 1.5, 4.0), "y": (0.5, 0.5, 0.5)}, "b": {"x": (1.0, 0.25, 1.0)}})
    assert ET.fromstring(drawn) is not None and ET.fromstring(bars({})) is not None, "nothing to compare is no error"
    places = [
        (float(x), float(width)) for x, width in re.findall(r'<rect x="([0-9.]+)" y="\d+" width="([0-9.]+)"', drawn)
    ]
    (twice, long), (half, as_long), (one, nothing) = places
    assert long == as_long > 0 and nothing == 0.0 and twice == one == pytest.approx(half + as_long)
    place = logarithmic(1.0, 100.0, 10.0, 30.0)
    assert [place(number) for number in (0.1, 1.0, 10.0, 100.0)] == pytest.approx([10.0, 10.0, 20.0, 30.0])


@pytest.mark.parity
@pytest.mark.parametrize("name", few([one for one in CONTESTS if one not in ("layers", "networks")], *QUICK))
def test_every_contest_has_the_same_result_for_all(tiny: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip_module()
    pytest.importorskip("diffusers")
    bench = Bench(CPU, torch.float32, side=64, batch=2, repeat=1, compiled=False, with_theirs=True)
    bench.rooflines = {str(torch.float32): Roofline(1e9, 1e9)}
    results: dict[str, object] = {}

    def once(what: str, contenders: dict[str, Callable[[], object]], *rest: object, **how: object) -> Comparison:
        results.update({who: work() for who, work in contenders.items()})
        return Comparison(what, {who: Timing([1.0], [0.0]) for who in contenders}, Operations(1.0, 1.0))

    monkeypatch.setattr(contests, "compare", once)
    assert list(CONTESTS[name](bench))
    if name == "attention":
        return
    ours, *others = (tensor_of(results[who]) for who in (OURS, DEFAULT, BEST) if who in results)
    assert len(others) == (1 if name == "train" else 2)
    scale = 0.18215 if name == "encode" else 1.0
    for other in others:
        # Training is in mixed precision.
        assert float((ours - scale * other).norm() / ours.norm()) < (1e-2 if name == "train" else 1e-4)


def tensor_of(result: object) -> torch.Tensor:
    """The main result of a network, in whatever it comes."""
    while not isinstance(result, torch.Tensor):
        result = result.mean if isinstance(result, Gaussian) else result[0]  # type: ignore[index]  # diffusers' outputs
    return result


@pytest.mark.slow
@pytest.mark.parity
def test_the_script_writes_figures_and_compares_them(
    tiny: None, in_process: Callable[[str], Script], tmp_path: Path
) -> None:
    script, out = in_process("benchmark.py"), tmp_path / "figures.json"
    flags = ("--quick", "--side", "64", "--only", "decode", "--device", "cpu", "--out", out)
    first = script(*flags)
    assert first.code == 0, first.err
    figures = json.loads(out.read_text())
    assert figures["decode, batch 1"]["contenders"]["ldm"]["of_roofline"] > 0
    assert "takes, of the first" in first.out
    second = script(*flags, "--compare", out, "--plot", tmp_path / "ratios.svg")
    assert "| decode, batch 1 |" in second.out and "times as fast" in second.out
    assert "diffusers, best" in (tmp_path / "ratios.svg").read_text()


def test_help_is_a_process_that_is_measured(in_process: Callable[[str], Script], tmp_path: Path) -> None:
    ended = in_process("benchmark.py")("--quick", "--only", "help", "--device", "cpu", "--out", tmp_path / "out.json")
    assert ended.code == 0, ended.err
    (found,) = (figure for what, figure in json.loads((tmp_path / "out.json").read_text()).items() if "help" in what)
    ours = found["contenders"][OURS]
    assert ours["median"] > 0 and 5e6 < ours["peak"] < 150e6, "without torch"


def test_the_script_says_what_is_wrong_before_it_measures(in_process: Callable[[str], Script], tmp_path: Path) -> None:
    assert set(runpy.run_path(str(SCRIPTS / "benchmark.py"))["INSIDE"]) == {*CONTESTS, *BUNDLED}
    script = in_process("benchmark.py")
    assert script("--repeat", "0").errors == ["error: repeat: 0 is not between 1 and 1000; use 5"]
    assert "did you mean 'unet'" in script("--only", "uent").errors[0]
    assert script("--side", "100").errors == ["error: side: 100 is not a multiple of 64; use 512"]
    (tmp_path / "old.json").write_text("[]")
    assert script("--compare", tmp_path / "old.json").code == 3


@pytest.mark.slow
def test_growth_is_measured_and_drawn_beside_what_is_expected(
    in_process: Callable[[str], Script], tiny_folder: Path, tmp_path: Path
) -> None:
    script, out, plot = in_process("benchmark_growth.py"), tmp_path / "growth.json", tmp_path / "growth.svg"
    flags = ("--axes", "batch", "--model", tiny_folder, "--steps", "1", "--side", "64", "--repeat", "1")
    ended = script(*flags, "--out", out, "--plot", plot)
    assert ended.code == 0, ended.err
    points = json.loads(out.read_text())["batch"]
    seconds, expected, peak = points["1"]
    assert seconds == expected and peak > 1e8
    assert points["16"][1] == pytest.approx(2 * points["8"][0], abs=0.02), "twice the pictures are twice the work"
    ET.parse(plot)
    assert "axes: no axis 'bath'" in script("--axes", "bath").errors[0]
    assert script("--steps", "many").errors == ["error: steps: many is not a whole number; use 10"]


def test_memory_of_a_process_is_its_own_and_not_that_of_who_starts_it() -> None:
    ours = torch.ones(50_000_000)  # 200 MB
    said, small = ended([sys.executable, "-c", "import sys; print('said', file=sys.stderr)"])
    _, large = ended([sys.executable, "-c", "x = b'x' * 100_000_000"])
    assert said == "said\n" and small < ours.nbytes / 4 and 100e6 < large < ours.nbytes
    for code in ("import sys; sys.exit(3)", "import os; os.kill(os.getpid(), 9)"):
        with pytest.raises(MachineError, match="exit code"):
            ended([sys.executable, "-c", code])


def test_memory_beside_what_there_is() -> None:
    code = (
        "import sys; from ldm.evaluation.processes import memory_beside; held = bytearray(10**8); "
        "print(memory_beside(lambda: len(b'x' * 2 * 10**8)), memory_beside(lambda: len(held)), file=sys.stderr)"
    )
    more, nothing = map(int, ended([sys.executable, "-c", code])[0].split())
    assert 190e6 < more < 220e6 and nothing < 20e6, "neither what there was nor what there once was"


@pytest.mark.slow
def test_decoding_needs_memory_that_grows_with_the_picture() -> None:
    def needed(side: int) -> int:
        script = str(SCRIPTS / "benchmark.py")
        given = ("memory", "ldm", "bfloat16", "cpu", "none", "none", "1", str(side), "none")
        return int(ended([sys.executable, script, "--child", *given])[0].split()[-1])

    assert 1e6 < needed(64) < needed(192) < 3e8


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parity
def test_whole_processes_are_measured_with_their_memory(
    tiny: None, in_process: Callable[[str], Script], tmp_path: Path
) -> None:
    out = tmp_path / "figures.json"
    ended = in_process("benchmark.py")(
        "--quick", "--side", "64", "--only", "start,sample,memory", "--device", "cpu", "--out", out
    )
    assert ended.code == 0, ended.err
    figures = json.loads(out.read_text())
    start, whole, decoding = (found["contenders"] for what, found in figures.items() if what != "machine")
    assert list(start) == list(whole) == list(decoding) == [OURS, DEFAULT, BEST]
    assert all(1e6 < one["peak"] < 1e8 for one in decoding.values()), "a picture of 64 pixels, without the weights"
    assert all(one["peak"] > 1e8 for found in (start, whole) for one in found.values())
    assert whole[OURS]["median"] > start[OURS]["median"]
