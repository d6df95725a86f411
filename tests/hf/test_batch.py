"""What a batch knows of its rows: padding, holes, text, tenants, and which blocks have filled."""

import pytest
import torch

from jointkv.errors import PoolFull
from jointkv.hf.batch import Batch
from jointkv.hf.cache import JointCache
from jointkv.policy import FusionPolicy
from tests.hf.tiny_models import BLOCK, EXACT, feed, joint

BY_TEXT = FusionPolicy(max_relative_error=0.0, candidates="tokens")


def batch_of(*tenants, policy=BY_TEXT, max_pages=None):
    """A batch without tokens, on a pool that has seen the shape of K and V."""
    _, pool = joint("llama", policy, max_pages=max_pages)
    pool.prepare(torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 0, 8))
    return Batch(pool, tenants)


def extend(batch, mask, ids=None):
    """A forward pass over as many tokens as `ids` has, or `mask` has beyond the batch."""
    batch.extend(mask.shape[1] - batch.length, mask, ids)


def test_before_there_are_rows_it_holds_nothing():
    batch = Batch(joint("llama")[1])
    assert len(batch) == len(batch.copy()) == batch.length == 0 and batch.tables == []


def test_all_rows_may_go():
    batch = batch_of("a", "b")
    extend(batch, torch.ones(2, BLOCK))
    batch.select(torch.zeros(0, dtype=torch.long))
    assert len(batch.copy()) == 0 and len(batch.copy().tables) == len(batch.tables) == 1
    assert batch.pool.stats()["pages_used"] == 0


def test_a_row_goes_on_with_padding_until_its_first_token():
    batch = batch_of("a", "b")
    extend(batch, torch.tensor([[0, 0, 1], [0, 0, 0]]))
    assert batch.padding.tolist() == [2, 3]
    extend(batch, torch.tensor([[0, 0, 1, 0, 1], [0, 0, 0, 0, 1]]))
    assert batch.padding.tolist() == [2, 4] and batch.fusable.tolist() == [False, True]
    assert [table.num_blocks().tolist() for table in batch.tables] == [[1, 1]]
    batch.extend(1, torch.zeros(2, 3), None)  # of some other shape: it says nothing of padding
    assert batch.padding.tolist() == [2, 4]


def test_text_is_kept_while_it_is_known_without_a_gap():
    batch, ids = batch_of("a"), torch.arange(6)[None]
    extend(batch, torch.ones(1, 4), ids[:, :4])
    extend(batch, torch.ones(1, 6), ids[:, 4:])
    assert batch.tokens is not None and batch.tokens.tolist() == ids.tolist()
    extend(batch, torch.ones(1, 7))
    extend(batch, torch.ones(1, 8), ids[:, :1])
    assert batch.tokens is None
    batch.truncate(0)
    extend(batch, torch.ones(1, 2), ids[:, :2])
    assert batch.tokens is not None and batch.tokens.tolist() == [[0, 1]]
    ignoring = batch_of("a", policy=EXACT)
    extend(ignoring, torch.ones(1, 4), ids[:, :4])
    assert ignoring.tokens is None


def test_blocks_are_new_once_and_again_after_they_were_cut():
    batch = batch_of("a", "b")
    mask = torch.ones(2, 3 * BLOCK)
    mask[1, 0] = 0
    extend(batch, mask)
    assert [part.tolist() for part in batch.newly_full()] == [[0, 0, 0, 1, 1], [0, 1, 2, 0, 1]]
    assert [part.tolist() for part in batch.newly_full()] == [[], []]
    batch.truncate(2 * BLOCK - 1)
    extend(batch, mask)
    assert [part.tolist() for part in batch.newly_full()] == [[0, 0, 1], [1, 2, 1]]
    batch.truncate(0)
    extend(batch, torch.ones(2, BLOCK))
    batch.fusable[0] = False
    assert [part.tolist() for part in batch.newly_full()] == [[1], [0]]


def test_a_full_pool_changes_nothing():
    batch = batch_of("a", max_pages=2)
    extend(batch, torch.ones(1, BLOCK + 1))
    with pytest.raises(PoolFull, match="1 missing"):
        batch.extend(BLOCK, None, None)
    assert batch.length == BLOCK + 1 and batch.tables[0].num_blocks().tolist() == [2]
    batch.pool.check_integrity()


def test_a_copy_reads_the_same_pages_under_another_number():
    batch = batch_of("a", "b")
    extend(batch, torch.ones(2, BLOCK + 2), torch.arange(2 * BLOCK + 4).view(2, -1))
    twin = batch.copy()
    assert torch.equal(twin.tables[0].pages, batch.tables[0].pages) and torch.equal(twin.tokens, batch.tokens)
    assert not set(twin.sequence.tolist()) & set(batch.sequence.tolist())
    twin.select(torch.tensor([1, 1]))
    assert twin.tenants == ["b", "b"] and batch.tenants == ("a", "b")
    page = int(batch.tables[0].pages[0, 1])
    twin.extend(1, None, None)
    assert int(batch.tables[0].pages[0, 1]) == page and page not in twin.tables[0].held()
    batch.pool.check_integrity()


def test_what_is_known_about_rows_follows_them():
    """Padding, holes and how far a row has been considered."""
    _, pool = joint("llama", EXACT)
    cache = JointCache(pool)
    mask = torch.ones(3, 3 * BLOCK, dtype=torch.long)
    mask[0, : 2 * BLOCK], mask[1, 6] = 0, 0
    states = torch.randn(2, 3, 1, 2, 3 * BLOCK, 8).expand(-1, -1, 3, -1, -1, -1)
    cache.begin_step(mask, None)
    feed(cache, *states)
    assert cache.batch.fusable.tolist() == [True, False, True]
    assert pool.stats()["blocks_considered"] == 1 + 3
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    assert cache.padding.tolist() == [0, 0, 2 * BLOCK] and cache.batch.fusable.tolist() == [False, True, True]
    feed(cache, *states)
    assert pool.stats()["blocks_considered"] == 4 + 3 + 3
