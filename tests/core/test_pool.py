"""Any sequence of operations on tables and their pool keeps the counts right and everybody's content unchanged."""

from unittest.mock import patch

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jointkv.errors import IntegrityError, PoolFull, StalePlan
from jointkv.plan import FusionPlan
from jointkv.pool import NULL_PAGE, BlockPool
from jointkv.table import BlockTable

LAYERS = 2
KEY_SHAPE, VALUE_SHAPE = (1, 2), (1, 3)
BLOCK_SIZE = 2
MAX_ROWS, MAX_SLOTS, MAX_TABLES = 3, 5, 4
EXACT_SCALES = (0.5, 1.0, 2.0, 4.0)
"""Powers of two: a scaled read-out is exact, so contents are compared for equality."""

Content = tuple[torch.Tensor, torch.Tensor]


def read_block(pool: BlockPool, table: BlockTable, row: int, slot: int) -> Content:
    """K and V `[layers, t, h, d]` that a logical block reads: its page's content times its scales."""
    sides = []
    for side, layers in enumerate((pool.kv.keys, pool.kv.values)):
        refs = [table.ref(row, slot, layer) for layer in range(LAYERS)]
        scales = [(ref.k_scale, ref.v_scale)[side] for ref in refs]
        pages = zip(layers, refs, scales, strict=True)
        sides.append(torch.stack([layer[ref.page] * scale for layer, ref, scale in pages]))
    return sides[0], sides[1]


def same(first: Content, second: Content) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def entries_of(table: BlockTable) -> list[tuple[int, int]]:
    return [(row, slot) for row, slot in (table.pages >= 0).nonzero().tolist()]


