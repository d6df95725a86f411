"""Any sequence of operations on tables and pool keeps the counts right and everybody's content unchanged."""

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jointkv.core.plan import FusionPlan
from jointkv.core.pool import NULL_PAGE, BlockPool
from jointkv.core.table import BlockTable
from jointkv.errors import IntegrityError, PoolFull, StalePlan
from tests.core.shadow import Content, State, entries_of, read_block, same, state_of
from tests.effort import machine_settings

LAYERS = 2
KEY_SHAPE, VALUE_SHAPE = (1, 2), (1, 3)
BLOCK_SIZE = 2
MAX_ROWS, MAX_SLOTS, MAX_TABLES = 3, 5, 4
EXACT_SCALES = (0.5, 1.0, 2.0, 4.0)
"""Powers of two: a scaled read-out is exact, so contents are compared for equality."""


class PoolMachine(RuleBasedStateMachine):
    """`shadow[i][row, slot]` is what block (row, slot) of `tables[i]` holds, once it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.first_pages = patch("jointkv.core.pool.FIRST_PAGES", 2)
        self.first_pages.start()
        self.generator = torch.Generator().manual_seed(0)
        self.tables: list[BlockTable] = []
        self.shadow: list[dict[tuple[int, int], Content]] = []
        self.freed: list[int] = []
        self.seen: list[tuple[BlockTable, int, State]] = []

    @initialize(max_pages=st.integers(8, 12) | st.none())
    def make_pool(self, max_pages):
        self.pool = BlockPool(LAYERS, BLOCK_SIZE, KEY_SHAPE, VALUE_SHAPE, max_pages=max_pages)
        self.pool.on_free(lambda pages: self.freed.extend(pages.tolist()))
        self.used = set()
        self.new_table(1)
        self.new_table(3)
        for index, table in enumerate(self.tables):
            table.extend(torch.full((table.num_rows,), 2))
            self.write(index, entries_of(table))

    def teardown(self) -> None:
        self.first_pages.stop()

    # What the rules draw.

    def pick_table(self, data):
        return data.draw(st.integers(0, len(self.tables) - 1), label="table")

    def pick_blocks(self, data, index, *, written=False):
        """Some distinct blocks (row, slot) of a table, maybe none."""
        entries = [e for e in entries_of(self.tables[index]) if not written or e in self.shadow[index]]
        if not entries:
            return []
        return data.draw(st.lists(st.sampled_from(entries), unique=True, min_size=1, max_size=6), label="blocks")

    def random_content(self, *shape):
        sides = (KEY_SHAPE, VALUE_SHAPE)
        return [torch.randn(*shape, BLOCK_SIZE, *side, generator=self.generator) for side in sides]

    def attempt(self, wanted, action):
        """Run what needs `wanted` new pages; when they are not there, it must say so and change nothing."""
        limit = self.pool.max_pages
        if limit is None or wanted <= limit - len(self.used):
            action()
            return True
        full = self.refused(PoolFull, action)
        assert (full.missing, full.requested, full.total) == (wanted - limit + len(self.used), wanted, limit)
        assert f"{full.missing} missing" in str(full)
        return False

    # The operations.

    @precondition(lambda self: len(self.tables) < MAX_TABLES)
    @rule(rows=st.integers(1, MAX_ROWS))
    def new_table(self, rows):
        self.tables.append(BlockTable(self.pool, rows))
        self.shadow.append({})

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def extend(self, data):
        index = self.pick_table(data)
        table = self.tables[index]
        rows = table.num_rows
        blocks = torch.tensor(data.draw(st.lists(st.integers(0, MAX_SLOTS), min_size=rows, max_size=rows)))
        have = table.num_blocks()
        wanted = int((blocks - have).clamp(min=0).sum())
        assert table.missing_blocks(blocks) == wanted
        if self.attempt(wanted, lambda: table.extend(blocks)):
            assert torch.equal(table.num_blocks(), torch.maximum(have, blocks))
            if data.draw(st.booleans(), label="write"):
                self.write(index, [(row, slot) for row, slot in entries_of(table) if slot >= have[row]])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def truncate(self, data):
        index = self.pick_table(data)
        table = self.tables[index]
        rows = table.num_rows
        blocks = torch.tensor(data.draw(st.lists(st.integers(0, MAX_SLOTS), min_size=rows, max_size=rows)))
        have = table.num_blocks()
        table.truncate(blocks)
        assert torch.equal(table.num_blocks(), torch.minimum(have, blocks))
        self.shadow[index] = {e: c for e, c in self.shadow[index].items() if e[1] < blocks[e[0]]}

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def select(self, data):
        index = self.pick_table(data)
        table = self.tables[index]
        rows = data.draw(st.lists(st.integers(0, table.num_rows - 1), min_size=1, max_size=MAX_ROWS))
        table.select(torch.tensor(rows))
        old = self.shadow[index]
        self.shadow[index] = {
            (new, slot): content for new, row in enumerate(rows) for (r, slot), content in old.items() if r == row
        }

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), write=st.booleans())
    def make_writable(self, data, write):
        index = self.pick_table(data)
        table = self.tables[index]
        blocks = self.pick_blocks(data, index)
        if not blocks:
            return
        rows, slots = torch.tensor(blocks).T
        copies = [b for b in blocks if self.is_shared(table, *b) or self.is_scaled(table, *b)]
        assert table.count_shared(rows, slots) == len(copies)
        pages = table.pages[rows, slots]
        if not self.attempt(len(copies), lambda: pages.copy_(table.make_writable(rows, slots))):
            return
        assert torch.equal(pages, table.pages[rows, slots]) and len(pages.unique()) == len(pages)
        for (row, slot), page in zip(blocks, pages.tolist(), strict=True):
            assert self.pool.references[page] == 1 and not self.is_scaled(table, row, slot)
        if write:
            self.write(index, blocks)

    def write(self, index, blocks):
        """Fill blocks that nobody else reads with new content."""
        keys, values = self.random_content(LAYERS, len(blocks))
        for i, block in enumerate(blocks):
            page = self.tables[index].pages[block]
            for layer in range(LAYERS):
                self.pool.kv.keys[layer][page] = keys[layer, i]
                self.pool.kv.values[layer][page] = values[layer, i]
            self.shadow[index][block] = keys[:, i], values[:, i]

    def is_shared(self, table, row, slot):
        page = int(table.pages[row, slot])
        return sum(int((other.pages == page).sum()) for other in self.tables) > 1

    def is_scaled(self, table, row, slot):
        refs = [table.ref(row, slot, layer) for layer in range(LAYERS)]
        return any(ref.k_scale != 1 or ref.v_scale != 1 for ref in refs)

    @precondition(lambda self: any(self.shadow))
    @rule(data=st.data(), scaled=st.booleans())
    def apply_resident_plan(self, data, scaled):
        index = self.pick_table(data)
        table = self.tables[index]
        blocks = self.pick_blocks(data, index, written=True)
        written = sorted({int(t.pages[e]) for t, s in zip(self.tables, self.shadow, strict=True) for e in s})
        if not blocks:
            return
        rows, slots = torch.tensor(blocks).T
        served_by = torch.tensor([data.draw(st.sampled_from(written), label="page") for _ in blocks])
        scales = self.draw_scales(data, len(blocks)) if scaled else (None, None)
        plan = self.plan(table, rows, slots, served_by, *scales)
        factors = [1.0 if scale is None else scale.view(LAYERS, -1, 1, 1, 1) for scale in scales]
        sides = zip((self.pool.kv.keys, self.pool.kv.values), factors, strict=True)
        keys, values = (torch.stack([layer[served_by] for layer in side]) * factor for side, factor in sides)
        if not self.apply(table, plan):
            return
        self.shadow[index].update({b: (keys[:, i], values[:, i]) for i, b in enumerate(blocks)})

    @precondition(lambda self: any(self.shadow))
    @rule(data=st.data())
    def apply_direction_plan(self, data):
        index = self.pick_table(data)
        table = self.tables[index]
        blocks = self.pick_blocks(data, index, written=True)
        own = [i for i, block in enumerate(blocks) if not self.is_shared(table, *block)]
        if not own:
            return
        rows, slots = torch.tensor(blocks).T
        old = table.pages[rows, slots]
        # The first of `own` leads; the others of `own` lead themselves or join it, as shared blocks must.
        leads = {i: i if i == own[0] or (i in own and data.draw(st.booleans())) else own[0] for i in range(len(blocks))}
        leaders, group = torch.tensor(list(leads.values())).unique(return_inverse=True)
        keys, values = self.random_content(LAYERS, len(leaders))
        k_scale, v_scale = self.draw_scales(data, len(blocks))
        pages = old[leaders]
        plan = self.plan(table, rows, slots, pages[group], k_scale, v_scale, pages, keys, values)
        if not self.apply(table, plan):
            return
        for i, block in enumerate(blocks):
            scales = (scale[:, i].view(-1, 1, 1, 1) for scale in (k_scale, v_scale))
            read = [side[:, group[i]] * scale for side, scale in zip((keys, values), scales, strict=True)]
            self.shadow[index][block] = (read[0], read[1])

    def draw_scales(self, data, count):
        numbers = st.lists(st.sampled_from(EXACT_SCALES), min_size=LAYERS * count, max_size=LAYERS * count)
        return [torch.tensor(data.draw(numbers)).view(LAYERS, count) for _ in range(2)]

    def plan(self, table, rows, slots, pages, *rest):
        errors = torch.zeros(len(rows))
        return FusionPlan(rows, slots, table.pages[rows, slots], pages, *[errors] * 3, *rest)

    def apply(self, table, plan):
        used = self.pool.num_used
        stale = dataclasses.replace(plan, old_page=plan.old_page + 1)
        self.refused(StalePlan, lambda: table.apply(stale))
        if any(self.is_scaled(table, *block) for block in zip(plan.row.tolist(), plan.slot.tolist(), strict=True)):
            self.refused(StalePlan, lambda: table.apply(plan))
            return False
        assert table.apply(plan) == used - self.pool.num_used
        assert torch.equal(table.pages[plan.row, plan.slot], plan.page)
        return True

    def refused(self, error, action):
        """`action` raises `error` and changes nothing."""
        before = [(table.pages.clone(), table.version) for table in self.tables]
        references, free = self.pool.references.clone(), self.pool.num_free
        with pytest.raises(error) as raised:
            action()
        assert torch.equal(references, self.pool.references) and free == self.pool.num_free
        for table, (pages, version) in zip(self.tables, before, strict=True):
            assert torch.equal(table.pages, pages) and table.version == version
        return raised.value

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), drop=st.booleans())
    def release(self, data, drop):
        index = self.pick_table(data)
        if index < 2 and data.draw(st.booleans(), label="spare the first tables"):
            return
        self.tables[index].release()
        self.shadow[index] = {}
        assert not len(self.tables[index].held())
        if drop:
            self.seen = []
            del self.tables[index], self.shadow[index]

    @precondition(lambda self: self.pool.num_free > 0)
    @rule(data=st.data())
    def touch_free_pages(self, data):
        free = sorted(set(range(1, self.pool.num_pages + 1)) - self.used)
        page = data.draw(st.sampled_from(free))
        too_often = [p for p in self.used for _ in range(int(self.pool.references[p]) + 1)]
        for verb, pages in [
            (self.pool.free, [page]),
            (self.pool.free, [*self.used, page]),
            (self.pool.free, [NULL_PAGE]),
            (self.pool.share, [page]),
            (self.pool.share, [NULL_PAGE]),
            (self.pool.free, too_often or [page]),
        ]:
            self.refused(IntegrityError, lambda verb=verb, pages=pages: verb(torch.tensor(pages)))

    # What holds after every step.

    @invariant()
    def counts_are_right(self):
        pool = self.pool
        pool.check_integrity()
        for table in self.tables:
            table.check_integrity()
        used = {page for table in self.tables for page in table.held().tolist()}
        assert pool.num_free + len(used) == pool.num_pages and pool.num_used == len(used)
        assert pool.max_pages is None or pool.num_pages <= pool.max_pages
        assert pool.peak_used >= len(used) and pool.nbytes == len(used) * pool.kv.page_nbytes
        assert sorted(self.freed) == sorted(self.used - used), "freed pages are announced, each once"
        self.used, self.freed = used, []

    @invariant()
    def contents_are_unchanged(self):
        for layer in (*self.pool.kv.keys, *self.pool.kv.values):
            assert not layer[NULL_PAGE].any()
        for table, shadow in zip(self.tables, self.shadow, strict=True):
            for (row, slot), content in shadow.items():
                assert same(read_block(self.pool, table, row, slot), content), (row, slot)

    @invariant()
    def the_version_tells_every_change(self):
        for table, version, state in self.seen:
            assert table.version != version or state == state_of(table)
        self.seen = [(table, table.version, state_of(table)) for table in self.tables]


TestPool: Any = PoolMachine.TestCase
TestPool.settings = machine_settings(40)
TestPool.pytestmark = [
    pytest.mark.timeout(0),
    pytest.mark.hazard(
        "State",
        "pages are shared, copied, scaled, freed and planned away in any order (core)",
        "counts stay right, nobody's content changes, and what is refused changes nothing",
    ),
]
