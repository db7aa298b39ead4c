"""What a picture is called in one step of training: one of its captions, in one of the templates, or nothing at all."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from ldm.config import Config
from ldm.data.order import Chance
from ldm.data.tally import BadSample

NAME = re.compile(r"\{(\w+)\}")


class CaptionConfig(Config):
    """How captions are chosen. `captions` in a sample's json are further ones beside its txt."""

    choice: Literal["first", "any"] = "first"
    # With choice any: how often it is the first nevertheless, the caption of its txt.
    first: float = Field(default=0.0, ge=0, le=1)
    # Regular expressions: what one of them matches whole is left out, unless that leaves a sample without captions.
    exclude: tuple[str, ...] = ()
    # Probability that the caption becomes the null prompt, for classifier-free guidance.
    dropout: float = Field(default=0.0, ge=0, le=1)
    # Such as "a photo of {caption}" or "{caption}, {style} style": names other than caption are the sample's facts,
    # and a template that names a fact the sample lacks is not used for it.
    templates: tuple[str, ...] = ()
    # What a sample without words is: bad, or a picture of the null prompt.
    empty: Literal["skip", "uncond"] = "skip"

    @field_validator("templates")
    @classmethod
    def _says_the_caption(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if "caption" not in NAME.findall(template):
                raise ValueError(f"template {template!r} does not have {{caption}} in it")
        return templates

    @field_validator("exclude")
    @classmethod
    def _are_expressions(cls, expressions: tuple[str, ...]) -> tuple[str, ...]:
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{expression!r} is not a regular expression: {error}") from None
        return expressions


def all_captions(caption: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Every caption of a sample, the one of its txt first, none twice, none empty."""
    listed = facts.get("captions", [])
    further = [text.strip() for text in listed if isinstance(text, str)] if isinstance(listed, list) else []
    return tuple(dict.fromkeys(text for text in (caption, *further) if text))


def choose_captions(
    caption: str, facts: Mapping[str, Any], config: CaptionConfig, chance: Chance, where: str, count: int
) -> tuple[str, ...]:
    """The caption of this step, then those that were as likely, drawn one by one: `count` in all. Faults as below."""
    chances = (chance, *(chance.other(f"draw {number}") for number in range(1, count)))
    return tuple(choose_caption(caption, facts, config, each, where) for each in chances)


def choose_caption(caption: str, facts: Mapping[str, Any], config: CaptionConfig, chance: Chance, where: str) -> str:
    """The caption of this step, empty for the null prompt. BadSample for a sample without words, if those are bad."""
    known = wanted(all_captions(caption, facts), config.exclude)
    if not known:
        if config.empty == "uncond":
            return ""
        raise without_words(where)
    if chance("caption dropout") < config.dropout:
        return ""
    chosen = known[which(len(known), config.choice, config.first, chance)]
    usable = [template for template in config.templates if set(NAME.findall(template)) <= {"caption", *facts}]
    if not usable:
        return chosen
    words = {**facts, "caption": chosen}
    return NAME.sub(lambda found: str(words[found[1]]), pick(usable, chance("template")))


def wanted(captions: tuple[str, ...], exclude: tuple[str, ...]) -> tuple[str, ...]:
    """Those that no expression matches whole; all of them if there are no such."""
    return tuple(one for one in captions if not any(re.fullmatch(each, one) for each in exclude)) or captions


def which(count: int, choice: Literal["first", "any"], first: float, chance: Chance) -> int:
    """The place of this step's caption among `count`, of which `first` is how often any is the first nevertheless."""
    if choice == "first" or (first > 0 and chance("first caption") < first):
        return 0
    return int(chance("caption") * count)


def without_words(where: str) -> BadSample:
    """The fault of a sample without words."""
    return BadSample(where, "empty caption", "got an empty caption, expected words")


def pick(choices: tuple[str, ...] | list[str], number: float) -> str:
    """The choice that a number in [0, 1) stands for."""
    return choices[int(number * len(choices))]
