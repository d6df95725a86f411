"""Grouping reads every token of every sequence once, and a page once for all who read it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.attention.grouping import group_pages
from jointkv.attention.work import WorkList
from jointkv.core.plan import BlockRef
from jointkv.errors import IntegrityError, LayoutError
from tests.attention.paged_cases import Batch, batches


def entries(work: WorkList) -> dict[tuple[int, int], BlockRef]:
    found = {(row, slot): ref for row, slot, ref in work.references()}
    assert len(found) == len(work.entries.number)
    return found


@settings(max_examples=300)
@given(
    case=batches(most_rows=8, most_slots=12),
    group=st.integers(1, 60),
    threads=st.integers(1, 4),
    share=st.booleans(),
)
def test_every_token_is_read_once_for_every_query(case, group, threads, share):
    batch, _ = case
    work = batch.group(heads_per_kv_head=group, threads=threads, share=share)
    work.check_integrity()
    found = entries(work)
    batch.k_scale = batch.v_scale = None
    assert found == {(row, slot): ref for row, refs in enumerate(batch.references()) for slot, ref in enumerate(refs)}
    assert (work.items.query_to - work.items.query_from).max() <= max(1, 48 // group)


@settings(max_examples=200)
@given(case=batches(most_rows=8, most_slots=12))
def test_a_page_before_the_queries_is_read_once(case):
    batch, _ = case
    work = batch.group(threads=1)
    open_slots = 0
    settled = set()
    for row, refs in enumerate(batch.references()):
        position, window = 0, int(batch.lengths[row] - batch.query_lengths[row])
        for ref in refs:
            position += ref.count
            if position > window:
                open_slots += 1
            else:
                settled.add((ref.page, ref.first, ref.count))
    assert len(work.pages.page) == len(settled) + open_slots


@settings(max_examples=200)
@given(case=batches(most_rows=8, most_slots=12))
def test_queries_are_turned_once_for_each_shift_at_which_they_read(case):
    batch, _ = case
    work = batch.group()
    read_at = {(ref.shift, row) for row, refs in enumerate(batch.references()) for ref in refs if ref.shift}
    asked = batch.query_lengths.tolist()
    queries = [range(sum(asked[:row]), sum(asked[: row + 1])) for row in range(len(asked))]
    expected = [(shift, query) for shift, row in sorted(read_at) for query in queries[row]]
    assert list(zip(work.turned_by.tolist(), work.turned.tolist(), strict=True)) == expected


def test_a_shared_prefix_is_one_segment():
    tables = torch.arange(4)[:, None] * 100 + torch.arange(10)
    tables[:, :8] = torch.arange(8) + 1000
    work = group_pages(tables, torch.full((4,), 155), 16, threads=1)
    sizes = (work.items.page_to - work.items.page_from).tolist()
    readers = (work.items.query_to - work.items.query_from).tolist()
    assert sorted(zip(sizes, readers, strict=True)) == [(2, 1)] * 4 + [(8, 4)]


def test_a_page_read_twice_by_one_sequence_is_there_once():
    work = group_pages(torch.tensor([[7, 7, 3, 7, 9]]), torch.tensor([70]), 16, threads=1)
    assert sorted(work.pages.page.tolist()) == [3, 7, 9]
    times = (work.queries.column_to - work.queries.column_from).tolist()
    assert sorted(times) == [1, 3]
    work.check_integrity()


def test_unlike_sets_of_readers_are_told_apart():
    """Every subset of eight readers reads one page."""
    subsets = [[row for row in range(8) if subset >> row & 1] for subset in range(1, 256)]
    tables = torch.full((8, 129), -1)
    for row in range(8):
        mine = [page for page, readers in enumerate(subsets) if row in readers]
        tables[row] = torch.tensor([*mine, 1000 + row])
    work = group_pages(tables, torch.full((8,), 129 * 4), 4, threads=1)
    work.check_integrity()
    assert len(work.items.page_from) == 255, "the last blocks join those of their only reader"


@settings(max_examples=100)
@given(case=batches(plain=True), data=st.data())
def test_growing_is_grouping_again(case, data):
    batch, _ = case
    batch.query_lengths = torch.ones_like(batch.lengths)
    work = batch.group(threads=2)
    room = -(-batch.lengths // batch.block_size) * batch.block_size
    batch.lengths = batch.lengths + (torch.rand(len(room)) * (room - batch.lengths + 1)).long()
    work.grow(batch.lengths)
    work.check_integrity()
    again = batch.group(threads=2)
    for part, other in zip(work.pages, again.pages, strict=True):
        assert np.array_equal(part, other)
    assert np.array_equal(work.lengths, again.lengths)


def test_growing_out_of_a_block_is_refused():
    tables = torch.arange(4).view(2, 2)
    work = group_pages(tables, torch.tensor([16, 20]), 16)
    for lengths in ([17, 20], [16, 19], [16, 33], [16]):
        with pytest.raises(LayoutError):
            work.grow(torch.tensor(lengths))
    prefill = group_pages(tables, torch.tensor([16, 20]), 16, query_lengths=torch.tensor([2, 1]))
    with pytest.raises(LayoutError):
        prefill.grow(torch.tensor([16, 21]))


def test_damage_is_found():
    work = group_pages(torch.arange(6).view(2, 3), torch.tensor([40, 48]), 16)
    work.pages.held[0] -= 1
    with pytest.raises(IntegrityError):
        work.check_integrity()
    work.pages.held[0] += 1
    work.check_integrity()
    work.merge.partial[0] = work.merge.partial[1]
    with pytest.raises(IntegrityError):
        work.check_integrity()


TABLES = torch.arange(6).view(2, 3)
LENGTHS = torch.tensor([40, 48])

REFUSED = {
    "a table of one dimension": {"tables": torch.arange(6)},
    "no sequences": {"tables": torch.zeros(0, 3, dtype=torch.long), "lengths": torch.zeros(0, dtype=torch.long)},
    "lengths of other sequences": {"lengths": torch.tensor([40])},
    "a length beyond the table": {"lengths": torch.tensor([40, 49])},
    "an empty sequence": {"lengths": torch.tensor([40, 0])},
    "more queries than tokens": {"query_lengths": torch.tensor([41, 1])},
    "no queries": {"query_lengths": torch.tensor([1, 0])},
    "queries of other sequences": {"query_lengths": torch.tensor([1])},
    "no query heads": {"heads_per_kv_head": 0},
    "a negative page": {"tables": TABLES - 1},
    "page numbers that are no integers": {"tables": TABLES.float()},
    "lengths that are no integers": {"lengths": LENGTHS > 0},
    "a range before the page": {"first": torch.full((2, 3), -1), "count": torch.full((2, 3), 16)},
    "a range beyond the page": {"first": torch.full((2, 3), 1), "count": torch.full((2, 3), 16)},
    "an empty range": {"count": torch.tensor([[16, 0, 16], [16, 16, 16]]), "lengths": torch.tensor([20, 40])},
    "ranges of another shape": {"first": torch.zeros(2, 2, dtype=torch.long)},
    "shifts of another shape": {"shift": torch.zeros(3, dtype=torch.long)},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(changes):
    fitting = {"tables": TABLES, "lengths": LENGTHS}
    group_pages(**fitting, block_size=16)
    with pytest.raises(LayoutError):
        group_pages(**{**fitting, **changes}, block_size=16)


def test_slots_beyond_the_length_are_not_looked_at():
    tables = torch.tensor([[3, 4, -1], [5, 6, 7]])
    ranges = torch.tensor([[16, 16, -5], [16, 16, 16]])
    work = group_pages(tables, torch.tensor([30, 48]), 16, count=ranges)
    assert sorted(work.pages.page.tolist()) == [3, 4, 5, 6, 7]


def test_a_batch_says_what_it_reads():
    batch = Batch(TABLES, LENGTHS, torch.ones(2, dtype=torch.long), 16, None, None, None, None, None)
    assert [ref.count for ref in batch.references()[0]] == [16, 16, 8]
