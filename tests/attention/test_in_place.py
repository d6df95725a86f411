"""Text that is read where it is: the right tokens of the right pages, and attention as if they had been copied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.attention import cpu, reference
from jointkv.attention.grouping import group_pages
from jointkv.attention.in_place import Ranges, in_ranges
from jointkv.attention.layouts import LayerPages
from jointkv.attention.paged import paged_attention
from jointkv.attention.rotary import Rotary, Turning, moved_blocks
from jointkv.core.blocks import PagedKV
from jointkv.core.moved import Fills, MovedRun
from jointkv.errors import LayoutError
from tests.attention.paged_cases import compare

NOBODY = 10_000
"""A page that must not be read."""


@st.composite
def batches(draw, size: int, own: int, others: int, most_slots: int = 7):
    """Block tables over pages `0 .. own - 1`, and runs of text in `own .. own + others - 1` that some rows read."""
    rows, slots = draw(st.integers(1, 4)), draw(st.integers(1, most_slots))
    random = np.random.default_rng(draw(st.integers(0, 2**20)))
    tables = random.integers(own, size=(rows, slots))
    moved: dict[int, Fills] = {}
    for row in range(rows):
        parts, free = [], 0
        for _ in range(draw(st.integers(0, 2))):
            first = draw(st.integers(free, free + size))
            tokens = min(draw(st.integers(1, slots * size)), slots * size - first)
            if tokens <= 0:
                continue
            skip = draw(st.integers(0, size - 1))
            pages = own + random.integers(others, size=-(-(skip + tokens) // size))
            shift = draw(st.sampled_from([0, 1, 5, -3, 40]))
            parts.append(MovedRun(first, tokens, 0, skip, pages, shift).fills(size))
            free = -(-(first + tokens) // size) * size
        fills = Fills.join(parts)
        if len(fills):
            moved[row] = fills
            tables[row, fills.slots] = NOBODY
    lengths = random.integers(1, slots * size + 1, size=rows)
    return torch.from_numpy(tables), torch.from_numpy(lengths), moved


def tokens_of(tables: np.ndarray, size: int, row: int, fills: Fills | None) -> list[tuple[int, int, int]]:
    """Page, place in it and shift of each token, one by one."""
    found = []
    for slot, page in enumerate(tables[row].tolist()):
        at = [] if fills is None else np.flatnonzero(fills.slots == slot).tolist()
        for token in range(size):
            if not at:
                found.append((page, token, 0))
                continue
            (i,) = at
            place, shift = int(fills.offset[i]) + token, int(fills.shift[i])
            first, second = int(fills.first[i]), int(fills.second[i])
            found.append((first, place, shift) if place < size else (second, place - size, shift))
    return found


@settings(deadline=None, max_examples=150)
@given(data=st.data(), size=st.sampled_from([1, 2, 4, 8]))
def test_every_token_is_read_from_where_it_is(data, size):
    tables, _, moved = data.draw(batches(size, 6, 5))
    ranges = in_ranges(tables, size, moved)
    slots = tables.shape[1]
    for row in range(len(tables)):
        found = []
        for ref in ranges.references(row, slots * size):
            found += [(ref.page, ref.first + i, ref.shift) for i in range(ref.count)]
        assert found == tokens_of(tables.numpy(), size, row, moved.get(row))
    assert not (ranges.pages == NOBODY).any()


def test_whole_pages_between_the_ends_of_a_run_are_read_whole():
    """So that requests with other shifts read the same ranges, and a page is read once for all."""
    fills = MovedRun(10, 70, 0, 3, np.arange(5, 10), 7).fills(16)
    ranges = in_ranges(
        torch.full((1, 5), NOBODY), 16, {0: Fills.join([Fills(*(np.zeros(1, int) for _ in range(5))), fills])}
    )
    assert ranges.pages.tolist() == [[0, 5, 6, 7, 8, 9]]
    assert ranges.first.tolist() == [[0, 9, 0, 0, 0, 0]]
    assert ranges.count.tolist() == [[16, 7, 16, 16, 16, 9]]
    assert ranges.shift.tolist() == [[0, 7, 7, 7, 7, 7]]


def test_without_text_elsewhere_slots_are_read_as_they_stand():
    tables = torch.tensor([[3, 1], [4, 2]])
    ranges = in_ranges(tables, 16, {})
    assert torch.equal(ranges.pages, tables)
    assert not ranges.first.any() and not ranges.shift.any() and (ranges.count == 16).all()


def test_a_slot_beyond_the_table_is_refused():
    fills = MovedRun(0, 32, 0, 0, np.arange(2), 1).fills(16)
    with pytest.raises(LayoutError, match="slot 1"):
        in_ranges(torch.zeros(1, 1, dtype=torch.long), 16, {0: fills})


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    pairs=st.sampled_from([0, 3, 8]),
    interleaved=st.booleans(),
    kernel=st.sampled_from([cpu.attend, reference.attend]),
    prefill=st.booleans(),
)
def test_attention_is_as_if_the_text_had_been_copied_and_its_keys_turned(data, pairs, interleaved, kernel, prefill):
    """Whole and partial rotary embeddings of both styles, and layers that turn nothing."""
    size, own, others, heads, dims = 8, 6, 5, 2, 16
    tables, lengths, moved = data.draw(batches(size, own, others))
    generator = torch.Generator().manual_seed(0)
    rotary = Rotary(100.0 ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1)), interleaved)
    keys, values = torch.randn(2, own + others, size, heads, dims, generator=generator)
    asked = torch.ones_like(lengths)
    if prefill:
        asked = (torch.rand(len(lengths), generator=generator) * lengths).long() + 1
    query = torch.randn(int(asked.sum()), 2 * heads, dims, generator=generator)
    copied, written = tables.clone(), [(keys, values)]
    for row, fills in moved.items():
        blocks = moved_blocks(PagedKV([keys], [values]), fills, [rotary])
        copied[row, fills.slots] = sum(len(part[0]) for part in written) + torch.arange(len(fills))
        written.append((blocks.keys[0], blocks.values[0]))
    all_keys, all_values = (torch.cat(side) for side in zip(*written, strict=True))
    still = group_pages(copied, lengths, size, query_lengths=asked, heads_per_kv_head=2)
    expected = paged_attention(query, LayerPages.of_pool(all_keys, all_values), still, kernel=reference.attend)
    ranges: Ranges = in_ranges(tables, size, moved)
    parts = {"first": ranges.first, "count": ranges.count, "shift": ranges.shift}
    work = group_pages(ranges.pages, lengths, size, query_lengths=asked, heads_per_kv_head=2, **parts)
    work.check_integrity()
    turning = Turning([rotary], work.turning[1]) if len(work.turned) else None
    found = paged_attention(
        query,
        LayerPages.of_pool(keys, values),
        work,
        turn=None if turning is None else turning.of(0),
        kernel=kernel,
    )
    compare(found, (expected[0].double(), expected[1].double()), torch.float32)
    if turning is not None:
        again = paged_attention(query, LayerPages.of_pool(keys, values), work, turn=rotary.turn, kernel=kernel)
        assert torch.equal(again[0], found[0])
