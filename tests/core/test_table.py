"""Block tables and their pool, case by case; `test_pool.py` mixes the operations at random."""

import dataclasses
import gc
import weakref

import pytest
import torch

from jointkv.core.plan import BlockRef, FusionPlan
from jointkv.core.pool import FIRST_PAGES, NULL_PAGE, BlockPool
from jointkv.core.table import BlockTable
from jointkv.errors import IntegrityError, PoolFull, StalePlan

SHAPE = (1, 2)


def pool_of(max_pages=None, *, layers=1, dtype=torch.float32):
    return BlockPool(layers, 2, SHAPE, SHAPE, dtype=dtype, max_pages=max_pages)


def table_of(pool, *blocks):
    table = BlockTable(pool, len(blocks))
    table.extend(torch.tensor(blocks))
    return table


def fill(pool, pages, value):
    for layer in (*pool.kv.keys, *pool.kv.values):
        layer[pages] = value


def moving(table, row, slot, page, **fields):
    """A plan that lets one block read `page`."""
    at = torch.tensor([row]), torch.tensor([slot])
    zero = torch.zeros(1)
    return FusionPlan(*at, table.pages[at], torch.tensor([int(page)]), zero, zero, zero, **fields)


def test_growth_keeps_content_and_doubles():
    pool = pool_of(layers=2, dtype=torch.bfloat16)
    table = table_of(pool, FIRST_PAGES, 0)
    fill(pool, table.pages[0], 3.0)
    assert pool.num_pages == FIRST_PAGES and pool.num_free == 0
    table.extend(torch.tensor([0, 1]))
    assert pool.num_pages == 2 * FIRST_PAGES
    for layer in (*pool.kv.keys, *pool.kv.values):
        assert (layer[table.pages[0, :FIRST_PAGES]] == 3).all() and not layer[NULL_PAGE].any()
    table.extend(torch.tensor([0, 5 * FIRST_PAGES]))
    assert pool.num_used == 6 * FIRST_PAGES
    pool.check_integrity()


def test_growth_stops_at_the_limit():
    pool = pool_of(FIRST_PAGES + 3)
    table = table_of(pool, FIRST_PAGES + 1)
    assert pool.num_pages == FIRST_PAGES + 3 and pool.missing(3) == 1
    with pytest.raises(PoolFull, match="5 pages requested, 3 missing, 67 in all"):
        table.extend(torch.tensor([FIRST_PAGES + 6]))
    table.extend(torch.tensor([FIRST_PAGES + 3]))
    assert pool.num_free == 0
    pool.check_integrity()


def test_a_pool_without_pages_refuses_and_stays_sound():
    pool = pool_of(0)
    with pytest.raises(PoolFull) as full:
        table_of(pool, 2)
    assert full.value.missing == 2
    pool.check_integrity()


def test_pages_are_announced_before_they_can_be_handed_out_again():
    pool = pool_of(2)
    table = table_of(pool, 2)
    heard = []
    pool.on_free(lambda pages: heard.append((sorted(pages.tolist()), pool.num_free)))
    held = sorted(table.held().tolist())
    table.release()
    assert heard == [(held, 0)]


def test_content_that_is_shared_is_copied_with_its_scales_before_a_write():
    pool = pool_of(layers=2)
    table = table_of(pool, 1, 1)
    fill(pool, table.pages[0], 1.0)
    scales = torch.tensor([[2.0], [3.0]])
    assert table.apply(moving(table, 1, 0, table.pages[0, 0], k_scale=scales, v_scale=scales * 10)) == 1
    assert table.ref(1, 0, layer=1) == BlockRef(int(table.pages[0, 0]), 3.0, 30.0, count=2)
    pages = table.make_writable(torch.tensor([1]), torch.tensor([0]))
    assert table.ref(1, 0, layer=1) == BlockRef(int(pages[0]), count=2)
    assert [float(layer[pages].mean()) for layer in pool.kv.keys] == [2.0, 3.0]
    assert [float(layer[pages].mean()) for layer in pool.kv.values] == [20.0, 30.0]
    assert all((layer[table.pages[0]] == 1).all() for layer in (*pool.kv.keys, *pool.kv.values))
    pool.check_integrity()


