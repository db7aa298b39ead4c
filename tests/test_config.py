"""A recipe with a mistake in it is refused with the file, the key and the nearest name."""

from pathlib import Path

import pytest

from ldm.config import Config, dump, load
from ldm.errors import SettingError


class Part(Config):
    rate: float = 1e-3
    steps: int = 10


class Whole(Config):
    name: str = "x"
    part: Part = Part()
    parts: tuple[Part, ...] = ()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    assert load(write(tmp_path, "part: {rate: 1e-4}"), Whole).part.rate == 1e-4


def test_overrides_apply_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "part: {rate: 1}\nparts: [{steps: 1}, {steps: 2}]")
    loaded = load(path, Whole, ["part.rate=5e-1", "part.steps=7", "part.steps=8", "name=a b", "parts.1.steps=9"])
    assert (loaded.part.rate, loaded.part.steps, loaded.name) == (0.5, 8, "a b")
    assert [part.steps for part in loaded.parts] == [1, 9]


def test_a_record_survives_its_own_text(tmp_path: Path) -> None:
    record = Whole(name="ünï", part=Part(rate=1e-5), parts=(Part(steps=3),))
    assert load(write(tmp_path, dump(record)), Whole) == record


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("part: {ratee: 1}", [], r"part.ratee: no such key \(did you mean 'rate'\?\)"),
        ("nme: a", [], r"nme: no such key \(did you mean 'name'\?\)"),
        ("part: {rate: fast}", [], "part.rate: .*number.*got 'fast'"),
        ("part: {rate: .nan}", [], "part.rate: .*finite"),
        ("part:\n  rate: 1\n  rate: 2", [], "recipe.yaml:3: .*given twice"),
        ("part:\n  {{rate}}: 1", [], "recipe.yaml:2: .*unhashable"),
        ("part:\n\trate: 1", [], "recipe.yaml:2: not valid YAML"),
        ("", [], "the file is empty"),
        ("- a", [], "expected a mapping"),
        ("name: a", ["prt.rate=1"], "no section 'prt'"),
        ("part: {rate: 1}", ["prt.rate=1"], "no section 'prt' .did you mean 'part'"),
        ("part: {rate: 1}", ["part.rat=1"], "did you mean 'rate'"),
        ("part: {rate: 1}", ["part.rate=abc"], "part.rate"),
        ("part: {rate: 1}", ["=5"], "expected section.key=value"),
        ("part: {rate: 1}", ["part.rate"], "expected section.key=value"),
        ("parts: [{steps: 1}]", ["parts.4.steps=1"], "no section '4'"),
        ("name: a", ["name.x=1"], "name has no keys"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        load(write(tmp_path, text), Whole, overrides)


@pytest.mark.timeout(60)
def test_a_text_that_stands_for_a_huge_one_is_refused_in_no_time(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10)]
    for key in ("name", "part", "parts", "other"):
        with pytest.raises(SettingError) as caught:
            load(write(tmp_path, "\n".join([*lines, f"{key}: *a9"])), Whole)
        assert len(str(caught.value)) < 1000


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"nowhere.yaml: No such file"):
        load(tmp_path / "nowhere.yaml", Whole)
