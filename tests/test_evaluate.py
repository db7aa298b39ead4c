"""The evaluation as a whole: pictures from anywhere, drawn once, judged by networks from files, and reported."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Ended
from PIL import Image
from torch import Tensor, nn

from ldm.bundle import Bundle
from ldm.data.shards import write_shards
from ldm.errors import DataError, ModelError
from ldm.evaluation.drawing import FIRST_SEED, Drawing, opened
from ldm.evaluation.figures import Figure
from ldm.evaluation.pictures import Asked, Captioned, Look, find_pictures, look, pixels, read_prompts, recaptioned
from ldm.evaluation.report import Sheet, as_html, as_json
from ldm.evaluation.results import Result, protocol_hash
from ldm.evaluation.suite import METRICS, Evidence, Judges, measured
from ldm.evaluation.towers import Extractor, open_evaluator, open_extractor
from ldm.models.clip import Clip, ClipConfig
from ldm.models.text import ClipTextConfig, ClipTextEncoder
from ldm.pipeline import TextToImage
from ldm.request import GenerationRequest
from ldm.training.checkpoint import save_tensors

Script = Callable[..., Ended]
SIZE = 64
TEXT = {"width": 32, "layers": 1, "heads": 4, "context_length": 16, "vocabulary": 1024}
IMAGE = {"embedding": 8, "image_size": 32, "width": 4, "layers": [1, 1, 1, 1]}
COLOURS = ("red", "green", "blue", "white", "black", "pink", "grey", "orange", "cyan", "brown", "gold", "navy")


def picture(colour: str) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), "white")
    image.paste(colour, (8, 8, 48, 56))
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, each with its caption beside it."""
    made = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(COLOURS):
        picture(colour).save(made / f"{number:02d}.png")
        (made / f"{number:02d}.txt").write_text(f"a {colour} box\n")
    return made


