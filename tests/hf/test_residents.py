"""The index of resident text, against a plain dictionary."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jointkv.errors import IntegrityError
from jointkv.hf.residents import MOST_SOURCES, Residents

SIZE = 2
words = st.lists(st.integers(0, 1), min_size=0, max_size=9)
requests = st.lists(st.tuples(st.sampled_from("ab"), words, st.sets(st.integers(0, 30))), max_size=MOST_SOURCES)


def array(numbers):
    return np.array(list(numbers), np.int64)


@given(requests, st.sampled_from("abc"), words)
def test_find_returns_what_a_plain_search_does(held, tenant, asked):
    """Every request is added with pages of its own, of which some are then forgotten."""
    residents, expected, pages = Residents(SIZE), {}, 0
    for source, (owner, tokens, gone) in enumerate(held):
        blocks = len(tokens) // SIZE
        own = array(range(pages, pages + blocks))
        residents.add(owner, array(tokens), array(range(blocks)), own, source)
        expected |= {int(page): (owner, tokens, slot, source) for slot, page in enumerate(own)}
        residents.forget(torch.tensor(sorted(gone), dtype=torch.long))
        expected = {page: entry for page, entry in expected.items() if page not in gone}
        residents.check_integrity()
        pages += blocks
    assert len(residents) == len(expected) and residents.pages().tolist() == sorted(expected)
    found = residents.find(tenant, array(asked))
    plain = {
        (slot, page, source, tokens[: slot * SIZE] == asked[: slot * SIZE])
        for page, (owner, tokens, slot, source) in expected.items()
        if owner == tenant
        and (slot + 1) * SIZE <= len(asked)
        and tokens[slot * SIZE : (slot + 1) * SIZE] == asked[slot * SIZE : (slot + 1) * SIZE]
    }
    columns = (found.slot, found.page, found.source, found.same_context)
    assert set(zip(*(column.tolist() for column in columns), strict=True)) == plain
    exact = {slot for slot, _, _, same in plain if same}
    length = next(slot for slot in range(len(asked) + 1) if slot not in exact)
    assert len(found.exact) == length
    for slot, page in enumerate(found.exact.tolist()):
        owner, tokens, at, _ = expected[page]
        assert at == slot and tokens[: (slot + 1) * SIZE] == asked[: (slot + 1) * SIZE] and owner == tenant


def test_of_many_sources_those_that_hold_most_are_looked_at():
    residents = Residents(SIZE)
    tokens = array(range(10))
    for source in range(MOST_SOURCES + 3):
        blocks = 1 if source == 4 else 5
        pages = array(range(10 * source, 10 * source + blocks))
        residents.add("", tokens, array(range(blocks)), pages, source)
    found = residents.find("", np.concatenate((array([99, 99]), tokens[2:])))
    assert set(found.source.tolist()) == set(range(2, MOST_SOURCES + 3)) - {4}


def test_witnesses_are_forgotten_with_their_page_and_with_the_bounds():
    residents = Residents(SIZE)
    residents.add("", array([1, 2, 3, 4]), array([0, 1]), array([5, 6]), 0)
    found = residents.find("", array([9, 9, 3, 4]))
    residents.witness(found, array([0, 1]), array([5, 6]), np.array([0.1, 0.2]))
    residents.witness(found, array([1]), array([6]), np.array([np.inf]))
    known = residents.evidence
    assert known.count[[5, 6]].tolist() == [1, 1] and known.worst[6] == np.inf, (
        "one beyond the bounds is no witness for"
    )
    residents.forget(torch.tensor([6, 900]))
    residents.add("", array([1, 2, 3, 4]), array([1]), array([6]), 1)
    assert known.count[[5, 6]].tolist() == [1, 0]
    residents.forget_witnesses()
    assert not known.count.any() and not known.worst.any()
    residents.check_integrity()


def test_a_page_is_resident_once():
    residents = Residents(SIZE)
    residents.add("a", array([1, 2]), array([0]), array([3]), 0)
    residents.add("b", array([1, 2]), array([0]), array([3]), 1)
    assert len(residents.find("b", array([1, 2])).page) == 0 and len(residents.find("a", array([1, 2])).page) == 1
    residents.check_integrity()


def test_damage_is_found():
    residents = Residents(SIZE)
    residents.add("a", array([1, 2]), array([0]), array([3]), 0)
    residents._tenant[3] = 7
    with pytest.raises(IntegrityError, match="counts of resident pages"):
        residents.check_integrity()
    residents._tenant[3] = -1
    with pytest.raises(IntegrityError, match="without isolation key"):
        residents.check_integrity()
