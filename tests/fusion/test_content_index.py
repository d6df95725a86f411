"""Text is found by content at every offset, verified, longest first, and never under another key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from jointkv.core.moved import MovedRun
from jointkv.errors import IntegrityError, InvalidPolicy
from jointkv.fusion import content_index as room
from jointkv.fusion import rolling_hash
from jointkv.fusion.content_index import ContentIndex

BLOCK = 4
HALF = BLOCK // 2


def strange(count: int, seed: int, vocabulary: int = 50_000) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, count)


def put(index: ContentIndex, tokens: np.ndarray, first_page: int, source: int, owner: str = "key") -> list[int]:
    count = len(tokens) // index.block_size
    pages = np.arange(first_page, first_page + count)
    blocks = tokens[: count * index.block_size].reshape(count, -1)
    index.add(owner, blocks, np.arange(count), pages, source)
    return pages.tolist()


def text_of(index: ContentIndex, run: MovedRun) -> np.ndarray:
    """What the pages of a run hold."""
    return index._tokens[run.pages].reshape(-1)[run.skip : run.skip + run.tokens]


@pytest.mark.parametrize("shift", [-9, -8, -3, -1, 0, 1, 2, 3, 4, 7, 101])
@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, 2 * BLOCK + 1, 57])
def test_a_piece_is_found_to_its_ends_wherever_it_stands(shift: int, length: int) -> None:
    index, donor = ContentIndex(BLOCK), strange(80, 1)
    put(index, donor, 10, source=7)
    start = 11
    prompt = np.concatenate((strange(start + shift, 2), donor[start : start + length], strange(30, 3)))
    (run,) = index.find("key", prompt, least=BLOCK - 1)
    assert (run.first, run.tokens, run.shift, run.source) == (start + shift, length, shift, 7)
    assert run.pages.tolist() == [10 + slot for slot in range(start // BLOCK, (start + length - 1) // BLOCK + 1)]
    assert run.skip == start % BLOCK and (text_of(index, run) == prompt[run.first : run.end]).all()


def test_least_and_what_is_not_resident() -> None:
    index, donor = ContentIndex(BLOCK), strange(40, 1)
    put(index, donor, 0, 0)
    prompt = np.concatenate((strange(3, 2), donor[8:20], strange(3, 3)))
    assert index.find("key", prompt, least=12) and not index.find("key", prompt, least=13)
    assert not index.find("key", strange(500, 9), 1) and not index.find("key", prompt[:1], 1)


def test_the_longest_comes_first_and_the_rest_of_a_shorter_one_is_kept() -> None:
    index, text = ContentIndex(BLOCK), strange(60, 1)
    put(index, text[:40], 0, source=0)
    put(index, text[24:60], 100, source=1)
    runs = index.find("key", text, least=BLOCK)
    assert [(run.first, run.end, run.source) for run in runs] == [(0, 40, 0), (40, 60, 1)]
    assert [(run.shift, run.skip) for run in runs] == [(0, 0), (24, 0)]


def test_a_source_of_which_pages_are_gone_has_two_runs() -> None:
    index, text = ContentIndex(BLOCK), strange(60, 1)
    put(index, text, 0, source=0)
    index.remove(6)
    prompt = np.concatenate((strange(1, 2), text))
    assert [(run.first, run.end) for run in index.find("key", prompt, BLOCK)] == [(1, 25), (29, 61)]


def test_keys_never_mix_even_where_a_page_is_handed_from_one_to_another() -> None:
    index, text = ContentIndex(BLOCK), strange(40, 1)
    pages = put(index, text, 0, 0, owner="a")
    keep = put(index, strange(40, 5), 50, 1, owner="a")
    assert not index.find("b", text, 1)
    for page in pages:
        index.remove(page)
    put(index, text, 0, 2, owner="b")
    assert not index.find("a", text, 1) and len(index.find("b", text, 1)) == 1
    index.check_integrity()
    assert keep[0] in index and len(index) == 20


def test_a_hash_alone_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling_hash, "_mixed", np.zeros_like)
    index, text = ContentIndex(BLOCK), strange(40, 1)
    put(index, text, 0, 0)
    assert not index.find("key", strange(40, 2), 1)
    (run,) = index.find("key", np.concatenate((strange(3, 2), text[:6], strange(3, 3))), 1)
    assert run.tokens == 6


def test_text_that_repeats_itself_is_bounded_work(monkeypatch: pytest.MonkeyPatch) -> None:
    index, asked = ContentIndex(BLOCK), list[int]()
    equal = index._equal
    put(index, np.zeros(400, np.int64), 0, 0)

    def counted(tokens: np.ndarray, offset: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        asked.append(len(offset))
        return equal(tokens, offset, *rest)

    monkeypatch.setattr(index, "_equal", counted)
    runs = index.find("key", np.zeros(300, np.int64), BLOCK)
    assert sum(run.tokens for run in runs) == 300 and asked[0] <= 300 * room.SOURCES


def test_pages_come_and_go_without_the_table_growing() -> None:
    index = ContentIndex(BLOCK)
    put(index, strange(40, 0), 0, 0)
    for turn in range(1, 400):
        for page in put(index, strange(40, turn), 10, turn):
            index.remove(page)
    assert len(index._owners["key"].table) <= 4 * len(index) + rolling_hash.MOST_WAITING
    assert index.find("key", strange(40, 0), BLOCK)[0].tokens == 40
    index.clear()
    assert not len(index) and not index.find("key", strange(40, 0), 1)
    index.check_integrity()


@pytest.mark.parametrize("looked_up", [True, False], ids=["looked up between", "at once"])
def test_pages_that_are_gone_hide_no_others(looked_up: bool) -> None:
    index, others = ContentIndex(BLOCK), 10 * room.SOURCES
    put(index, strange(400, 1), 0, 0)
    for turn in range(others):
        put(index, strange(40, 0), 100 + 10 * turn, 1 + turn)
        assert index.find("key", strange(40, 0), BLOCK)[0].source == 1 or not looked_up
    for turn in [0, *range(2, others)]:
        if looked_up:
            assert index.find("key", strange(40, 0), BLOCK)[0].tokens == 40
        for page in range(100 + 10 * turn, 110 + 10 * turn):
            index.remove(page)
    (run,) = index.find("key", strange(40, 0), BLOCK)
    assert run.source == 2 and run.tokens == 40
    index.check_integrity()


@pytest.mark.parametrize("size", [0, 1, 3])
def test_blocks_without_halves_are_refused(size: int) -> None:
    with pytest.raises(InvalidPolicy, match="halves"):
        ContentIndex(size)


def test_a_page_is_added_once() -> None:
    index = ContentIndex(BLOCK)
    put(index, strange(40, 0), 0, 0)
    with pytest.raises(IntegrityError, match="twice"):
        put(index, strange(40, 1), 9, 1)


PIECES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=60)
@given(PIECES, st.integers(2, 60))
def test_runs_are_true_and_nothing_long_is_left_over(pieces: list[tuple[int, int, bool]], vocabulary: int) -> None:
    index = ContentIndex(BLOCK)
    donors = [strange(61, seed, vocabulary) for seed in (1, 2)]
    for number, donor in enumerate(donors):
        put(index, donor, 20 * number, number)
    prompt = np.concatenate([donors[second][start : start + length] for start, length, second in pieces])
    runs = index.find("key", prompt, BLOCK)
    covered = np.zeros(len(prompt), bool)
    for run in runs:
        assert not covered[run.first : run.end].any() and run.tokens >= BLOCK
        assert (text_of(index, run) == prompt[run.first : run.end]).all()
        assert (index._source[run.pages] == run.source).all() and (np.diff(index._slot[run.pages]) == 1).all()
        assert run.first - run.shift == index._slot[run.pages[0]] * BLOCK + run.skip
        covered[run.first : run.end] = True
    if vocabulary > 20:  # with few tokens windows repeat more often than pages are followed
        whole = np.lib.stride_tricks.sliding_window_view(donors[0][:60], 2 * BLOCK - 1)
        for offset in range(len(prompt) - 2 * BLOCK + 2):
            if (whole == prompt[offset : offset + 2 * BLOCK - 1]).all(1).any():
                assert covered[offset : offset + 2 * BLOCK - 1].any()


@settings(max_examples=60)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 3))
def test_blocks_are_filled_from_the_right_tokens(first: int, tokens: int, skip: int) -> None:
    pages = np.arange(100, 100 + -(-(skip + tokens) // BLOCK))
    run = MovedRun(first, tokens, 0, skip, pages, first - skip)
    fills = run.fills(BLOCK)
    whole = [slot for slot in range(30) if first <= slot * BLOCK and (slot + 1) * BLOCK <= run.end]
    assert fills.slots.tolist() == whole and len(fills) == len(whole) and (fills.shift == first - skip).all()
    columns = (fills.slots, fills.first, fills.second, fills.offset)
    for slot, one, two, offset in np.stack(columns).T.tolist():
        place = slot * BLOCK - first + skip
        ahead = [offset + token for token in range(BLOCK)]
        read = [(one if token < BLOCK else two, token % BLOCK) for token in ahead]
        assert read == [(100 + (place + token) // BLOCK, (place + token) % BLOCK) for token in range(BLOCK)]


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 60), st.integers(0, 60))
def test_parts_of_a_run(tokens: int, skip: int, start: int, end: int) -> None:
    pages = np.arange(-(-(skip + tokens) // BLOCK))
    run = MovedRun(10, tokens, 0, skip, pages, 10 - skip)
    part = run.within(start, end, BLOCK)
    if part is None:
        assert min(end, run.end) <= max(start, 10)
        return
    assert (part.first, part.end) == (max(start, 10), min(end, run.end)) and part.shift == run.shift
    assert part.pages[0] * BLOCK + part.skip == skip + part.first - 10
    assert len(part.pages) == -(-(part.skip + part.tokens) // BLOCK)


class Churn(RuleBasedStateMachine):
    """Texts of two owners come and go; pages are handed out anew."""

    texts = Bundle("texts")

    def __init__(self) -> None:
        super().__init__()
        self.index, self.free, self.next_source = ContentIndex(BLOCK), list(range(40)), 0
        self.held: dict[str, dict[int, np.ndarray]] = {"a": {}, "b": {}}

    @rule(target=texts, seed=st.integers(0, 5), blocks=st.integers(1, 6), owner=st.sampled_from("ab"))
    def add(self, seed: int, blocks: int, owner: str) -> tuple[str, list[int]]:
        count = min(blocks, len(self.free))
        pages, tokens = [self.free.pop() for _ in range(count)], strange(24, seed)
        blocks = tokens[: count * BLOCK].reshape(count, BLOCK)
        self.index.add(owner, blocks, np.arange(count), np.array(pages, np.int64), self.next_source)
        self.next_source += 1
        for slot, page in enumerate(pages):
            self.held[owner][page] = tokens[slot * BLOCK : (slot + 1) * BLOCK]
        return owner, pages

    @rule(text=consumes(texts))
    def remove(self, text: tuple[str, list[int]]) -> None:
        owner, pages = text
        for page in pages:
            self.index.remove(page)
            del self.held[owner][page]
        self.free += pages

    @rule(seed=st.integers(0, 5), owner=st.sampled_from("ab"), before=st.integers(0, 5))
    def find(self, seed: int, owner: str, before: int) -> None:
        prompt = np.concatenate((strange(before, 99), strange(24, seed)))
        for run in self.index.find(owner, prompt, BLOCK):
            held = np.concatenate([self.held[owner][page] for page in run.pages.tolist()])
            assert (held[run.skip : run.skip + run.tokens] == prompt[run.first : run.end]).all()

    @invariant()
    def sound(self) -> None:
        self.index.check_integrity()
        assert len(self.index) == sum(map(len, self.held.values()))


Churn.TestCase.settings = settings(max_examples=25, stateful_step_count=25)
TestChurn = Churn.TestCase


def test_text_is_found_whose_former_pages_are_all_gone() -> None:
    """The places of those that were dropped came first, and nobody looked behind them."""
    index, text = ContentIndex(BLOCK), strange(40, 1)
    put(index, strange(4000, 2), 0, source=0)
    for source in range(1, 1 + room.SOURCES):
        put(index, text, 2000 + 10 * source, source)
    assert index.find("key", text, BLOCK)
    for page in range(2000, 3000):
        index.remove(page)
    assert not index.find("key", text, BLOCK)
    put(index, text, 5000, source=9)
    (run,) = index.find("key", text, BLOCK)
    assert run.source == 9 and run.tokens == 40
    index.check_integrity()
