"""Emoji from clones of public collections: named as people would, drawn on white, each once, and some held out."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers import Script
from PIL import Image, ImageDraw

from ldm.data.emoji import choice
from ldm.data.emoji.captions import captions
from ldm.data.emoji.choice import ALIKE, SAME, Gallery, choose, drawings, held_out
from ldm.data.emoji.drawing import drawn, encoded, resampled
from ldm.data.emoji.names import phrase
from ldm.data.emoji.sources import STYLES, Drawing, Style, code_points, concepts, split_tone
from ldm.data.records import Reject
from ldm.data.shards import read_samples
from ldm.errors import MachineError

BY_SOURCE = {style.source: style for style in STYLES}
# Code points, CLDR's name and keywords, and emojibase's group.
NAMED: dict[str, tuple[str, list[str], int]] = {
    "1f34e": ("red apple", ["red", "apple", "fruit", "health", "diet", "ripe"], 4),
    "1f44b": ("waving hand", ["hand", "wave"], 1),
    "1f481-200d-2642": ("man tipping hand", ["man"], 1),
    "1f5dd": ("old key", ["clue", "lock"], 7),
    "1f511": ("key", ["lock", "password"], 7),
    "1f499": ("blue heart", ["blue"], 0),
    "1f1eb-1f1f7": ("flag: France", [], 9),
    "1f595": ("middle finger", ["hand"], 1),
    "1f19a": ("VS button", ["versus"], 8),
    "1f574": ("person in suit levitating", ["business"], 1),
}


@pytest.mark.parametrize(
    ("name", "group", "said"),
    [
        ("red apple", "food & drink", "a red apple"),
        ("automobile", "travel & places", "a car"),
        ("hourglass done", "travel & places", "an hourglass"),
        ("unicorn", "animals & nature", "a unicorn"),
        ("grapes", "food & drink", "grapes"),
        ("rhinoceros", "animals & nature", "a rhinoceros"),
        ("bread", "food & drink", "bread"),
        ("person: red hair", "people & body", "a person with red hair"),
        ("man: bald", "people & body", "a bald man"),
        ("woman: beard", "people & body", "a woman with a beard"),
        ("man astronaut", "people & body", "a male astronaut"),
        ("woman rowing boat", "people & body", "a woman rowing a boat"),
        ("man lifting weights", "people & body", "a man lifting weights"),
        ("person walking: facing right", "people & body", "a person walking to the right"),
        ("couple with heart: man, man", "people & body", "two men with a heart"),
        ("kiss: woman, man", "people & body", "a woman and a man kissing"),
        ("face with tongue", "smileys & emotion", "a face with its tongue out"),
        ("beach with umbrella", "travel & places", "a beach with an umbrella"),
        ("umbrella on ground", "travel & places", "an umbrella on the ground"),
        ("eight o’clock", "travel & places", "a clock showing eight o'clock"),
        ("ten-thirty", "travel & places", "a clock showing ten-thirty"),
        ("Aries", "symbols", "an Aries zodiac sign"),
        ("no smoking", "symbols", "a no smoking sign"),
        ("large orange diamond", "symbols", "an orange diamond"),
        ("Santa Claus", "people & body", "Santa Claus"),
        ("woman’s boot", "objects", "a woman's boot"),
    ],
)
def test_names_become_noun_phrases(name: str, group: str, said: str) -> None:
    assert phrase(name, group) == said


def test_skin_tones_are_said_of_the_person() -> None:
    people = "people & body"
    assert phrase("waving hand", people, "medium") == "a waving hand with medium skin"
    assert phrase("man tipping hand", people, "dark") == "a man with dark skin tipping a hand"
    assert phrase("person: red hair", people, "light") == "a person with light skin and red hair"


def test_pictures_without_colour_have_names_without_colour() -> None:
    assert phrase("red apple", "food & drink", coloured=False) == "an apple"
    assert phrase("black cat", "animals & nature", coloured=False) == "a black cat"


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("1f574-fe0f_flat.svg", "1f574"),
        ("1f469-200d-1f3a4_high-contrast.svg", "1f469-200d-1f3a4"),
        ("emoji_u1f441_200d_1f5e8.png", "1f441-200d-1f5e8"),
        ("1f932-1f3fb.svg", "1f932-1f3fb"),
        ("u1F39F-admissiontickets.svg", "1f39f"),
        ("u2712-blacknib.svg", "2712"),
        ("a9.svg", "00a9"),
        ("readme.svg", ""),
    ],
)
def test_file_names_are_code_points(name: str, codes: str) -> None:
    assert code_points(Path(name)) == codes


def test_a_tone_is_no_part_of_the_concept() -> None:
    assert split_tone("1f481-1f3fb-200d-2642") == ("1f481-200d-2642", {"light"})
    assert split_tone("1f34e") == ("1f34e", set())


# A made-up tree with the layout of the real one ------------------------------------------------------------------


def svg(colour: str, size: int = 30) -> str:
    return f'<svg data-colour="{colour}" data-size="{size}"></svg>'


def svg_to_bytes(svg_string: str, width: int = 0, height: int = 0) -> list[int]:
    """What resvg_py does, for the drawings of this test: a disc in the middle, in per cent of the side."""
    colour, size = svg_string.split('"')[1], int(svg_string.split('"')[3])
    side = width or height
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    margin = side * (50 - size) / 100
    ImageDraw.Draw(image).ellipse([margin, margin, side - 1 - margin, side - 1 - margin], fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return list(file.getvalue())


@pytest.fixture
def resvg(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("resvg_py")
    module.svg_to_bytes = svg_to_bytes  # type: ignore[attr-defined]  # a module made by hand
    monkeypatch.setitem(sys.modules, "resvg_py", module)


def colour(codes: str) -> str:
    """Another colour for each emoji."""
    number = list(NAMED).index(split_tone(codes)[0])
    return f"#{40 + 20 * number:02x}{200 - 18 * number:02x}{60 + 11 * number:02x}"


@pytest.fixture
def clones(tmp_path: Path) -> Path:
    root = tmp_path / "clones"
    files: dict[str, str | bytes] = {
        f"fluentui-emoji-unicode/assets/{codes}_flat.svg": svg(colour(codes)) for codes in NAMED
    }
    files |= {f"twemoji-assets/assets/svg/{codes}.svg": svg(colour(codes), 45) for codes in NAMED}
    tones = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
    files |= {f"twemoji-assets/assets/svg/1f44b-{tone}.svg": svg(f"#30{tone[-2:]}90") for tone in tones}
    files["fluentui-emoji-unicode/assets/1f499_high-contrast.svg"] = svg("#000000")
    files["fluentui-emoji-unicode/assets/1f34e_high-contrast.svg"] = svg("#000001")
    files["fluentui-emoji-unicode/assets/1f34e_color.svg"] = svg("#d02030")
    files["fluentui-emoji-unicode/assets/1f34e_3d.png"] = png("#d02030")
    files["noto-emoji/png/512/emoji_u1f34e.png"] = png("#ff0000")
    files["noto-emoji/png/512/emoji_u1f511.png"] = png("#ff0000")  # the same picture
    files["noto-emoji/png/512/emoji_u1f5dd.png"] = png("#ffffff")  # nothing
    names = {text(codes): {"default": words, "tts": [name]} for codes, (name, words, _) in NAMED.items()}
    derived = {text("1f481-200d-2642"): names.pop(text("1f481-200d-2642"))}
    cldr = "cldr-json/cldr-json"
    files[f"{cldr}/cldr-annotations-full/annotations/en/annotations.json"] = json.dumps(
        {"annotations": {"annotations": names}}
    )
    files[f"{cldr}/cldr-annotations-derived-full/annotationsDerived/en/annotations.json"] = json.dumps(
        {"annotationsDerived": {"annotations": derived}}
    )
    rows = [{"hexcode": f"{codes.upper()}", "group": group} for codes, (_, _, group) in NAMED.items()]
    files["twemoji-assets/data/emojibase.data.json"] = json.dumps(rows)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def text(codes: str) -> str:
    return "".join(chr(int(code, 16)) for code in codes.split("-"))


def png(colour: str) -> bytes:
    image = Image.new("RGBA", (64, 60), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle([16, 16, 47, 43], fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_what_words_cannot_ask_for_is_left_out(clones: Path) -> None:
    found = drawings(clones)
    kept = {one.key for one in found if isinstance(one, Drawing)}
    reasons = {one.origin: one.reason for one in found if isinstance(one, Reject)}
    assert {"fluent_flat_1f34e", "twemoji_1f34e", "noto_1f34e", "fluent_bw_1f34e", "twemoji_1f574"} <= kept
    for codes in ("1f1eb-1f1f7", "1f595", "1f19a"):
        assert reasons[f"{codes}.svg"] == "not drawn"
    assert "fluent_bw_1f499" not in kept and "fluent_flat_1f499" in kept  # a blue heart without blue
    assert len([key for key in kept if key.startswith("twemoji_1f44b-")]) == BY_SOURCE["twemoji"].tones


def test_captions_name_style_and_thing(clones: Path) -> None:
    apple = next(one for one in drawings(clones) if isinstance(one, Drawing) and one.key == "twemoji_1f34e")
    main, *others = captions(apple)
    assert main == "a simple emoji of a red apple"
    assert others[:4] == [
        "a red apple, simple emoji style",
        "a simple vector icon of a red apple on a white background",
        "a Twemoji emoji of a red apple",
        "a red apple",
    ]
    first, thing, *tags = others[4].split(", ")
    assert (first, thing) == ("simple emoji", "red apple") and len(tags) == 3
    assert set(tags) <= {"fruit", "health", "diet", "ripe"}  # no word twice


def test_shards_are_the_same_whatever_came_between(
    clones: Path, resvg: None, in_process: Callable[[str], Script], tmp_path: Path
) -> None:
    prepare = in_process("prepare_data.py")
    settings = ("--source", "emoji", "--input", clones, "--resolution", "64", "--shard-size", "6", "--workers", "1")
    whole, again = tmp_path / "whole", tmp_path / "again"
    ended = prepare(*settings, "--output", whole)
    assert ended.code == 0 and f"{whole}:" in ended.out
    assert prepare("--verify", whole).code == 0
    samples = {one.caption: one for one in read_samples(whole, seed=0, shuffle=False, epochs=1)}
    apple = samples["a simple emoji of a red apple"]
    assert apple.image.size == (64, 64) and apple.facts["file"] == "twemoji-assets/assets/svg/1f34e.svg"
    assert apple.facts["license"] == "CC-BY-4.0" and apple.facts["cldr"] == "red apple"
    edge, middle = np.asarray(apple.image)[4, 32], np.asarray(apple.image)[32, 32]
    assert edge.tolist() == [255, 255, 255] and np.abs(middle - np.array([40, 200, 60])).max() < 12
    rejects = [json.loads(line) for line in (whole / "rejects.jsonl").read_text().splitlines()]
    assert {"empty", "duplicate", "not drawn", "another skin tone"} <= {row["reason"] for row in rejects}
    assert prepare(*settings, "--output", again).code == 0
    last = sorted(again.glob("*.tar"))[-1]
    last.unlink()
    assert prepare(*settings, "--output", again).code == 3
    assert prepare(*settings, "--output", again, "--resume").code == 0
    names = sorted(path.name for path in whole.glob("*.tar"))
    assert len(names) > 2 and names == sorted(path.name for path in again.glob("*.tar"))
    assert all((whole / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (whole / "dataset.json").read_bytes() == (again / "dataset.json").read_bytes()
    (again / names[-1]).unlink()
    ended = prepare("--verify", again)
    assert ended.code == 3 and f"good samples, expected {len(samples)} by dataset.json" in ended.out


def test_without_resvg_one_line_says_what_to_install(
    clones: Path, in_process: Callable[[str], Script], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    prepare = in_process("prepare_data.py")
    ended = prepare("--source", "emoji", "--input", clones, "--output", tmp_path / "out", "--workers", "1")
    assert ended.code == MachineError.exit_code and not list((tmp_path / "out").glob("*.tar"))
    assert ended.err.splitlines()[-1] == "error: resvg_py: drawing SVG files needs it; pip install '.[emoji]'"
    assert ended.err.count("error:") == 1


def test_clones_that_are_not_there_are_named(clones: Path, in_process: Callable[[str], Script], tmp_path: Path) -> None:
    prepare = in_process("prepare_data.py")
    out = ("--output", tmp_path / "out", "--workers", "1")
    assert "--input: not given" in prepare("--source", "emoji", *out).err
    (clones / "cldr-json").rename(tmp_path / "elsewhere")
    ended = prepare("--source", "emoji", "--input", clones, *out)
    assert ended.code == 3 and "annotations.json" in ended.err and "clone that repository" in ended.err


# Pictures --------------------------------------------------------------------------------------------------------


def test_pictures_lie_in_the_middle_with_the_margin_of_their_style(resvg: None, tmp_path: Path) -> None:
    path = tmp_path / "full.svg"
    path.write_text(svg("#00ff00", 50))
    for source, margin in (("fluent_flat", 0), ("noto", 2), ("twemoji", 4)):
        ink = np.asarray(drawn(path, BY_SOURCE[source], 64)).min(axis=2) < 128
        rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
        assert (rows[0], rows[-1], columns[0], columns[-1]) == (margin, 63 - margin, margin, 63 - margin)


def test_hidden_colours_do_not_bleed(tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 255, 0))  # blue that nobody sees
    image.paste((255, 0, 0, 255), (8, 8, 24, 24))
    image.save(tmp_path / "a.png")
    pixels = np.asarray(resampled(tmp_path / "a.png", 64))
    assert pixels.shape == (64, 64, 4) and pixels[..., 2][pixels[..., 3] > 40].max() < 8


def test_flat_pictures_are_kept_without_loss() -> None:
    flat = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(flat).rectangle([10, 10, 50, 50], fill="#3060c0")
    again = Image.open(io.BytesIO(encoded(flat, BY_SOURCE["twemoji"]))).convert("RGB")
    assert np.array_equal(np.asarray(again), np.asarray(flat))


# Choice ----------------------------------------------------------------------------------------------------------


def test_a_like_picture_is_found_and_another_is_not() -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(20)]
    gallery = Gallery()
    assert gallery.find(pictures[0], SAME) is None
    for picture in pictures:
        gallery.add(picture)
    nearly = (pictures[7] ^ (rng.random((64, 64, 3)) < 0.5)).astype(np.uint8)  # half of the values are one off
    assert gallery.find(nearly, SAME) == 7 and gallery.find(nearly, SAME, but=7) is None
    assert gallery.find(255 - pictures[7], ALIKE) is None


def made(source: str, codes: str, clones: Path) -> Drawing:
    return Drawing(BY_SOURCE[source], Path(f"{codes}.svg"), codes, concepts(clones)[split_tone(codes)[0]], None)


def test_held_out_pairs_are_seen_in_other_styles_and_have_no_sibling(clones: Path) -> None:
    rng = np.random.default_rng(0)
    everywhere = [(source, codes) for source in choice.MAIN for codes in ("1f34e", "1f511", "1f5dd", "1f574")]
    few = [(source, "1f499") for source in choice.MAIN[:3]]
    pairs = [made(source, codes, clones) for source, codes in everywhere + few]
    pairs.append(made("fluent_color", "1f34e", clones))
    pictures = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in pairs]
    out = held_out(list(zip(pairs, pictures, strict=True)), seed=1)
    assert sorted(codes for _, codes in out) == ["1f34e", "1f574"]  # keys have old keys, and hearts too few styles
    chosen = choose(pairs, pictures, seed=1)
    assert {one.pair for one in chosen.held_out} == out
    assert not out & {one.pair for one in chosen.training} and len(chosen.training) + 2 <= len(pairs)


def test_a_drawing_in_3d_hides_its_twin_with_gradients(clones: Path) -> None:
    pairs = {("fluent_3d", "1f34e")}
    assert choice.is_held_out(made("fluent_color", "1f34e", clones), pairs)
    assert not choice.is_held_out(made("fluent_flat", "1f34e", clones), pairs)


def test_every_style_has_words_of_its_own() -> None:
    assert len({style.word for style in STYLES}) == len({style.source for style in STYLES}) == len(STYLES)
    assert all(isinstance(style, Style) and style.pattern.endswith((".png", ".svg")) for style in STYLES)