def clip(seed: int) -> Clip:
    torch.manual_seed(seed)
    return Clip(ClipConfig.model_validate(IMAGE), ClipTextConfig.model_validate(TEXT)).eval()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves of CLIP."""
    made = tmp_path_factory.mktemp("runs") / "one"
    made.mkdir()
    save_tensors(made / "clip.safetensors", dict(clip(0).state_dict()))
    (made / "recipe.yaml").write_text(json.dumps({"name": "one", "clip": IMAGE, "model": {"text": TEXT}}))
    return made


def seen(pictures: Any, *extractors: Extractor) -> Look:
    *counts, found = look(pictures, extractors, thumbnails=3)
    assert isinstance(found, Look) and counts[-1] == len(found)
    return found


# Pictures -------------------------------------------------------------------------------------------------------


def test_a_folder_a_list_and_shards_hold_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    lines = [{"image": str(folder / f"{i:02d}.png"), "caption": f"a {c} box"} for i, c in enumerate(COLOURS)]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "list.json").write_text(json.dumps(lines))
    samples = [
        {"__key__": f"{i:02d}", "png": (folder / f"{i:02d}.png").read_bytes(), "txt": f"a {c} box"}
        for i, c in enumerate(COLOURS)
    ]
    write_shards(samples, tmp_path / "shards", 5, "x")
    sources = [folder, tmp_path / "list.jsonl", tmp_path / "list.json", tmp_path / "shards"]
    looks = [seen(find_pictures(str(source)), pixels()) for source in sources]
    assert len({one.sha256 for one in looks}) == 1
    assert looks[0].names[:2] == ("00", "01") and looks[3].captions[2] == "a blue box"
    assert len(looks[0].thumbnails) == 3
    assert len(seen(find_pictures(str(folder), 5), pixels())) == 5


def test_what_is_damaged_ends_the_evaluation_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folder, tmp_path / "damaged")
    (folder / "02.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"02\.txt: got a txt that is not UTF-8 .*; replace or remove it$"):
        seen(find_pictures(str(folder)), pixels())
    (folder / "01.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"01\.png: .*expected a whole PNG file; replace or remove it$"):
        seen(find_pictures(str(folder)), pixels())


def test_captions_of_a_list_may_have_any_character(folder: Path, tmp_path: Path) -> None:
    caption = "a\u2028red\u0085box"
    row = json.dumps({"image": str(folder / "00.png"), "caption": caption}, ensure_ascii=False)
    (tmp_path / "list.jsonl").write_text(f"{row}\r\n \n{row}\n", encoding="utf-8")
    assert seen(find_pictures(str(tmp_path / "list.jsonl")), pixels()).captions == (caption, caption)


def test_digest_tells_pixels_and_captions_apart(folder: Path) -> None:
    whole = find_pictures(str(folder), 2)
    assert seen(recaptioned(whole, [Asked("", "a"), Asked("", "b")])).sha256 != seen(whole).sha256
    assert seen(find_pictures(str(folder), 3)).sha256 != seen(whole).sha256
    with pytest.raises(DataError, match="--prompts: 1 of them"):
        seen(recaptioned(whole, [Asked("", "a")]))
    with pytest.raises(DataError, match="--prompts: 3 of them"):
        seen(recaptioned(whole, [Asked("", "a")] * 3))


def test_pixels_are_the_middle_square_made_small() -> None:
    image = Image.new("RGB", (100, 60), "black")
    image.paste("white", (20, 0, 80, 60))
    found = seen(lambda: iter([Captioned("x", image, "")]), pixels())
    features = next(iter(found.features.values()))
    assert features.shape == (1, 3 * 32 * 32) and features.min() > 0.9


def test_prompts_from_text_and_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red box\n\n a dog \n")
    assert read_prompts(tmp_path / "a.txt") == [Asked("a red box", "a red box"), Asked("a dog", "a dog")]
    (tmp_path / "b.jsonl").write_text('{"prompt": "dog, 8k", "caption": "a dog"}\n{"caption": "a cat"}\n')
    assert read_prompts(tmp_path / "b.jsonl") == [Asked("dog, 8k", "a dog"), Asked("a cat", "a cat")]
    (tmp_path / "c.jsonl").write_text('{"prompt": "a"}\n{"x": 1}\n')
    with pytest.raises(DataError, match=r"c\.jsonl: record 2 has no text"):
        read_prompts(tmp_path / "c.jsonl")
    for text in ("", "[]", "3", "{", "[3]"):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(DataError, match=r"d\.json: "):
            read_prompts(tmp_path / "d.json")


# Drawing --------------------------------------------------------------------------------------------------------


class Counting(TextToImage):
    """An engine that says which batches it drew, and can be pulled the plug."""

    def __init__(self, bundle: Bundle, left: int = 99) -> None:
        super().__init__(bundle)
        self.drawn: list[list[str]] = []
        self.left = left

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], request: GenerationRequest) -> list[Image.Image]:
        if len(self.drawn) == self.left:
            raise KeyboardInterrupt
        self.drawn.append(list(prompts))
        return super().draw(prompts, seeds, request)


def drawing(engine: TextToImage, **settings: Any) -> Drawing:
    return Drawing(engine, engine.ready(GenerationRequest(prompt="x", batch_size=2, steps=1, seed=0, **settings)))


def test_an_interrupted_drawing_goes_on_and_draws_nothing_twice(tiny_bundle: Bundle, tmp_path: Path) -> None:
    prompts = ["a", "b", "c", "d", "e"]
    whole = list(drawing(TextToImage(tiny_bundle)).draw(prompts, tmp_path / "whole"))
    stopped = Counting(tiny_bundle, left=1)
    with pytest.raises(KeyboardInterrupt):
        list(drawing(stopped).draw(prompts, tmp_path / "kept"))
    again = Counting(tiny_bundle)
    kept = list(drawing(again).draw(prompts, tmp_path / "kept"))
    assert stopped.drawn == [["a", "b"]] and again.drawn == [["c", "d"], ["e"]]
    assert [opened(path).tobytes() for path in kept] == [opened(path).tobytes() for path in whole]
    kept[3].unlink()
    third = Counting(tiny_bundle)
    list(drawing(third).draw([*prompts, "f"], tmp_path / "kept"))
    assert third.drawn == [["c", "d"], ["e", "f"]]


def test_other_settings_and_models_are_drawn_anew(tiny_bundle: Bundle, tmp_path: Path) -> None:
    first = drawing(TextToImage(tiny_bundle))
    paths = set(first.draw(["a"], tmp_path))
    for other in (
        drawing(TextToImage(tiny_bundle), guidance_scale=2.0),
        drawing(TextToImage(tiny_bundle), sampler="euler"),
        Drawing(TextToImage(Bundle(**{**vars(tiny_bundle), "sha256": "f" * 64})), first.request),
    ):
        assert protocol_hash(other.protocol) != protocol_hash(first.protocol)
        assert not paths & set(other.draw(["a"], tmp_path))
    larger = Drawing(first.engine, first.request.model_copy(update={"batch_size": 3, "seed": 5, "prompt": "y"}))
    assert larger.protocol == first.protocol
    assert first.made(["a"]) != first.made(["b"]) and first.made(["a"])["first_seed"] == FIRST_SEED


# Judges ---------------------------------------------------------------------------------------------------------


def test_a_runs_clip_is_opened_by_its_recipe(run_folder: Path, folder: Path, tmp_path: Path) -> None:
    evaluator = open_evaluator(run_folder)
    assert evaluator.name == "ldm-clip one/clip" and len(evaluator.sha256) == 64
    image, text = clip(0)(torch.zeros(1, 3, 32, 32), clip(0).text.tokenize(["a dog"]))
    assert evaluator.extractor.embed(torch.zeros(1, 3, 32, 32)).numpy() == pytest.approx(
        image.detach().numpy(), abs=1e-6
    )
    assert evaluator.texts(["a dog"]) == pytest.approx(text.detach().numpy(), abs=1e-6)
    assert evaluator.texts(["a dog", "a cat", "a dog"]).shape == (3, 8)
    told = {"clip": json.dumps({"image": IMAGE, "text": TEXT})}
    save_tensors(tmp_path / "judge.safetensors", dict(clip(1).state_dict()), told)
    assert open_evaluator(tmp_path / "judge.safetensors").name.endswith("/judge")


def test_of_a_runs_two_clips_the_judge_is_taken(run_folder: Path, tmp_path: Path) -> None:
    for name in ("clip.safetensors", "recipe.yaml"):
        shutil.copy(run_folder / name, tmp_path / name)
    assert open_evaluator(tmp_path).name.endswith("/clip")
    told = {"clip": json.dumps({"image": IMAGE, "text": TEXT})}
    save_tensors(tmp_path / "evaluator.safetensors", dict(clip(1).state_dict()), told)
    assert open_evaluator(tmp_path).name.endswith("/evaluator")


def test_files_that_are_no_judges_are_refused(run_folder: Path, tmp_path: Path) -> None:
    save_tensors(tmp_path / "clip.safetensors", dict(clip(0).state_dict()))
    with pytest.raises(ModelError, match="tells its shape"):
        open_evaluator(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(ModelError, match="no section `clip`"):
        open_evaluator(tmp_path)
    wide = {"clip": {**IMAGE, "embedding": 9}, "model": {"text": TEXT}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(wide))
    with pytest.raises(ModelError, match="of another shape"):
        open_evaluator(tmp_path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match="is a pickle file"):
        open_extractor(tmp_path / "x.pt", 32)


def test_the_tower_that_conditions_is_recognised(run_folder: Path) -> None:
    evaluator = open_evaluator(run_folder)
    assert evaluator.shares_text_tower(clip(0).text.half())
    assert not evaluator.shares_text_tower(clip(1).text)
    assert not evaluator.shares_text_tower(ClipTextEncoder(ClipTextConfig(**{**TEXT, "width": 16})))


def test_a_tower_that_went_on_from_the_judges_own_is_recognised(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    for seed, name in ((1, "text-thumbnail"), (2, "text-0")):
        save_tensors(tmp_path / "run" / f"{name}.safetensors", dict(clip(seed).text.state_dict()))
    evaluator = open_evaluator(tmp_path / "run")
    assert all(evaluator.shares_text_tower(clip(seed).text) for seed in (0, 1, 2))
    assert not evaluator.shares_text_tower(clip(3).text)
    told = {"clip": json.dumps({"image": IMAGE, "text": TEXT})}
    save_tensors(tmp_path / "run" / "evaluator.safetensors", dict(clip(3).state_dict()), told)
    judge = open_evaluator(tmp_path / "run")
    assert not judge.shares_text_tower(clip(2).text), "the run's other CLIP has not taught the model"


class Means(nn.Module):
    """Channel means; with `return_features` of levels, otherwise nothing."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        means = images.mean(dim=(2, 3))
        return means if return_features else torch.zeros_like(means)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_gets_levels_and_is_asked_for_features(tmp_path: Path) -> None:
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    extractor = open_extractor(tmp_path / "means.pt", 20)
    assert extractor.name == "torchscript means.pt" and extractor.side == 20
    orange = Captioned("x", Image.new("RGB", (50, 50), (255, 128, 0)), "")
    found = seen(lambda: iter([orange]), extractor)
    assert found.features[extractor.sha256].tolist() == [[255.0, 128.0, 0.0]]


