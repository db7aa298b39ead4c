"""How often the pictures of a model are right: shapes as the oracle reads them, digits as a linear probe reads them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.shapes import parse_caption
from ldm.evaluation.shapes_oracle import judge, read


@dataclass(frozen=True)
class Share:
    """`right` of `total`, with the 95 % interval of the share (Wilson 1927)."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """The share as a fraction."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval."""
        z, n, p = 1.96, self.total, self.share
        centre, spread = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.1f} % ({self.right} of {self.total}; 95 %: {100 * low:.1f} to {100 * high:.1f})"


@dataclass(frozen=True)
class ShapesScore:
    """Of the pictures of a list of prompts: which share has the right colours and shapes, count, relation, and all."""

    colour_and_shape: Share
    count: Share
    relation: Share
    everything: Share
    wrong: tuple[int, ...]

    def as_json(self) -> dict[str, object]:
        """Figures as plain values."""
        return asdict(self)


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
