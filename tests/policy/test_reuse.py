"""The rule that reuses blocks by evidence."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jointkv.core.reuse import Run, Runs
from jointkv.policy.reuse import ReuseRule, decide


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


class Scripted:
    """Steps that answer by a table of ratios, by slot and page, and reuse all behind a near enough entry block."""

    def __init__(self, ratios: dict[tuple[int, int], float], entry_limit: float) -> None:
        self.table, self.entry_limit = ratios, entry_limit
        self.log: list[tuple[object, ...]] = []

    def compute(self, slot: int) -> None:
        self.log.append(("compute", slot))

    def adopt(self, first: int, pages: np.ndarray) -> None:
        self.log.append(("adopt", first, pages.tolist()))

    def ratios(self, slots: np.ndarray, pages: np.ndarray) -> np.ndarray:
        return np.array([self.table[one] for one in zip(slots.tolist(), pages.tolist(), strict=True)])

    def usable(self, run: Run, entry: float) -> np.ndarray:
        return np.full(len(run.pages), entry <= self.entry_limit)


def runs(*found: tuple[int, int, int]) -> Runs:
    """From slot, page and source of each resident block."""
    return Runs(*(np.array(column, np.int64) for column in zip(*found, strict=True)))


def test_the_nearest_source_is_adopted_behind_its_entry_block() -> None:
    known = runs(*((slot, 10 * source + slot, source) for source in (1, 2) for slot in range(1, 6)))
    steps = Scripted({(1, 11): 0.6, (1, 21): 0.2}, entry_limit=0.5)
    decided = decide(known, 0, 6, ReuseRule(), steps)
    assert decided.runs == (range(2, 6),) and decided.plan.reused == [range(2, 6)]
    assert steps.log == [("compute", 2), ("compute", 2), ("adopt", 2, [22, 23, 24, 25])]


def test_after_a_refusal_later_blocks_are_tried_at_doubling_distances() -> None:
    known = runs(*((slot, slot, 1) for slot in range(20)))
    far = {(slot, slot): 9.0 for slot in range(20)}
    steps = Scripted(far, entry_limit=0.5)
    assert decide(known, 0, 20, ReuseRule(), steps).plan.reused == []
    assert steps.log == [("compute", entry + 1) for entry in (0, 1, 3, 7, 15)]
    steps = Scripted({**far, (7, 7): 0.1, (3, 3): float("nan")}, entry_limit=0.5)
    assert decide(known, 0, 20, ReuseRule(), steps).plan.reused == [range(8, 20)]