class PoolMachine(RuleBasedStateMachine):
    """`shadow[i][row, slot]` is what block (row, slot) of `tables[i]` holds, once it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.first_pages = patch("jointkv.pool.FIRST_PAGES", 2)
        self.first_pages.start()
        self.generator = torch.Generator().manual_seed(0)
        self.tables: list[BlockTable] = []
        self.shadow: list[dict[tuple[int, int], Content]] = []
        self.freed: list[int] = []
        self.seen: list[tuple[BlockTable, int, torch.Tensor]] = []

    @initialize(max_pages=st.none() | st.integers(0, 14))
    def make_pool(self, max_pages):
        self.pool = BlockPool(LAYERS, BLOCK_SIZE, KEY_SHAPE, VALUE_SHAPE, max_pages=max_pages)
        self.pool.on_free(lambda pages: self.freed.extend(pages.tolist()))
        self.used = set()

    def teardown(self) -> None:
        self.first_pages.stop()

    # What the rules draw.

    def pick_table(self, data):
        return data.draw(st.integers(0, len(self.tables) - 1), label="table")

    def pick_blocks(self, data, index, *, written=False):
        """Some distinct blocks of a table: row and slot tensors, maybe empty."""
        entries = [e for e in entries_of(self.tables[index]) if not written or e in self.shadow[index]]
        if not entries:
            return []
        return data.draw(st.lists(st.sampled_from(entries), unique=True, max_size=4), label="blocks")

    def random_content(self, *shape):
        return [torch.randn(*shape, BLOCK_SIZE, *sizes, generator=self.generator) for sizes in (KEY_SHAPE, VALUE_SHAPE)]

    def attempt(self, wanted, action):
        """Run what needs `wanted` new pages; when they are not there, nothing may change."""
        pool = self.pool
        room = None if pool.max_pages is None else pool.max_pages - len(self.used)
        before = [(table.pages.clone(), table.version) for table in self.tables]
        references, free = pool.references.clone(), pool.num_free
        try:
            action()
        except PoolFull as full:
            assert room is not None and full.missing == wanted - room > 0
            assert full.requested == wanted and full.total == pool.max_pages
            assert f"{full.missing} missing" in str(full)
            assert torch.equal(references, pool.references) and free == pool.num_free
            for table, (pages, version) in zip(self.tables, before, strict=True):
                assert torch.equal(table.pages, pages) and table.version == version
            return False
        assert room is None or wanted <= room
        return True

    # The operations.

    @precondition(lambda self: len(self.tables) < MAX_TABLES)
    @rule(rows=st.integers(1, MAX_ROWS))
    def new_table(self, rows):
        self.tables.append(BlockTable(self.pool, rows))
        self.shadow.append({})

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def extend(self, data):
        table = self.tables[self.pick_table(data)]
        rows = table.num_rows
        blocks = torch.tensor(data.draw(st.lists(st.integers(0, MAX_SLOTS), min_size=rows, max_size=rows)))
        have = table.num_blocks()
        wanted = int((blocks - have).clamp(min=0).sum())
        assert table.missing_blocks(blocks) == wanted
        if self.attempt(wanted, lambda: table.extend(blocks)):
            assert torch.equal(table.num_blocks(), torch.maximum(have, blocks))

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
        table, shadow = self.tables[index], self.shadow[index]
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
            keys, values = self.random_content(LAYERS, len(blocks))
            for layer in range(LAYERS):
                self.pool.kv.keys[layer][pages] = keys[layer]
                self.pool.kv.values[layer][pages] = values[layer]
            shadow.update({block: (keys[:, i], values[:, i]) for i, block in enumerate(blocks)})

    def is_shared(self, table, row, slot):
        page = int(table.pages[row, slot])
        return sum(page in t.pages[r].tolist() for t in self.tables for r in range(t.num_rows)) > 1

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
        self.apply(table, plan)
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
        # The first of `own` keeps its page, which becomes the direction; others join it or a page of their own.
        group = torch.tensor([i if i in own and data.draw(st.booleans()) else own[0] for i in range(len(blocks))])
        leaders, group = group.unique(return_inverse=True)
        if own[0] not in leaders.tolist() or not all(group[leader] == g for g, leader in enumerate(leaders)):
            return
        keys, values = self.random_content(LAYERS, len(leaders))
        k_scale, v_scale = self.draw_scales(data, len(blocks))
        plan = self.plan(table, rows, slots, old[leaders][group], k_scale, v_scale, old[leaders], keys, values)
        self.apply(table, plan)
        for i, block in enumerate(blocks):
            scales = (scale[:, i].view(-1, 1, 1, 1) for scale in (k_scale, v_scale))
            read = [side[:, group[i]] * scale for side, scale in zip((keys, values), scales, strict=True)]
            self.shadow[index][block] = (read[0], read[1])

    def draw_scales(self, data, count):
        numbers = st.lists(st.sampled_from(EXACT_SCALES), min_size=LAYERS * count, max_size=LAYERS * count)
        return [torch.tensor(data.draw(numbers)).view(LAYERS, count) for _ in range(2)]

    def plan(self, table, rows, slots, pages, *rest):
        errors = torch.zeros(len(rows))
        return FusionPlan(rows, slots, table.pages[rows, slots], pages, errors, errors, *rest)

    def apply(self, table, plan):
        used = self.pool.num_used
        stale = FusionPlan(plan.row, plan.slot, plan.old_page + 1, *list(vars(plan).values())[3:])
        before, version = table.pages.clone(), table.version
        try:
            table.apply(stale)
        except StalePlan:
            assert torch.equal(before, table.pages) and version == table.version
        else:
            raise AssertionError("a stale plan was applied")
        assert table.apply(plan) == used - self.pool.num_used
        assert torch.equal(table.pages[plan.row, plan.slot], plan.page)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), drop=st.booleans())
    def release(self, data, drop):
        index = self.pick_table(data)
        self.tables[index].release()
        self.shadow[index] = {}
        assert not len(self.tables[index].held())
        if drop:
            self.seen = []
            del self.tables[index], self.shadow[index]

    @precondition(lambda self: self.pool.num_free > 0)
    @rule(data=st.data())
    def free_twice(self, data):
        free = [page for page in range(1, self.pool.num_pages + 1) if page not in self.used]
        references = self.pool.references.clone()
        page = data.draw(st.sampled_from(free))
        over = [[page], [NULL_PAGE], [*self.used, page], [p for p in self.used for _ in range(99)]]
        for pages in over:
            for verb in (self.pool.free, self.pool.share):
                if not pages or (verb == self.pool.share and page not in pages and NULL_PAGE not in pages):
                    continue
                try:
                    verb(torch.tensor(pages))
                except IntegrityError:
                    assert torch.equal(references, self.pool.references)
                else:
                    raise AssertionError(f"{verb.__name__}({pages}) was accepted")

    # What holds after every step.

    @invariant()
    def counts_are_right(self):
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        pool.check_integrity()
        for table in self.tables:
            table.check_integrity()
        used = {page for table in self.tables for page in table.held().tolist()}
        assert pool.num_free + len(used) == pool.num_pages and pool.num_used == len(used)
        assert pool.max_pages is None or pool.num_pages <= pool.max_pages
        assert pool.peak_used >= len(used) and pool.nbytes == len(used) * pool.kv.page_nbytes
        assert sorted(self.freed) == sorted(self.used - used)  # every page that became free was announced, once
        self.used, self.freed = used, []

    @invariant()
    def contents_are_unchanged(self):
        if not hasattr(self, "pool"):
            return
        for layer in (*self.pool.kv.keys, *self.pool.kv.values):
            assert not layer[NULL_PAGE].any()
        for table, shadow in zip(self.tables, self.shadow, strict=True):
            for (row, slot), content in shadow.items():
                assert same(read_block(self.pool, table, row, slot), content), (row, slot)

    @invariant()
    def the_version_tells_every_change(self):
        for table, version, pages in self.seen:
            assert table.version != version or torch.equal(table.pages[table.pages >= 0], pages)
        self.seen = [(table, table.version, table.held().clone()) for table in self.tables]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
