"""Scores count what is right, and a wrong picture is not."""

import random

import numpy as np
from PIL import Image

from ldm.data.digits import BUNDLED, load
from ldm.data.scenes import sample_scene, twin
from ldm.data.shapes import caption, held_out_prompts, render
from ldm.evaluation.scores import score_digits, score_shapes


def test_true_pictures_score_full_and_their_twins_nothing() -> None:
    rng = random.Random(0)
    scenes = [sample_scene(rng, held_out=True, kind=kind) for kind in ("one", "two") for _ in range(20)]
    prompts = [caption(scene, rng) for scene in scenes]
    true = score_shapes(prompts, [render(scene, 256) for scene in scenes])
    assert true.everything.share == true.colour_and_shape.share == 1.0 and true.wrong == ()
    wrong = score_shapes(prompts, [render(twin(scene, rng), 256) for scene in scenes])
    assert wrong.everything.share == 0.0 and len(wrong.wrong) == 40


def test_held_out_prompts_are_fixed_by_their_seed() -> None:
    for kind in ("one", "two"):
        assert held_out_prompts(50, kind, seed=0) == held_out_prompts(50, kind, seed=0)
        assert held_out_prompts(50, kind, seed=0) != held_out_prompts(50, kind, seed=1)


def test_probe_reads_real_digits_and_not_shuffled_ones() -> None:
    images, labels = load(BUNDLED)
    pictures = [Image.fromarray(image) for image in images[:300]]
    share, real = score_digits(labels[:300].tolist(), pictures, images[:900], labels[:900])
    assert share.share > 0.95 and real.share > 0.93
    shuffled, _ = score_digits(np.roll(labels[:300], 7).tolist(), pictures, images[:900], labels[:900])
    assert shuffled.share < 0.3
