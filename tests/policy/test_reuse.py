"""The rule that reuses blocks by evidence."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jointkv.core.evidence import Known
from jointkv.core.moved_text import UNWRITTEN
from jointkv.core.reuse import COMPUTED, Found, ReusePlan, Run
from jointkv.policy.reuse import ReuseRule, audited, decide


def known(*pages: tuple[int, float, bool]) -> Known:
    """From witnesses, worst ratio and whether there are new echoes, of each page."""
    columns = [np.array([page[column] for page in pages]) for column in range(3)]
    return Known(columns[0].astype(np.int64), columns[1].astype(np.float32), columns[2].astype(bool))


def test_more_witnesses_may_come_nearer_to_the_bounds() -> None:
    pages = known(*((n, worst, False) for n, worst in ((1, 0.5), (1, 0.51), (2, 0.66), (2, 0.67), (9, 0.9), (9, 0.91))))
    assert ReuseRule().usable(pages).tolist() == [True, False, True, False, True, False]
    assert ReuseRule(witnesses=3).usable(pages).tolist() == [False, False, False, False, True, False]
    assert ReuseRule(margin=0.5).usable(pages).tolist() == [False] * 6


def test_a_near_entry_block_stands_in_for_missing_witnesses() -> None:
    pages, rule = known((0, 0.0, False), (0, 2.0, False), (1, 0.0, False)), ReuseRule()
    assert rule.usable(pages).tolist() == [False, False, True]
    assert rule.usable(pages, 0.5).tolist() == [True, False, True]
    assert rule.usable(pages, 0.51).tolist() == [False, False, True]
    assert rule.usable(pages, math.nan).tolist() == [False, False, True]


@given(
    st.lists(st.tuples(st.integers(0, 20), st.floats(0, 3, width=32), st.booleans()), max_size=8),
    st.floats(0, 3) | st.just(math.inf),
)
def test_nothing_new_and_nothing_beyond_the_bounds_is_ever_reused(
    pages: list[tuple[int, float, bool]], entry: float
) -> None:
    evidence = known(*pages)
    used = ReuseRule().usable(evidence, entry)
    assert not (used & evidence.new).any() and not (used & (evidence.worst > 1)).any()
    assert used.shape == evidence.count.shape


def found(*blocks: tuple[int, int, int], exact: Sequence[int] | None = None) -> Found:
    """From slot, page and source of each resident block, and the pages whose contexts are exact; else all are."""
    slot, page, source = np.array(sorted(blocks), np.int64).reshape(-1, 3).T
    return Found(slot, page, source, np.isin(page, page if exact is None else exact))


def test_of_several_pages_exact_ones_serve_first_then_those_expected_nearest() -> None:
    blocks = [(slot, 10 * source + slot, source) for slot in range(4) for source in (1, 2, 3)]
    worst = {**dict.fromkeys((10, 11, 12, 13), 0.4), **dict.fromkeys((20, 21, 22, 23), 0.3), 31: 0.1, 33: 0.9}
    resident = found(*blocks, exact=[10, 11, 20, 21, 30])
    evidence = known(*((page in worst, worst.get(page, 0.0), False) for page in resident.page.tolist()))
    plan = ReuseRule().witnessed(resident, evidence, slots=5)
    assert plan.pages.tolist() == [20, 21, 22, 23, COMPUTED]
    alone = resident.where(resident.exact)
    assert ReuseRule().witnessed(alone, evidence.where(resident.exact), 5).pages[:2].tolist() == [20, 21]
    assert ReuseRule(sources=1).asked(resident, evidence).page.tolist() == [20, 21, 22, 23]
    assert set(ReuseRule(sources=2).asked(resident, evidence).page.tolist()) == {10, 20, 11, 21, 12, 22, 13, 23}
    (rest,) = ReuseRule().unwitnessed(resident, evidence, ReusePlan.nothing(5)).through(0, 1, 1, 4)[2:]
    assert rest.pages.tolist() == [30]


def test_a_single_witnessed_block_is_not_worth_a_gap_around_it() -> None:
    resident = found((0, 10, 1), (2, 12, 1), (3, 13, 1))
    evidence = known(*[(1, 0.1, False)] * 3)
    assert ReuseRule().witnessed(resident, evidence, slots=5).reused == [range(2, 4)]


class Scripted:
    """Steps that answer by a table of ratios, by slot and page; pages have one clean witness or none."""

    def __init__(self, ratios: dict[tuple[int, int], float], witnessed: Collection[int] = ()) -> None:
        self.table, self.witnessed = ratios, witnessed
        self.log: list[tuple[object, ...]] = []

    def compute(self, slot: int) -> None:
        self.log.append(("compute", slot))

    def adopt(self, first: int, pages: np.ndarray) -> None:
        self.log.append(("adopt", first, pages.tolist()))

    def ratios(self, slots: np.ndarray, pages: np.ndarray) -> np.ndarray:
        return np.array([self.table[one] for one in zip(slots.tolist(), pages.tolist(), strict=True)])

    def known(self, slots: np.ndarray, pages: np.ndarray) -> Known:
        return known(*((page in self.witnessed, 0.1, False) for page in pages.tolist()))


def test_the_nearest_source_is_adopted_behind_its_entry_block() -> None:
    resident = found(*((slot, 10 * source + slot, source) for source in (1, 2) for slot in range(1, 6)))
    steps = Scripted({(1, 11): 0.6, (1, 21): 0.2})
    assert decide(resident, 0, 6, ReuseRule(), steps).reused == [range(2, 6)]
    assert steps.log == [("compute", 2), ("compute", 2), ("adopt", 2, [22, 23, 24, 25])]


def test_of_sources_that_are_near_enough_one_goes_first_that_need_not_be_written() -> None:
    rule, pages = ReuseRule(near=0.5), ([3, 4], [UNWRITTEN, UNWRITTEN + 1], [7, 8])
    sources = [Run(2, number, np.array(held)) for number, held in enumerate(pages)]
    for ratios, serves in (
        ([0.4, 0.1, 0.3], 2),
        ([0.6, 0.2, 0.9], 1),
        ([0.6, 0.9, 0.8], 0),
        ([math.nan, math.inf, 0.7], 2),
    ):
        assert rule.serving(sources, np.array(ratios)) == serves


def test_what_is_witnessed_is_adopted_without_an_entry_block() -> None:
    resident = found(*((slot, slot, 1) for slot in range(1, 8)), *((slot, 20 + slot, 2) for slot in range(10, 16)))
    steps = Scripted({(10, 30): 0.1}, witnessed={1, 2, 3, 6, 7})
    plan = decide(resident, 0, 16, ReuseRule(), steps)
    assert plan.reused == [range(1, 4), range(6, 8), range(11, 16)]
    assert steps.log == [
        *(("compute", 1), ("adopt", 1, [1, 2, 3])),
        *(("compute", 6), ("adopt", 6, [6, 7])),
        ("compute", 11),
        *(("compute", 11), ("adopt", 11, [31, 32, 33, 34, 35])),
    ]


def test_one_entry_block_stands_for_what_is_behind_a_block_that_is_too_far() -> None:
    resident = found(*((slot, slot, 1) for slot in range(2, 12)))
    evidence = known(*((0, 5.0 if slot in (2, 6, 11) else 0.0, False) for slot in range(2, 12)))
    runs = ReuseRule().unwitnessed(resident, evidence, ReusePlan.nothing(12))
    assert [(run.first, run.end) for run in runs.through(3, 12, 3, 4)] == [(3, 11)]
    assert len(runs) == 1 and runs.next_entry(0, 12, 3) == 3
    hopeless = known(*((0, 5.0, False) for _ in range(10)))
    assert len(ReuseRule().unwitnessed(resident, hopeless, ReusePlan.nothing(12))) == 0


def test_after_a_refusal_later_blocks_are_tried_at_doubling_distances() -> None:
    resident = found(*((slot, slot, 1) for slot in range(20)))
    far = {(slot, slot): 9.0 for slot in range(20)}
    steps = Scripted(far)
    assert decide(resident, 0, 20, ReuseRule(), steps).reused == []
    assert steps.log == [("compute", entry + 1) for entry in (0, 1, 3, 7, 15)]
    steps = Scripted({**far, (7, 7): 0.1, (3, 3): float("nan")})
    assert decide(resident, 0, 20, ReuseRule(), steps).reused == [range(8, 20)]


def test_an_audit_tells_what_is_read_by_the_licences_that_there_are() -> None:
    """The nearest source has no licence: what is read comes from another, and the audit must be of that one."""
    resident = found(*((slot, 10 * source + slot, source) for source in (1, 2) for slot in range(1, 6)))
    first = resident.source == 1
    classes = {"first": first, "second": ~first}
    steps = Scripted({(1, 11): 0.4, (1, 21): 0.2})

    def said(licensed: list[str], drawn: bool) -> list[tuple[list[str], list[int]]]:
        plans = audited(resident, classes, licensed, drawn, 0, 6, ReuseRule(), steps)
        return [(of, plan.pages[2:].tolist()) for of, plan in plans]

    one, other = [12, 13, 14, 15], [22, 23, 24, 25]
    assert said(["first"], drawn=True) == [(["first"], one), (["second"], other)]
    assert said(["first"], drawn=False) == [(["second"], other)]
    assert said(["first", "second"], drawn=True) == [(["first", "second"], other)]
    assert said(["first", "second"], drawn=False) == []
    assert said([], drawn=False) == [(["first"], one), (["second"], other)]