def test_a_page_of_ones_own_is_written_in_place():
    table = table_of(pool_of(1), 1)
    before = table.pages.clone()
    assert torch.equal(table.make_writable(torch.tensor([0]), torch.tensor([0])), before[0])
    assert torch.equal(table.pages, before)


def test_new_blocks_do_not_inherit_the_scales_of_released_ones():
    pool = pool_of()
    table = table_of(pool, 1, 2)
    scales = torch.full((1, 1), 2.0)
    table.apply(moving(table, 1, 1, table.pages[0, 0], k_scale=scales, v_scale=scales))
    table.truncate(torch.tensor([1, 1]))
    table.extend(torch.tensor([4, 4]))
    assert all(table.ref(row, slot).k_scale == 1 for row in (0, 1) for slot in range(4))
    table.check_integrity()


def test_selected_rows_take_their_scales_along():
    pool = pool_of()
    table = table_of(pool, 1, 1)
    scales = torch.full((1, 1), 2.0)
    table.apply(moving(table, 1, 0, table.pages[0, 0], k_scale=scales, v_scale=2 * scales))
    table.select(torch.tensor([1, 1, 0]))
    assert [table.ref(row, 0).v_scale for row in range(3)] == [4.0, 4.0, 1.0]
    table.check_integrity()
    pool.check_integrity()


def test_an_empty_plan_changes_nothing():
    table = table_of(pool_of(), 2)
    version = table.version
    assert table.apply(FusionPlan.empty()) == 0 and table.version == version


def test_plans_for_blocks_or_pages_that_are_gone_are_stale():
    pool = pool_of()
    table = table_of(pool, 1, 2)
    page = int(table.pages[0, 0])
    plan = moving(table, 1, 1, page)
    for wrong in (
        {"row": plan.row + 1},
        {"slot": plan.slot + 50},
        {"page": torch.tensor([pool.num_pages])},
        {"page": torch.tensor([2**40])},
        {"page": torch.tensor([-1])},
        {"row": plan.row - 2},
    ):
        with pytest.raises(StalePlan):
            table.apply(dataclasses.replace(plan, **wrong))
    table.truncate(torch.tensor([0, 2]))
    with pytest.raises(StalePlan, match="freed"):
        table.apply(plan)
    pool.check_integrity()


def test_a_direction_does_not_overwrite_a_page_that_others_read():
    pool = pool_of()
    table = table_of(pool, 1, 1, 1)
    table.apply(moving(table, 2, 0, table.pages[0, 0]))
    fill(pool, table.pages[0], 1.0)
    ones = torch.ones(1, 1)
    direction = torch.full((1, 1, 2, *SHAPE), 5.0)
    target = table.pages[0, :1]
    plan = moving(
        table, 1, 0, target, k_scale=ones, v_scale=ones,
        direction_page=target, key_direction=direction, value_direction=direction,
    )  # fmt: skip
    before = table.pages.clone()
    with pytest.raises(StalePlan, match="read by others"):
        table.apply(plan)
    assert (pool.kv.keys[0][target] == 1).all() and torch.equal(before, table.pages)
    pool.check_integrity()


def test_a_table_that_is_dropped_without_release_gives_its_pages_back():
    pool = pool_of()
    table = table_of(pool, 3)
    gone = weakref.ref(table)
    del table
    gc.collect()
    assert gone() is None
    pool.check_integrity()
    assert pool.num_used == 0


