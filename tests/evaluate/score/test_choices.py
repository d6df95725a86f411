"""Margins and orders of answers to choose from, by hand."""

import pytest

from jointkv.errors import BadInput
from jointkv.evaluate.score.choices import flipped, margin


def test_margin_is_that_of_the_best_of_each_side():
    assert margin([-1.0, -3.0, -1.5, -9.0], [1]) == -2.0
    assert margin([-1.0, -3.0, -1.5, -9.0], [1, 2]) == -0.5
    for right in ([], [0, 1]):
        with pytest.raises(BadInput, match=f"of 2 {len(right)} are right"):
            margin([-1.0, -2.0], right)


def test_flipped_counts_pairs_that_change_places():
    order = [-1.0, -2.0, -3.0, -4.0]
    assert flipped(order, order) == 0.0 and flipped(order, order[::-1]) == 1.0
    assert flipped(order, [-2.0, -1.0, -3.0, -4.0]) == pytest.approx(1 / 6)
    assert flipped(order, [-1.0, -1.0, -1.0, -1.0]) == 0.0  # a tie stands in no other order
    for other in ([-1.0], [-1.0, -2.0]):
        with pytest.raises(BadInput, match="orders of"):
            flipped(other, [-1.0])
