"""Pages whose holders go at any moment: freed when somebody asks what is free, unless somebody reads them."""

from unittest.mock import patch

import pytest
import torch

from jointkv.core.pool import BlockPool
from jointkv.core.table import BlockTable
from jointkv.errors import IntegrityError, PoolFull


def small_pool(max_pages=None):
    return BlockPool(2, 2, (1, 2), (1, 3), max_pages=max_pages)


def test_pages_that_are_read_outlive_who_dropped_them():
    pool = small_pool(max_pages=3)
    table = BlockTable(pool, 1)
    table.extend(torch.tensor([2]))
    pages = table.held()
    with pool.holding(pages):
        del table
        pool.check_integrity()
        assert pool.num_used == 2 and not set(pool.allocate(1).tolist()) & set(pages.tolist())
        with pytest.raises(PoolFull):
            pool.allocate(1)
    assert pool.num_used == 1


def test_what_was_dropped_is_free_when_it_was_collected():
    pool = small_pool()
    table, freed = BlockTable(pool, 1), []
    pool.on_free(lambda pages: freed.extend(pages.tolist()))
    table.extend(torch.tensor([2]))
    pages = table.held().tolist()
    del table
    assert not freed, "a destructor runs anywhere, and changes nothing"
    pool.collect_dropped()
    assert sorted(freed) == sorted(pages)
    with pytest.raises(IntegrityError), pool.holding(torch.tensor(pages)):
        pass
    pool.check_integrity()


def test_whoever_follows_a_pool_hears_of_freed_pages_though_another_fails():
    """They went on being found by their old content, while the pool handed them out again."""
    pool, heard = small_pool(), []

    def broken(pages):
        raise IntegrityError("broken")

    for callback in (broken, lambda pages: heard.extend(pages.tolist())):
        pool.on_free(callback)
    pages = pool.allocate(2)
    with pytest.raises(IntegrityError, match="broken"):
        pool.free(pages)
    assert sorted(heard) == sorted(pages.tolist()) and pool.num_used == 0
    pool.check_integrity()


def test_a_table_that_goes_while_pages_are_counted_is_no_fault():
    """The garbage collector runs at any moment: here when the first holder is asked."""
    pool = small_pool()
    tables = [BlockTable(pool, 1) for _ in range(2)]
    for number in range(2):
        tables[number].extend(torch.tensor([1]))

    def held(table):
        tables[:] = [table]
        return table.pages[table.pages >= 0]

    with patch.object(BlockTable, "held", held):
        pool.check_integrity()
    pool.check_integrity()
    assert pool.num_used == 1
