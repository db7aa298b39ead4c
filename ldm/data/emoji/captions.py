"""What a drawing is called: one main caption, and others that people might as well write."""

import re

from ldm.data.emoji.names import phrase
from ldm.data.emoji.sources import Drawing
from ldm.data.order import Chance

KEYWORDS = 3


def captions(drawing: Drawing) -> tuple[str, ...]:
    """The main caption first: `a flat emoji of a red apple`; then the style last, as an icon on white, the set's own
    name, without a style, and as a list of words.
    """
    style, concept = drawing.style, drawing.concept
    what = phrase(concept.name, concept.group, drawing.tone, coloured=style.source != "fluent_bw")
    chance = Chance(f"keywords {drawing.key}")
    tags = sorted(concept.keywords, key=chance)[:KEYWORDS]
    bare = re.sub(r"^(an?|the) ", "", what)
    return tuple(
        dict.fromkeys(
            (
                f"a {style.word} emoji of {what}",
                f"{what}, {style.word} emoji style",
                f"{style.icon} of {what} on a white background",
                f"{style.label} emoji of {what}",
                what,
                ", ".join((f"{style.word} emoji", bare, *tags)),
            )
        )
    )
