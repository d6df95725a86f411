"""The index of signatures finds what a search through everything finds, and forgets pages whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.errors import IntegrityError
from jointkv.fusion.signature_index import AT_ONCE, FIRST, SignatureIndex

SIZE = FIRST + 6


def signatures(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, SIZE)).astype(np.float32)


events = st.lists(st.tuples(st.sampled_from("aar"), st.integers(0, 40), st.integers(1, 7)), max_size=120)


@settings(max_examples=60)
@given(events, st.integers(0, 100))
def test_near_is_a_search_through_everything(events, seed):
    known, index = {}, SignatureIndex(SIZE)
    drawn = signatures(41, seed)
    for event, page, buckets in events:
        if event == "a" and page not in known:
            known[page] = {number for number in range(3) if buckets >> number & 1}
            index.add(known[page], page, drawn[page])
        elif event == "r":
            index.remove(page)
            known.pop(page, None)
        index.check_integrity()
    assert len(index) == len(known) and all(page in index for page in known)
    query = drawn[0] + np.float32(0.25)
    for buckets in ((0,), (1, 2), (0, 1, 2), (3,)):
        for limit in (2.0, 30.0, 1e6):
            squares = {page: float(np.square(drawn[page] - query).sum()) for page in known}
            expected = [page for page, names in known.items() if names & set(buckets) and squares[page] <= limit]
            found = list(index.near(buckets, query, limit))
            assert sorted(found) == sorted(expected)
            assert np.allclose([squares[page] for page in found], sorted(squares[page] for page in expected), atol=1e-4)


def test_pages_may_leave_while_they_are_asked_for():
    index, rows = SignatureIndex(SIZE), signatures(3 * AT_ONCE)
    for page, row in enumerate(rows):
        index.add(["here"], page, row)
    found = []
    for page in index.near(["here"], rows[5], np.inf):
        found.append(page)
        index.remove(page)
    assert found[0] == 5 and sorted(found) == list(range(len(rows))) and not len(index) and not index.nbytes
    index.check_integrity()


def test_memory_follows_what_is_resident():
    index, rows = SignatureIndex(SIZE), signatures(1000)
    for page, row in enumerate(rows):
        index.add(["here"], page, row)
    row_bytes = 4 * (SIZE + 2) + 8
    assert 1000 * row_bytes <= index.nbytes <= 2 * 1000 * row_bytes
    for page in range(990):
        index.remove(page)
    assert index.nbytes <= 4 * 10 * row_bytes
    index.check_integrity()
    assert index.nbytes <= SignatureIndex.most_bytes(SIZE, 10)
    index.clear()
    assert not index.nbytes and not len(index)


def test_short_signatures_are_compared_whole():
    index, rows = SignatureIndex(FIRST - 4), signatures(9)[:, : FIRST - 4]
    for page, row in enumerate(rows):
        index.add(["here"], page, row)
    assert list(index.near(["here"], rows[3], 1e-3)) == [3]


@pytest.mark.parametrize("broken", [np.full(SIZE, np.nan), np.zeros(SIZE + 1)])
def test_what_is_no_signature_is_refused(broken):
    with pytest.raises(IntegrityError, match=f"{SIZE} numbers"):
        SignatureIndex(SIZE).add(["here"], 1, broken.astype(np.float32))


def test_a_page_is_in_the_index_once():
    index = SignatureIndex(SIZE)
    index.add(["here", "here"], 1, signatures(1)[0])
    with pytest.raises(IntegrityError, match="twice"):
        index.add(["there"], 1, signatures(1)[0])
    assert list(index.near(["here", "there"], signatures(1)[0], 1e-3)) == [1]
