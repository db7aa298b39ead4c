"""Does a model of shapes know what is where? Its error with a picture's caption, and with the relation in it mirrored.

Who reads "a circle to the left of a square" as a bag of words is as content with "to the right of". The question is the
harder the less the noisy picture itself shows of it: what counts are the last timesteps.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ldm.bundle import Bundle
from ldm.data.scenes import INVERSE, sample_scene
from ldm.data.shapes import caption, render
from ldm.evaluation.denoising import Bin, errors_by_level
from ldm.evaluation.figures import Share, of_share
from ldm.evaluation.held_out import HeldOut, means, protocol, reading, table
from ldm.evaluation.pictures import Captioned
from ldm.evaluation.results import Result

SIDE = 256
CONTEXTS = ("right", "mirrored")


class Pair(NamedTuple):
    """A fresh picture of two objects, which the model may have been trained on the like of, and what else is said."""

    picture: Captioned
    mirrored: str


def pairs(count: int) -> Iterator[Pair]:
    """The same pictures for the same count, of combinations as in training."""
    for index in range(count):
        scene = sample_scene(random.Random(f"order {index}"), kind="two")
        assert scene.relation is not None
        turned = replace(scene, relation=INVERSE[scene.relation])
        own, mirrored = (caption(one, random.Random(index)) for one in (scene, turned))  # in the same wording
        yield Pair(Captioned(f"{index}", render(scene, SIDE), own), mirrored)


def order_results(bundle: Bundle, seen: HeldOut, mirrored: Sequence[str]) -> tuple[list[Result], str]:
    """In how many pictures the own caption has the smaller ε error, at the last bin of timesteps; and all bins.

    `seen` are the encoded pictures of `pairs`. The second is a table in Markdown.
    """
    bins = errors_by_level(reading(bundle), bundle.schedule, seen.latents, (seen.captions, mirrored))
    shares = [preferred(one) for one in bins]
    details = {
        "bins": [
            {"timestep": b.timestep, "snr": b.snr, **means(b, CONTEXTS), "preferred": share.share}
            for b, share in zip(bins, shares, strict=True)
        ]
    }
    last = f"right order preferred to mirrored, t = {bins[-1].timestep}"
    result = Result(last, "fresh pairs", of_share(shares[-1]), protocol(bundle, seen, "order/1"), "%", details=details)
    rows = [
        [*(f"{error:.5f}" for error in means(b, CONTEXTS).values()), f"{100 * share.share:.0f} %"]
        for b, share in zip(bins, shares, strict=True)
    ]
    return [result], table((*CONTEXTS, "right is preferred"), bins, rows)


def preferred(of: Bin) -> Share:
    """The pictures whose own caption has the smaller error; a tie is none."""
    right, mirrored = of.errors
    return Share(int((right < mirrored).sum()), len(right))
