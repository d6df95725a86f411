"""Planning of compute reuse: against a plain search, on random residents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jointkv.core.reuse import COMPUTED, Found, ReusePlan, Run, Runs, stretches
from jointkv.errors import LayoutError

SLOTS = 12
Residents = dict[tuple[int, int], int]
residents = st.dictionaries(
    st.tuples(st.integers(0, 3), st.integers(0, SLOTS - 1)), st.integers(0, 999), max_size=3 * SLOTS
)
"""Page by source and slot."""


def runs_of(found: Residents, far: int = 1) -> Runs:
    """With sources that are `far` numbers apart."""
    keys = sorted(found, key=lambda key: key[1])
    slot, page, source = ([k[1] for k in keys], [found[k] for k in keys], [k[0] * far for k in keys])
    return Runs(*(np.array(column, np.int64) for column in (slot, page, source)))


def length(found: Residents, source: int, slot: int, end: int) -> int:
    """Blocks that `source` has from `slot` on, before `end`."""
    last = slot
    while last < end and (source, last) in found:
        last += 1
    return last - slot


@given(residents, st.integers(0, SLOTS), st.integers(0, SLOTS), st.integers(1, 5), st.sampled_from([1, 2**40]))
def test_the_next_entry_is_the_first_slot_with_a_long_enough_run(
    found: Residents, start: int, end: int, least: int, far: int
) -> None:
    possible = [
        slot for slot in range(start, end) if any(length(found, source, slot, end) >= least for source in range(4))
    ]
    assert runs_of(found, far).next_entry(start, end, least) == (min(possible) if possible else None)


@given(residents, st.integers(0, SLOTS - 1), st.integers(0, SLOTS), st.integers(1, 4), st.integers(1, 4))
def test_runs_through_a_slot_are_the_longest_and_their_pages_the_sources(
    found: Residents, slot: int, end: int, least: int, count: int
) -> None:
    runs = runs_of(found).through(slot, end, least, count)
    lengths = {source: length(found, source, slot, end) for source in range(4)}
    expected = sorted((long for long in lengths.values() if long >= least), reverse=True)[:count]
    assert [len(run.pages) for run in runs] == expected
    for run in runs:
        assert run.first == slot and run.end == slot + lengths[run.source]
        assert run.pages.tolist() == [found[run.source, place] for place in range(slot, run.end)]


def test_of_two_pages_of_a_source_at_one_slot_the_first_counts() -> None:
    columns = [4, 4, 5], [7, 8, 9], [1, 1, 1]
    (run,) = Runs(*(np.array(column, np.int64) for column in columns)).through(4, 9, 2, 4)
    assert run.pages.tolist() == [7, 9]


@given(st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS), st.integers(1, 4), st.integers(0, 5))
def test_a_plan_adopts_what_is_usable_in_stretches_that_are_worth_it(
    usable: list[bool], least: int, first: int
) -> None:
    run = Run(first, 0, np.arange(100, 100 + SLOTS))
    pages = np.where(usable, run.pages, COMPUTED)
    plan = ReusePlan.nothing(first + SLOTS + 3).adopting(run.first, pages, least)
    for slot, page in enumerate(plan.pages):
        assert page in (COMPUTED, 100 + slot - first)
        if page != COMPUTED:
            assert usable[slot - first]
    assert all(len(stretch) >= least for stretch in plan.reused)
    left = [slot for slot in range(SLOTS) if usable[slot] and plan.pages[first + slot] == COMPUTED]
    assert all(len(stretch) < least for stretch in stretches(np.isin(np.arange(SLOTS), left)))
    covered = [slot for stretch in (*plan.reused, *plan.gaps) for slot in stretch]
    assert sorted(covered) == list(range(max(covered, default=-1) + 1)), (
        "gaps and reused stretches fill the prompt up to the tail"
    )
    assert plan.skipped == sum(map(len, plan.reused)) == len(plan.pages) - plan.computed(0, len(plan.pages))


def test_plans_of_several_runs_add_up() -> None:
    plan = ReusePlan.nothing(10)
    plan = plan.adopting(2, np.array([20, 21]), 1)
    plan = plan.adopting(6, np.array([30, 31, 32]), 1)
    assert plan.reused == [range(2, 4), range(6, 9)]
    assert plan.gaps == [range(2), range(4, 6)]


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(LayoutError, match="2 slots, 1 pages and 2 sources"):
        Runs(np.zeros(2, np.int64), np.zeros(1, np.int64), np.zeros(2, np.int64))
    with pytest.raises(LayoutError, match="2 pages from 5 on for 5 slots"):
        ReusePlan.nothing(5).adopting(5, np.array([1, 2]), 1)
    with pytest.raises(LayoutError, match="out of order"):
        Runs(np.array([1, 0]), np.zeros(2, np.int64), np.zeros(2, np.int64))
    two, three = np.zeros(2, np.int64), np.zeros(3, np.int64)
    with pytest.raises(LayoutError, match="2 slots, 3 pages, 2 sources"):
        Found(two, three, two, two.astype(bool))
    with pytest.raises(LayoutError, match="out of order"):
        Found(np.array([1, 0]), two, two, two.astype(bool))


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.1, 0.2, np.inf])), max_size=12))
def test_the_first_of_each_slot_by_a_key(blocks: list[tuple[int, float]]) -> None:
    blocks = sorted(blocks, key=lambda block: block[0])
    slots, key = (np.array(column) for column in zip(*blocks, strict=True)) if blocks else (np.zeros(0),) * 2
    columns = [slots.astype(np.int64)] * 3
    chosen = Found(*columns, slots.astype(bool)).first_by(key)
    expected = [
        min((index for index, block in enumerate(blocks) if block[0] == slot), key=lambda index: key[index])
        for slot in sorted({slot for slot, _ in blocks})
    ]
    assert chosen.tolist() == expected


def test_stretches_of_resident_slots_do_not_care_in_whose_pages() -> None:
    slot = np.array([0, 2, 2, 3, 7, 8, 9])
    resident = Found(slot, slot, np.array([0, 1, 2, 2, 1, 2, 3]), slot > 0)
    assert resident.stretches(1) == [range(1), range(2, 4), range(7, 10)]
    assert resident.stretches(3) == [range(7, 10)] and resident.stretches(4) == []