# Metrics --------------------------------------------------------------------------------------------------------

COLOUR = Extractor("colour", "colour", 8, lambda images: images[:, :, 4, 4])


def evidence(folder: Path, run_folder: Path, **changes: Any) -> Evidence:
    judges = Judges(COLOUR, open_evaluator(run_folder), ("a dog",))
    whole = seen(find_pictures(str(folder)), *judges.eyes(["memorisation"]))
    return Evidence(whole, {"pictures": "these"}, **{"judges": judges, "real": whole, "trained": whole, **changes})


def test_every_metric_of_pictures_against_themselves(folder: Path, run_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("ldm.evaluation.suite.NEXT", 4)
    monkeypatch.setattr("ldm.evaluation.neighbours.NEXT", 4)
    monkeypatch.setattr("ldm.evaluation.neighbours.copies.__defaults__", (4,))
    found = [result for name in METRICS for result in measured(name, evidence(folder, run_folder))]
    values = {(result.metric, result.of): result.figure.value for result in found}
    assert values["FID(colour, 3 features)", "drawn against real"] == pytest.approx(0, abs=1e-9)
    assert values["precision(colour)", "drawn against real"] == 1.0
    assert values["copies(pixels 32, ratio below 0.33)", "drawn"] == 1.0
    clips = [values["CLIP score(ldm-clip one/clip)", of] for of in ("drawn", "real")]
    assert clips[0] == clips[1]
    assert "R@1(ldm-clip one/clip, 13 captions)" in {result.metric for result in found}
    hashes = {result.hash for result in found}
    assert len(hashes) == len(found) and all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes)
    json.loads(as_json(found, {}))


