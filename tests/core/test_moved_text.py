"""What is known of text at another position comes from the pages that hold its tokens."""

from __future__ import annotations

import numpy as np
import pytest

from jointkv.core.evidence import Evidence
from jointkv.core.moved import Fills, MovedRun
from jointkv.core.moved_text import UNWRITTEN, MovedText, check_block_size, unwritten
from jointkv.errors import InvalidPolicy
from jointkv.policy.reuse import ReuseRule

BLOCK = 4
BY_ENTRY = ReuseRule(near=1.0, echoes=False)


def test_runs_become_pages_that_are_not_written_yet() -> None:
    """Each run is a source."""
    runs = [
        MovedRun(2, 11, 7, 1, np.array([5, 6, 9]), 1),
        MovedRun(24, 8, 8, 0, np.array([3, 4]), -4),
    ]
    text = MovedText.of(runs, 0, 8, BLOCK)
    assert len(text) == 4 and unwritten(text.found.page).all() and not unwritten(np.array([0, 9])).any()
    assert text.found.slot.tolist() == [1, 2, 6, 7] and not text.found.exact.any()
    assert text.found.source.tolist() == [UNWRITTEN, UNWRITTEN, UNWRITTEN + 1, UNWRITTEN + 1]
    fills = text.fills_of(text.found.page[1:3])
    assert (fills.first.tolist(), fills.second.tolist()) == ([6, 3], [9, 3])
    assert (fills.offset.tolist(), fills.shift.tolist()) == ([3, 0], [1, -4])
    assert len(MovedText.of(runs, 2, 6, BLOCK)) == 1 and not len(MovedText.of(runs, 3, 6, BLOCK))


@pytest.mark.parametrize("size", [3, 66])
def test_blocks_of_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(InvalidPolicy, match="even block size"):
        check_block_size(size)


def test_evidence_goes_where_the_tokens_of_a_page_go() -> None:
    still, moved = Evidence(3), Evidence(3)
    moved.covered[:] = [0b0111, 0b0101, 0b1111]
    still.add(np.array([1]), np.array([0.4], np.float32), np.zeros(1, np.uint64))
    column = np.array([1, 0])
    fills = Fills(np.array([0, 1]), np.array([0, 2]), np.array([1, 2]), column, np.array([9, 9]))
    found, pages = MovedText(fills, np.zeros(2, np.int64), BLOCK), UNWRITTEN + np.arange(2)
    covered = [0b1011, 0b1111]  # tokens 1 to 3 of page 0 and token 0 of page 1; all of page 2
    for bit in range(4):
        known = found.known(moved, still, pages, np.full(2, 1 << bit, np.uint64))
        assert known.new.tolist() == [not bits >> bit & 1 for bits in covered]
    assert known.count.tolist() == [0, 0] and known.worst.tolist() == pytest.approx([0.4, 0.0])
    assert BY_ENTRY.usable(known, 0.9).all() and not BY_ENTRY.usable(known).any()
    found.testify(moved, pages, np.array([0.2, 0.3]), np.array([0b1111, 0b1000], np.uint64))
    known = found.known(moved, still, pages, np.full(2, 0b1111, np.uint64))
    assert known.count.tolist() == [1, 1] and known.worst.tolist() == pytest.approx([0.4, 0.3])
    assert not known.new.any() and BY_ENTRY.usable(known).all()
    assert moved.count.tolist() == [1, 1, 1] and still.count.tolist() == [0, 1, 0]
    assert moved.covered.tolist() == [0b1111, 0b0101, 0b1111]
