"""The rule that reuses blocks by evidence."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jointkv.policy.reuse import ReuseRule


def test_more_witnesses_may_come_nearer_to_the_bounds() -> None:
    count, worst = np.array([1, 1, 2, 2, 9, 9]), np.array([0.5, 0.51, 0.66, 0.67, 0.9, 0.91], np.float32)
    assert ReuseRule().usable(5.0, count, worst).tolist() == [True, False, True, False, True, False]
    assert ReuseRule(witnesses=3).usable(5.0, count, worst).tolist() == [False, False, False, False, True, False]
    assert ReuseRule(margin=0.5).usable(5.0, count, worst).tolist() == [False] * 6


def test_a_near_entry_block_stands_in_for_missing_witnesses() -> None:
    count, worst = np.array([0, 0]), np.array([0.0, 2.0], np.float32)
    rule = ReuseRule()
    assert rule.usable(0.5, count, worst).tolist() == [True, False]
    assert rule.usable(0.51, count, worst).tolist() == [False, False]
    assert rule.usable(float("nan"), count, worst).tolist() == [False, False]


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 3, width=32), st.booleans()), max_size=8), st.floats(0, 3))
def test_nothing_new_and_nothing_beyond_the_bounds_is_ever_reused(
    pages: list[tuple[int, float, bool]], entry: float
) -> None:
    count, worst, new = (np.array(column) for column in zip(*pages, strict=True)) if pages else (np.zeros(0),) * 3
    used = ReuseRule().usable(entry, count.astype(np.int64), worst.astype(np.float32), new.astype(bool))
    assert not (used & new.astype(bool)).any() and not (used & (worst > 1)).any()
    assert used.shape == count.shape