def test_real_pictures_that_training_has_seen_are_counted_in_a_warning(
    folder: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.evaluation.neighbours.copies.__defaults__", (4,))

    def warnings(trained: Look) -> dict[str, tuple[str, ...]]:
        found = measured("memorisation", evidence(folder, run_folder, trained=trained))
        return {result.of: result.notes for result in found if result.metric.startswith("copies(pixels")}

    numbers = np.random.default_rng(0).integers(0, 256, (12, SIZE, SIZE, 3), dtype=np.uint8)
    noise = [Captioned(str(number), Image.fromarray(one), "noise") for number, one in enumerate(numbers)]
    assert warnings(seen(lambda: iter(noise), pixels(), COLOUR)) == {"drawn": (), "real": ()}
    said = warnings(seen(find_pictures(str(folder)), pixels(), COLOUR))
    assert said["drawn"] == () and said["real"][0].startswith("12 real pictures are as near to one of training")


def test_fid_says_where_pictures_are_too_few(folder: Path, run_folder: Path) -> None:
    base = evidence(folder, run_folder)
    assert not any("too few" in note for note in measured("fid", base)[0].notes)
    wide = Evidence(base.drawn, {}, Judges(pixels()), base.real)
    assert measured("fid", wide)[0].notes[0].startswith("12 pictures for 3,072 features: too few")


def test_what_cannot_be_measured_is_said(folder: Path, run_folder: Path) -> None:
    nameless = recaptioned(find_pictures(str(folder)), [Asked("", "")] * 12)
    base = evidence(folder, run_folder)
    without = Evidence(seen(nameless, *base.judges.eyes([])), {}, base.judges)
    with pytest.raises(DataError, match="--metrics retrieval: picture 00 has no caption"):
        measured("retrieval", without)
    with pytest.raises(DataError, match="--metrics memorisation: got 12 training pictures, expected more than 50"):
        measured("memorisation", base)


def test_hash_changes_with_everything_that_decides(folder: Path, run_folder: Path) -> None:
    base = evidence(folder, run_folder)
    other_data = seen(find_pictures(str(folder), 11), COLOUR)
    others = [
        Evidence(base.drawn, {"pictures": "others"}, base.judges, base.real),
        Evidence(base.drawn, base.made, Judges(Extractor("colour", "other", 8, COLOUR.embed)), base.real),
        Evidence(base.drawn, base.made, base.judges, other_data),
    ]
    for one in (base.drawn, base.real):
        assert one is not None
        one.features["other"] = one.features["colour"]
    hashes = {measured("fid", one)[0].hash for one in [base, *others]}
    assert len(hashes) == 4 and measured("fid", base)[0].hash == measured("fid", evidence(folder, run_folder))[0].hash


# Report ---------------------------------------------------------------------------------------------------------


def test_report_is_one_file_that_runs_and_fetches_nothing() -> None:
    result = Result("FID(<x>)", "drawn", Figure(1.25, (1.0, 1.5), 10), {"a": 1}, notes=("<b>few</b>",))
    page = as_html([result], [Sheet("Drawn", (picture("red"),), ('<script>"x"</script>',))], "A & B")
    assert "<script" not in page and "<b>" not in page and "A &amp; B" in page
    assert page.count('src="data:image/webp;base64,') == 1 and "http:" not in page and "https:" not in page
    assert result.hash in page and "1.25" in page and "1 to 1.5" in page
    assert str(result) == f"FID(<x>), drawn: 1.25 (95 %: 1 to 1.5; 10 pictures; protocol {result.hash[:12]})"
    share = Result("R@1", "real", Figure(0.5, None, 1), {}, "%")
    assert str(share).startswith("R@1, real: 50.0 % (1 pictures")


# The script -----------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(in_process: Callable[[str], Script]) -> Script:
    return in_process("evaluate.py")


def test_shapes_are_told_in_the_same_lines(evaluate: Script, tiny_folder: Path, tmp_path: Path) -> None:
    flags = [
        "--model",
        tiny_folder,
        "--num-images",
        "3",
        "--steps",
        "1",
        "--out",
        tmp_path / "x.json",
        "--dtype",
        "float32",
    ]
    ended = evaluate(*flags, "--sheet", tmp_path / "s.png", "--keep", tmp_path / "kept")
    assert ended.code == 0, ended.err
    share = r"[\d.]+ % \(\d of 3; 95 %: [\d.]+ to [\d.]+\)"
    for kind, first, second in zip(
        ("one", "two"), ended.out.splitlines()[::2], ended.out.splitlines()[1::2], strict=False
    ):
        assert re.fullmatch(rf"{kind}-object prompts: colour and shape right {share}", first)
        assert re.fullmatch(rf"{kind}-object prompts: everything right {share}; [\d.]+ s a picture", second)
    told = json.loads(ended.out.splitlines()[-1])
    assert told["num_images"] == 3 and told["first_seed"] == 10_000 and told["steps"] == 1
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["protocol"] == told and len(written["results"]) == 8
    assert {p.name for p in tmp_path.glob("*.png")} == {"s-one.png", "s-two.png"}
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").rglob("*.png")}
    assert len(kept) == 6
    again = evaluate(*flags, "--keep", tmp_path / "kept")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").rglob("*.png")} == kept
    assert json.loads((tmp_path / "x.json").read_text())["results"] == written["results"] and again.code == 0


def test_order_is_told_bin_by_bin(evaluate: Script, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    ended = evaluate("--metrics", "order", "--model", tiny_folder, "--num-images", "3", "--out", out)
    assert ended.code == 0, ended.err
    (found,) = json.loads(out.read_text())["results"]
    assert found["metric"] == "right order preferred to mirrored, t = 950" and found["count"] == 3
    assert "| t | SNR | right | mirrored | right is preferred |" in ended.out and "| 950 | " in ended.out


def test_everything_at_once(
    evaluate: Script, tiny_folder: Path, folder: Path, run_folder: Path, tmp_path: Path
) -> None:
    names = "vae,loss,fid,kid,prdc,clip-score,retrieval"
    out, page = tmp_path / "x.json", tmp_path / "x.html"
    flags = ["--metrics", names, "--data", folder, "--extractor", run_folder, "--evaluator", run_folder]
    ended = evaluate(*flags, "--model", tiny_folder, "--steps", "1", "--dtype", "float32", "--out", out, "--html", page)
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())["results"]
    metrics = {one["metric"].split("(")[0] for one in found}
    assert metrics >= {"FID", "KID", "coverage", "CLIP score", "R@1", "autoencoder PSNR", "ε-loss, right caption"}
    assert "| t | SNR | right | none | other |" in ended.out and "warning: FID(ldm-clip one/clip" in ended.err
    assert page.read_text().count("data:image/webp") == 12 + 12 + 24


def test_a_sheet_has_each_picture_beside_its_reconstruction(
    evaluate: Script, tiny_folder: Path, folder: Path, tmp_path: Path
) -> None:
    flags = ("--model", tiny_folder, "--metrics", "vae", "--data", folder, "--num-data", "4")
    ended = evaluate(*flags, "--sheet", tmp_path / "s.png")
    assert ended.code == 0, ended.err
    sheet = np.asarray(Image.open(tmp_path / "s-vae.png"), dtype=float)
    side = sheet.shape[0]
    assert sheet.shape[1] == 8 * side + 7 * 4
    places = [sheet[:, (side + 4) * place :][:, :side] for place in range(8)]
    for colour, own, decoded in zip(COLOURS, places[::2], places[1::2], strict=False):
        asked = np.asarray(picture(colour).convert("RGB").resize((side, side)), dtype=float)
        assert np.abs(own - asked).mean() < 5 < np.abs(decoded - asked).mean()


def test_pictures_of_others_need_no_model(evaluate: Script, folder: Path, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"one {colour} box" for colour in COLOURS))
    ended = evaluate(
        *("--metrics", "fid,clip-score", "--pictures", folder, "--data", folder, "--prompts", tmp_path / "prompts.txt"),
        *("--extractor", run_folder, "--evaluator", run_folder, "--model", "no such model"),
    )
    assert ended.code == 0 and json.loads(ended.out.splitlines()[-1]) == {"pictures": str(folder)}, ended.err


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--metrics", "fidd"], 2, "metrics: no metric 'fidd' (did you mean 'fid'?); use shapes, "),
        (["--metrics", "fid", "--prompts", "p.txt"], 2, "--data: fid needs it; "),
        (["--metrics", "clip-score", "--evaluator", "x"], 2, "--prompts: clip-score needs something to draw; "),
        (["--metrics", "vae"], 2, "--data: vae needs it; "),
        (["--num-images", "0"], 2, "num_images: 0 is not between 1 and 1000000; use 500"),
        (["--metrics", "digits"], 2, "metrics: digits does not fit the model tiny; "),
        (["--evaluator", "no/such/run"], 4, "no/such/run: cannot be read"),
        (["--style-groups", "3D"], 2, "--style-groups: got '3D', expected two groups"),
        (["--metrics", "vae", "--data", "no-such.tar"], 3, "no-such.tar: no such shard"),
        (["--html", "/dev/null/x.html"], 5, "cannot write there"),
    ],
)
def test_wrong_flags(evaluate: Script, tiny_folder: Path, flags: list[str], code: int, words: str) -> None:
    ended = evaluate("--model", tiny_folder, *flags)
    assert ended.code == code and ended.out == "", ended.err
    assert len(ended.errors) == 1 and words in ended.errors[0] and "; " in ended.errors[0]


