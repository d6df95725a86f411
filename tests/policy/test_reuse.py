"""The rule that reuses blocks by evidence."""

from __future__ import annotations

import numpy as np

from jointkv.policy.reuse import ReuseRule


def test_witnesses_decide_and_an_entry_block_stands_in_where_they_are_missing() -> None:
    count, worst = np.array([0, 0, 2, 2, 1]), np.array([0, 0.8, 0.7, 0.71, 0.3], np.float32)
    rule = ReuseRule(witnesses=2, margin=0.7)
    assert rule.usable(1.0, count, worst).tolist() == [True, False, True, False, True]
    assert rule.usable(1.01, count, worst).tolist() == [False, False, True, False, False]
    assert rule.usable(float("nan"), count, worst).tolist() == [False, False, True, False, False]
