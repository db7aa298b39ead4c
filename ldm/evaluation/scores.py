"""How often the pictures of a model are right: shapes as the oracle reads them, digits as a linear probe reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.shapes import parse_caption
from ldm.evaluation.figures import Share, of_share
from ldm.evaluation.results import Result, digest
from ldm.evaluation.shapes_oracle import judge, read


@dataclass(frozen=True)
class ShapesScore:
    """Of the pictures of a list of prompts: which share has the right colours and shapes, count, relation, and all."""

    colour_and_shape: Share
    count: Share
    relation: Share
    everything: Share
    wrong: tuple[int, ...]


def score_shapes(prompts: Sequence[str], images: Sequence[Image.Image]) -> ShapesScore:
    """Judge each picture by its prompt. Raises ValueError for a prompt outside of the shapes' grammar."""
    verdicts = [judge(read(image), parse_caption(prompt)) for prompt, image in zip(prompts, images, strict=True)]
    total = len(verdicts)
    return ShapesScore(
        Share(sum(v.colour and v.shape and v.count for v in verdicts), total),
        Share(sum(v.count for v in verdicts), total),
        Share(sum(v.relation for v in verdicts), total),
        Share(sum(v.right for v in verdicts), total),
        tuple(i for i, v in enumerate(verdicts) if not v.right),
    )


def shapes_results(score: ShapesScore, kind: str, prompts: Sequence[str], made: Mapping[str, object]) -> list[Result]:
    """The shares as results of the drawn pictures that `made` decided; the prompts of wrong ones are in the last."""
    decided = {"version": "shapes/1", "pictures": made}
    wrong = {"wrong": [[i, prompts[i]] for i in score.wrong]}
    return [
        Result(f"shapes, {kind}: {what}", "drawn", of_share(share), decided, "%", details=details)
        for what, share, details in (
            ("colour, shape and number", score.colour_and_shape, {}),
            ("number", score.count, {}),
            ("relation", score.relation, {}),
            ("everything", score.everything, wrong),
        )
    ]


def features(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Digits (n 28 28) as 14×14 pixel averages in 0…1, flattened: what the linear probe sees."""
    halved = images.reshape(len(images), 14, 2, 14, 2).mean(axis=(2, 4))
    return halved.reshape(len(images), -1) / 255.0


def score_digits(
    asked: Sequence[int], images: Sequence[Image.Image], real: NDArray[np.uint8], labels: NDArray[np.int64]
) -> tuple[Share, Share]:
    """The share of pictures that a linear probe reads as the digit asked for, and that of real digits it reads right.

    The probe is a logistic regression that is trained on four fifths of the real digits (n 28 28).
    """
    from sklearn.linear_model import LogisticRegression

    order = np.random.default_rng(0).permutation(len(real))
    held_out, trained = order[: len(order) // 5], order[len(order) // 5 :]
    probe = LogisticRegression(max_iter=1000).fit(features(real[trained]), labels[trained])
    real_right = int((probe.predict(features(real[held_out])) == labels[held_out]).sum())
    drawn = np.stack([np.asarray(image.convert("L")) for image in images])
    right = int((probe.predict(features(drawn)) == np.asarray(asked)).sum())
    return Share(right, len(asked)), Share(real_right, len(held_out))


def digits_results(share: Share, on_real: Share, real: NDArray[np.uint8], made: Mapping[str, object]) -> list[Result]:
    """The shares of `score_digits` as results; `real` are the digits that the probe learned on."""
    decided = {"version": "digits/1", "real_sha256": digest(real.tobytes().hex())}
    return [
        Result("digits read as asked", "drawn", of_share(share), {**decided, "pictures": made}, "%"),
        Result("digits read as labelled", "held-out real ones", of_share(on_real), decided, "%"),
    ]