def test_what_a_forward_pass_in_inference_mode_made_can_be_changed_after_it():
    with torch.inference_mode():
        pool = pool_of()
        table = table_of(pool, 1, 1)
        fill(pool, table.pages[:, 0], 1.0)
        scales = torch.full((1, 1), 2.0)
        table.apply(moving(table, 1, 0, table.pages[0, 0], k_scale=scales, v_scale=scales))
    pages = table.make_writable(torch.tensor([1]), torch.tensor([0]))
    assert (pool.kv.keys[0][pages] == 2).all()
    table.truncate(torch.tensor([1, 0]))
    table.extend(torch.tensor([2, FIRST_PAGES + 1]))
    table.select(torch.tensor([1]))
    table.release()
    pool.check_integrity()


def test_broken_counts_and_tables_are_noticed():
    pool = pool_of()
    table = table_of(pool, 2, 1)
    pool.references[table.pages[0, 0]] += 1
    with pytest.raises(IntegrityError, match="2 references counted, 1 held"):
        pool.check_integrity()
    pool.references[table.pages[0, 0]] -= 1
    pool.references[NULL_PAGE] = 1
    with pytest.raises(IntegrityError):
        pool.check_integrity()
    pool.references[NULL_PAGE] = 0
    pool.check_integrity()
    pool._free[0] = pool._free[1]
    with pytest.raises(IntegrityError, match="twice"):
        pool.check_integrity()
    table.pages[0, 0] = -1
    with pytest.raises(IntegrityError, match="hole"):
        table.check_integrity()
    table.scales = torch.ones(2, 1, 1, 1)
    table.pages[0, 0] = 1
    with pytest.raises(IntegrityError, match="shape"):
        table.check_integrity()


def test_a_row_goes_on_with_resident_pages():
    pool = pool_of()
    source, reader = table_of(pool, 3, 1), table_of(pool, 1, 0)
    before = reader.version
    reader.append(0, source.pages[0, 1:3], served=True)
    reader.append(1, source.pages[0, :1], served=False)
    assert reader.num_blocks().tolist() == [3, 1] and reader.version > before
    assert reader.pages[0, 1:3].tolist() == source.pages[0, 1:3].tolist()
    assert reader.served[0, :3].tolist() == [False, True, True] and not reader.served[1].any()
    assert pool.references[source.pages[0, :3]].tolist() == [2, 2, 2]
    reader.append(0, source.pages[0, :0], served=True)
    pool.check_integrity()
    reader.check_integrity()
    free = int((pool.references[1:] == 0).nonzero()[0]) + 1
    with pytest.raises(IntegrityError, match="a free page was shared"):
        reader.append(0, torch.tensor([free]), served=True)
    assert reader.num_blocks().tolist() == [3, 1]
    pool.check_integrity()


def test_rows_of_several_tables_become_one_with_their_scales():
    pool = pool_of(layers=2)
    first, second, third = table_of(pool, 2), table_of(pool, 5), table_of(pool, 0)
    scales = torch.full((2, 1), 2.0)
    second.apply(moving(second, 0, 1, second.pages[0, 0], k_scale=scales, v_scale=3 * scales))
    joined = BlockTable(pool, 3)
    joined.adopt_rows([first, second, third])
    assert joined.num_blocks().tolist() == [2, 5, 0]
    for row, part in enumerate((first, second)):
        width = part.pages.shape[1]
        assert torch.equal(joined.pages[row, :width], part.pages[0])
        assert torch.equal(joined.served[row, :width], part.served[0])
    assert joined.ref(1, 1, 1).k_scale == 2 and joined.ref(1, 1, 0).v_scale == 6 and joined.ref(0, 1).k_scale == 1
    del first, second, third
    gc.collect()
    pool.check_integrity()
    joined.check_integrity()
    assert pool.num_used == 6


def test_a_table_that_was_never_made_goes_in_silence():
    """Compilers and serializers make objects without `__init__`; errors of destructors are only printed."""
    BlockTable.__new__(BlockTable).__del__()