def test_a_held_out_set_without_a_picture_is_refused(evaluate: Script, tiny_folder: Path, tmp_path: Path) -> None:
    ended = evaluate("--model", tiny_folder, "--metrics", "vae", "--data", tmp_path)
    assert ended.code == 3 and len(ended.errors) == 1 and "no .tar and no picture" in ended.errors[0], ended.err


def test_the_conditioning_tower_is_no_evaluator(
    evaluate: Script, tiny_bundle: Bundle, tiny_folder: Path, tmp_path: Path
) -> None:
    assert isinstance(tiny_bundle.text, ClipTextEncoder)
    torch.manual_seed(0)
    judge = Clip(ClipConfig.model_validate(IMAGE), tiny_bundle.text.config)
    judge.text.load_state_dict(tiny_bundle.text.state_dict())
    told = {"clip": json.dumps({"image": IMAGE, "text": tiny_bundle.text.config.model_dump()})}
    save_tensors(tmp_path / "judge.safetensors", dict(judge.state_dict()), told)
    (tmp_path / "p.txt").write_text("a box\n")
    flags = ["--model", tiny_folder, "--metrics", "clip-score", "--prompts", tmp_path / "p.txt"]
    ended = evaluate(*flags, "--evaluator", tmp_path / "judge.safetensors")
    assert ended.code == 2 and "--evaluator: the model is conditioned with this text tower" in ended.err
