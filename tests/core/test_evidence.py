"""Echoes against a plain count, and what witnesses leave behind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jointkv.core.evidence import PLACES, Evidence, echoes, standing
from jointkv.errors import LayoutError

IDS = st.lists(st.integers(0, 9), max_size=24)


def whole(values: list[int]) -> np.ndarray:
    return np.array(values, np.int64)


def bits(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


@given(IDS, IDS, st.integers(1, 5))
def test_echoes_are_the_tokens_that_stand_before(tokens: list[int], before: list[int], size: int) -> None:
    tokens = tokens[: len(tokens) // size * size]
    found = echoes(whole(tokens), whole(before), size)
    assert len(found) == len(tokens) // size
    for number, mask in enumerate(found.tolist()):
        start = number * size
        echo = [token in before and token not in tokens[:place] for place, token in enumerate(tokens)]
        assert mask == sum(1 << place for place in range(size) if echo[start + place])


@given(IDS, st.integers(1, 5))
def test_standing_tokens_stand_before_their_block(tokens: list[int], size: int) -> None:
    tokens = tokens[: len(tokens) // size * size]
    for number, mask in enumerate(standing(whole(tokens), size).tolist()):
        start = number * size
        assert mask == sum(1 << place for place in range(size) if tokens[start + place] in tokens[:start])


@given(IDS, IDS, IDS, st.integers(1, 4))
def test_what_stands_only_here_are_the_echoes_of_what_differs(
    text: list[int], here: list[int], there: list[int], size: int
) -> None:
    length = min(len(here), len(there)) // size * size
    here, there, text = here[:length], there[:length], text[: len(text) // size * size]
    own, other = (standing(whole(head + text), size)[length // size :] for head in (here, there))
    only = [token for token in here if token not in there]
    new = echoes(whole(text), whole(only), size)
    # An echo may stand a second time in its own block; `echoes` marks the first place alone.
    assert ((own & ~other) & new).tolist() == new.tolist()
    assert ((own & ~other != 0) == (new != 0)).all()


def test_long_blocks_fold_their_places_and_odd_input_is_refused() -> None:
    tokens = np.arange(2 * PLACES)
    assert echoes(tokens, whole([PLACES + 3]), 2 * PLACES).tolist() == [1 << 3]
    with pytest.raises(LayoutError, match="no whole blocks"):
        echoes(tokens, whole([1]), 3)
    with pytest.raises(LayoutError, match="negative"):
        echoes(tokens, whole([-1]), 2)
    with pytest.raises(LayoutError, match="no whole blocks"):
        standing(tokens, 3)
    with pytest.raises(LayoutError, match="negative"):
        standing(whole([-1]), 1)
    assert standing(np.arange(2 * PLACES) % PLACES, PLACES).tolist() == [0, 2**PLACES - 1]


def test_a_miss_with_new_echoes_is_explained_and_any_other_one_tells() -> None:
    evidence = Evidence(2)
    page = whole([1])
    evidence.start(page, bits(0b001))
    evidence.add(page, np.array([0.4], np.float32), bits(0b011))
    assert (evidence.count[1], evidence.covered[1]) == (1, 0b011) and evidence.worst[1] == np.float32(0.4)
    evidence.add(page, np.array([3.0], np.float32), bits(0b110))
    assert (evidence.count[1], evidence.covered[1]) == (1, 0b011) and evidence.worst[1] == np.float32(0.4)
    assert evidence.new(page, bits(0b110)).tolist() == [True] and evidence.new(page, bits(0b010)).tolist() == [False]
    evidence.add(page, np.array([3.0], np.float32), bits(0b010))
    assert evidence.count[1] == 1 and evidence.worst[1] == 3.0
    evidence.add(page, np.array([np.nan], np.float32), bits(0))
    assert evidence.worst[1] == np.inf and evidence.count[0] == 0
    evidence.check_integrity()
    evidence.start(page, bits(0))
    assert (evidence.count[1], evidence.worst[1], evidence.covered[1]) == (0, 0.0, 0)


@given(st.lists(st.tuples(st.floats(0, 2, width=32), st.integers(0, 7)), max_size=12), st.integers(0, 7))
def test_what_is_known_never_shrinks(heard: list[tuple[float, int]], own: int) -> None:
    evidence, page = Evidence(1), whole([0])
    evidence.start(page, bits(own))
    for ratio, seen in heard:
        before = evidence.count[0], evidence.worst[0], int(evidence.covered[0])
        evidence.add(page, np.array([ratio], np.float32), bits(seen))
        evidence.check_integrity()
        assert evidence.count[0] == before[0] + (ratio <= 1) and evidence.worst[0] >= before[1]
        assert int(evidence.covered[0]) & before[2] == before[2]
        # Only a comparison within the bounds covers anything.
        assert ratio <= 1 or int(evidence.covered[0]) == before[2]
