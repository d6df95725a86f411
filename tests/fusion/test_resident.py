"""The index of resident blocks against a plain dictionary, under any sequence of changes and look-ups."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jointkv.errors import IntegrityError
from jointkv.fusion.resident import ResidentIndex
from tests.effort import machine_settings

SIZE = 3
KEYS = [("batch", "alice", 0, 0), ("batch", "alice", 0, 1), ("batch", "bob", 0, 0), "d", 5]
MAX_PAGE = 400
NO_PAGE = -1


@dataclass
class Resident:
    """What the index should know about a page."""

    key: object
    signature: list[float]
    tokens: int | None


def long(numbers):
    return torch.tensor(numbers, dtype=torch.long)


def signatures_of(draw, count):
    """Small whole numbers, so that squared distances are exact; some rows hold NaN or infinity."""
    numbers = st.integers(-2, 2).map(float)
    rows = st.lists(numbers, min_size=SIZE, max_size=SIZE)
    bad = st.sampled_from([[torch.nan, 0.0, 0.0], [0.0, torch.inf, 0.0]])
    return draw(st.lists(rows | rows | rows | bad, min_size=count, max_size=count), label="signatures")


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = ResidentIndex(SIZE)
        self.model: dict[int, Resident] = {}  # in the order of arrival

    def draw_buckets(self, draw, count):
        """Keys, some of them unused, and for each block the number of its key."""
        keys = draw(st.lists(st.sampled_from(KEYS), unique=True, min_size=1), label="keys")
        return keys, draw(st.lists(st.integers(0, len(keys) - 1), min_size=count, max_size=count))

    @rule(data=st.data(), many=st.booleans(), with_tokens=st.booleans())
    def add(self, data, many, with_tokens):
        new = sorted(set(range(MAX_PAGE)) - set(self.model))
        size = 70 if many else 5
        start = data.draw(st.integers(0, len(new) - 1), label="first page")
        pages = data.draw(st.permutations(new[start : start + size]), label="pages")
        keys, which = self.draw_buckets(data.draw, len(pages))
        signatures = signatures_of(data.draw, len(pages))
        tokens = data.draw(st.lists(st.integers(1, 3), min_size=len(pages), max_size=len(pages)))
        finite = torch.tensor(signatures).isfinite().all(1).tolist()
        if not any(finite):
            return
        self.index.add(keys, long(which), long(pages), torch.tensor(signatures), long(tokens) if with_tokens else None)
        for i, page in enumerate(pages):
            if finite[i]:
                known = tokens[i] if with_tokens else None
                self.model[page] = Resident(keys[which[i]], signatures[i], known)

    @rule(data=st.data())
    def add_known(self, data):
        if not self.model:
            return
        page = data.draw(st.sampled_from(sorted(self.model)))
        fresh = next(page for page in range(MAX_PAGE + 1) if page not in self.model)
        with pytest.raises(IntegrityError):
            self.index.add([KEYS[0]], long([0, 0]), long([fresh, page]), torch.zeros(2, SIZE))

    @rule(data=st.data(), everything=st.booleans())
    def remove(self, data, everything):
        known = sorted(self.model)
        pages = data.draw(st.lists(st.integers(0, 2 * MAX_PAGE), unique=True, max_size=20))
        if known:
            pages += data.draw(st.lists(st.sampled_from(known), unique=True, max_size=20))
        pages = sorted(set(pages + known if everything and data.draw(st.booleans()) else pages))
        self.index.remove(long(pages))
        self.model = {page: resident for page, resident in self.model.items() if page not in pages}

    @rule(key=st.sampled_from(KEYS))
    def empty_a_bucket(self, key):
        pages = [page for page, resident in self.model.items() if resident.key == key]
        self.index.remove(long(pages))
        self.model = {page: self.model[page] for page in self.model if page not in pages}

    @rule()
    def clear(self):
        if len(self.model) > 100:
            self.index.clear()
            self.model = {}

    @rule(data=st.data(), limit=st.sampled_from([0.0, 1.0, 3.0, 9.0]), count=st.integers(1, 4))
    def near(self, data, limit, count):
        queries = signatures_of(data.draw, data.draw(st.integers(0, 4)))
        keys, which = self.draw_buckets(data.draw, len(queries))
        asked = torch.tensor(queries).view(-1, SIZE)
        pages, distances = self.index.near(keys, long(which), asked, limit, count)
        assert pages.shape == distances.shape and pages.shape[1] <= count
        for i, query in enumerate(queries):
            distance = {
                page: sum((a - b) ** 2 for a, b in zip(query, resident.signature, strict=True))
                for page, resident in self.model.items()
                if resident.key == keys[which[i]]
            }
            within = sorted(number for number in distance.values() if number <= limit)
            found = [page for page in pages[i].tolist() if page != NO_PAGE]
            assert len(set(found)) == len(found) and set(found) <= set(distance)
            # Pages at equal distance may come in any order: their distances may not.
            assert [distance[page] for page in found] == within[:count]
            assert distances[i, : len(found)].tolist() == within[:count]
            assert pages[i, len(found) :].eq(NO_PAGE).all()

    @rule(data=st.data(), count=st.integers(1, 4))
    def same_tokens(self, data, count):
        asked = data.draw(st.lists(st.integers(1, 4), max_size=4), label="tokens")
        keys, which = self.draw_buckets(data.draw, len(asked))
        pages = self.index.same_tokens(keys, long(which), long(asked), count)
        for i, tokens in enumerate(asked):
            expected = [
                page
                for page, resident in self.model.items()
                if resident.key == keys[which[i]] and resident.tokens == tokens
            ]
            found = [page for page in pages[i].tolist() if page != NO_PAGE]
            assert found == expected[:count], "the oldest first"

    @invariant()
    def knows_what_the_model_knows(self):
        self.index.check_integrity()
        assert len(self.index) == len(self.model)
        every = torch.arange(2 * MAX_PAGE)
        assert self.index.contains(every).nonzero().flatten().tolist() == sorted(self.model)


TestIndex: Any = IndexMachine.TestCase
TestIndex.settings = machine_settings(25)
TestIndex.pytestmark = [
    pytest.mark.timeout(0),
    pytest.mark.hazard(
        "State",
        "resident pages come, go and are looked up in any order (transformers)",
        "the index knows what a plain dictionary knows, and finds nothing else",
    ),
]


def test_look_ups_in_an_empty_index_find_nothing():
    index = ResidentIndex(SIZE)
    pages, _ = index.near(["a"], long([0, 0]), torch.zeros(2, SIZE), 1.0, 4)
    assert not (pages != NO_PAGE).any() and len(pages) == 2
    assert not (index.same_tokens(["a"], long([0]), long([7]), 4) != NO_PAGE).any()
    index.remove(long([3]))
    index.check_integrity()


def test_rows_that_are_not_finite_are_left_out_even_when_there_are_no_others():
    index = ResidentIndex(SIZE)
    index.add(["a"], long([0]), long([3]), torch.full((1, SIZE), torch.nan))
    assert len(index) == 0
    index.check_integrity()


def test_a_page_named_twice_is_removed_once():
    index = ResidentIndex(SIZE)
    index.add(["a"], long([0, 0]), long([3, 4]), torch.zeros(2, SIZE))
    index.remove(long([3, 3]))
    index.check_integrity()
    assert index.contains(long([3, 4])).tolist() == [False, True]


def test_a_page_cannot_be_added_twice_in_one_call():
    index = ResidentIndex(SIZE)
    with pytest.raises(IntegrityError):
        index.add(["a"], long([0, 0]), long([3, 3]), torch.zeros(2, SIZE))


def test_keys_that_no_block_uses_leave_no_bucket_behind():
    """The chunk scope has new keys for every request: buckets that were never filled would pile up."""
    index = ResidentIndex(SIZE)
    for request in range(3):
        index.add([("used", request), ("unused", request)], long([0]), long([7]), torch.zeros(1, SIZE))
        index.remove(long([7]))
    assert not index._buckets


def test_a_broken_index_is_noticed():
    def filled():
        index = ResidentIndex(SIZE)
        index.add(["a", "b"], long([0, 0, 1]), long([3, 4, 5]), torch.zeros(3, SIZE))
        index.check_integrity()
        return index

    def lose_a_page(index):
        index._entry_of_page[3] = -1

    def mistake_a_bucket(index):
        index._bucket_of[int(index._entry_of_page[5])] = "a"

    def forget_a_member(index):
        index._buckets["a"] = index._buckets["a"][:1]

    def free_a_live_entry(index):
        index._free_count += 1

    for damage in (lose_a_page, mistake_a_bucket, forget_a_member, free_a_live_entry):
        index = filled()
        damage(index)
        with pytest.raises(IntegrityError):
            index.check_integrity()
