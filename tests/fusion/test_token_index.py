"""The index of pages by equal text against plain lists, under any sequence of changes and look-ups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jointkv.errors import IntegrityError
from jointkv.fusion.token_index import MOST, TokenIndex, places
from tests.effort import machine_settings

BUCKETS = [(("alice", 0), 1), (("alice", 0), 2), (("alice", 1), 1), (("bob", 0), 1), ("chunk", 7)]
PAGES = st.integers(0, 12)
SOME = st.lists(st.sampled_from(BUCKETS), min_size=1, max_size=3)


class TokenIndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = TokenIndex()
        self.pages: dict[object, list[int]] = {bucket: [] for bucket in BUCKETS}

    def known(self) -> set[int]:
        return {page for pages in self.pages.values() for page in pages}

    @rule(buckets=SOME, page=PAGES)
    def add(self, buckets: list, page: int) -> None:
        if page in self.known():
            with pytest.raises(IntegrityError):
                self.index.add(buckets, page)
            return
        self.index.add(buckets, page)
        for bucket in set(buckets):
            self.pages[bucket].append(page)

    @rule(page=PAGES)
    def remove(self, page: int) -> None:
        self.index.remove(page)
        self.pages = {bucket: [held for held in pages if held != page] for bucket, pages in self.pages.items()}

    @rule(page=PAGES)
    def prefer(self, page: int) -> None:
        self.index.prefer(page)
        self.pages = {
            bucket: sorted(pages, key=lambda held: held != page)  # stable
            for bucket, pages in self.pages.items()
        }

    @rule(buckets=SOME, count=st.integers(1, 5))
    def look_up(self, buckets: list, count: int) -> None:
        expected: list[int] = []
        for bucket in buckets:
            expected += [page for page in self.pages[bucket] if page not in expected]
        assert self.index.candidates(buckets, count) == expected[:count]
        for bucket in buckets:
            owner, place = bucket
            assert self.index.pages(owner, [99, place, place]).tolist() == 2 * self.pages[bucket]
            assert {page for page in range(13) if self.index.holds(bucket, page)} == set(self.pages[bucket])

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.pages = {bucket: [] for bucket in BUCKETS}

    @invariant()
    def agrees(self) -> None:
        self.index.check_integrity()
        assert len(self.index) == len(self.known())
        assert {page for page in range(13) if page in self.index} == self.known()
        assert not self.index.candidates([("never used", 1)], 3)


TestTokenIndex: Any = TokenIndexMachine.TestCase
TestTokenIndex.settings = machine_settings(40)
TestTokenIndex.pytestmark = [
    pytest.mark.timeout(0),
    pytest.mark.hazard(
        "State",
        "resident pages come, go and are looked up in any order (vLLM)",
        "the index knows what plain lists know, and finds nothing else",
    ),
]


def damage_list(index: TokenIndex) -> None:
    index._pages["chunk"][7].append(9)


def damage_twice(index: TokenIndex) -> None:
    index._pages["chunk"][7].append(1)


def damage_empty(index: TokenIndex) -> None:
    index._pages["chunk"][8] = []


def damage_missing(index: TokenIndex) -> None:
    del index._buckets[1]


def damage_owner(index: TokenIndex) -> None:
    index._pages["other"] = {}


@pytest.mark.parametrize("damage", [damage_list, damage_twice, damage_empty, damage_owner, damage_missing])
def test_damage_is_found(damage) -> None:
    index = TokenIndex()
    index.add([("chunk", 7)], 1)
    index.check_integrity()
    damage(index)
    with pytest.raises(IntegrityError):
        index.check_integrity()


def test_places_differ_with_text_and_with_position() -> None:
    hashes, positions = np.array([5, 5, -(2**63), 2**63 - 1]), np.array([0, 1, 100_000, 100_000])
    found = places(hashes, positions)
    assert len(set(found)) == 4 and found == places(hashes, positions)
    assert len(set(places(np.full(200_000, 7), np.arange(200_000)))) == 200_000


def test_of_very_many_copies_of_a_text_the_first_are_looked_at() -> None:
    """Those that served last among them; the others stay resident."""
    index, copies = TokenIndex(), 3 * MOST
    for page in range(copies):
        index.add([("alice", 1)], page)
    index.add([("alice", 2)], copies)
    index.prefer(copies - 1)
    assert index.pages("alice", [1, 2]).tolist() == [copies - 1, *range(MOST - 1), copies]
    assert index.candidates([("alice", 1)], 2) == [copies - 1, 0] and len(index) == copies + 1
    index.check_integrity()
