"""Nearest neighbours on a line, where everybody can count."""

import numpy as np
import pytest

from ldm.evaluation import neighbours
from ldm.evaluation.figures import Array
from ldm.evaluation.neighbours import copies, prdc, radii


def line(*places: float) -> Array:
    return np.array(places)[:, None]


def test_radius_is_the_distance_to_the_kth_other() -> None:
    assert radii(line(0, 1, 3, 7), 1) == pytest.approx([1, 1, 2, 4])
    assert radii(line(0, 1, 3, 7), 3) == pytest.approx([7, 6, 4, 7])


def test_precision_recall_density_and_coverage_of_a_line() -> None:
    real = line(0, 1, 2, 3)  # balls with k = 1 reach 1 to either side, ends not in them
    drawn = line(0.5, 0.6, 9, 9.1)  # the last two lie alone; balls reach 0.1
    found = prdc(drawn, real, k=1)
    assert found.precision.value == 0.5  # 0.5 and 0.6 lie in a real ball
    assert found.density.value == (2 + 2 + 0 + 0) / 4  # each in the balls of 0 and of 1
    assert found.coverage.value == 0.5  # the balls of 0 and 1 hold a drawn one, those of 2 and 3 do not
    assert found.recall.value == 0.0  # no real one within 0.1 of a drawn one
    other = prdc(real, drawn, k=1)
    assert other.recall.value == found.precision.value and other.precision.value == found.recall.value


def test_equal_sets_are_true_and_cover_all() -> None:
    same = np.random.default_rng(0).normal(size=(40, 3))
    found = prdc(same, same, k=5)
    assert found.precision.value == found.recall.value == found.coverage.value == 1.0
    far = prdc(same + 100, same, k=5)
    assert far.precision.value == far.recall.value == far.density.value == far.coverage.value == 0.0


def test_density_of_one_distribution_is_about_one() -> None:
    rng = np.random.default_rng(1)
    found = prdc(rng.normal(size=(600, 4)), rng.normal(size=(600, 4)))
    assert found.density.value == pytest.approx(1.0, abs=0.1)  # its expectation (2002.09797, Section 3)
    assert found.coverage.value == pytest.approx(1 - 0.5**5, abs=0.04)  # 1 − 2⁻ᵏ for equally many (Section 3)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    drawn, real = rng.normal(size=(23, 3)), rng.normal(size=(31, 3))
    whole, ratios = prdc(drawn, real), copies(drawn, real, 4).ratios
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    assert prdc(drawn, real) == whole and copies(drawn, real, 4).ratios == pytest.approx(ratios)


def test_ratio_of_a_copy_is_zero_and_of_a_stranger_near_one() -> None:
    trained = line(0, 10, 20, 30)
    found = copies(line(10, 11, 1000), trained, following=2)
    assert found.ratios == pytest.approx([0, 1 / 10, 970 / 985]) and found.nearest.tolist() == [1, 1, 3]
    assert (found.copied.right, found.copied.total) == (2, 3)


def test_two_training_pictures_that_are_alike_hide_a_copy_only_from_one_neighbour() -> None:
    trained = line(0, 0.001, 20, 30, 40)
    assert copies(line(0.0005), trained, following=1).copied.right == 0
    assert copies(line(0.0005), trained, following=3).copied.right == 1


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 5 of each"):
        prdc(line(*range(5)), line(*range(9)))
    with pytest.raises(ValueError, match="more than 50"):
        copies(line(1), line(*range(50)))
