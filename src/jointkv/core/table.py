"""Block tables: which page each logical block of each sequence reads, and with which scales."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from jointkv.core.bookkeeping import bookkeeping
from jointkv.core.plan import BlockRef, FusionPlan
from jointkv.core.pool import BlockPool
from jointkv.errors import IntegrityError, StalePlan

NO_PAGE = -1


class BlockTable:
    """The block table of a batch of sequences in one layer group, backed by a pool. Dropping it frees its pages.

    Attributes:
        pages: long `[rows, slots]`, on the CPU; -1 where there is no block.
        served: bool `[rows, slots]`: the block is read from another one's content. It is never fused again, because
            a second error would come on top of the first.
        scales: of K and of V, float32 `[2, layers, rows, slots]`, or None while every scale is 1.
        version: changes whenever an entry changes, so that what was derived from the table can be kept until then.
    """

    @bookkeeping
    def __init__(self, pool: BlockPool, rows: int) -> None:
        self.pool = pool
        self.pages = torch.full((rows, 0), NO_PAGE, dtype=torch.long)
        self.served = torch.zeros(rows, 0, dtype=torch.bool)
        self.scales: Tensor | None = None
        self.version = 0
        pool.register(self)

    def __del__(self) -> None:
        # Of a table whose making was broken off, or followed by a compiler, there is nothing to free.
        if not sys.is_finalizing() and hasattr(self, "pool") and hasattr(self, "pages"):
            self.pool.drop(self.pages)

    @property
    def num_rows(self) -> int:
        return self.pages.shape[0]

    @property
    def k_scale(self) -> Tensor | None:
        """`scales` of K, `[layers, rows, slots]`."""
        return None if self.scales is None else self.scales[0]

    @property
    def v_scale(self) -> Tensor | None:
        """`scales` of V, `[layers, rows, slots]`."""
        return None if self.scales is None else self.scales[1]

    def num_blocks(self) -> Tensor:
        """Blocks per row, `[rows]`."""
        return (self.pages >= 0).sum(1)

    def held(self) -> Tensor:
        """Every page reference, one entry per (row, slot)."""
        return self.pages[self.pages >= 0]

    def missing_blocks(self, blocks: Tensor) -> int:
        """How many pages `extend(blocks)` would allocate."""
        return int((blocks - self.num_blocks()).clamp(min=0).sum())

    @bookkeeping
    def extend(self, blocks: Tensor) -> None:
        """Allocate pages until row `i` has at least `blocks[i]` blocks.

        Raises:
            PoolFull: nothing was changed.
        """
        have = self.num_blocks()
        if not (blocks > have).any():
            return
        width = int(torch.maximum(blocks, have).max())
        slots = torch.arange(width)
        wanted = (slots >= have[:, None]) & (slots < blocks[:, None])
        pages = self.pool.allocate(int(wanted.sum()))
        self._widen(width)
        self.pages[:, :width][wanted] = pages
        self.version += 1

    @bookkeeping
    def append(self, row: int, pages: Tensor, served: bool) -> None:
        """Let `row` read the resident `pages [n]` in its next slots; adds the references.

        Args:
            served: whether a block of its own would hold something else.

        Raises:
            IntegrityError: one of the pages is free; nothing was changed.
        """
        self.pool.share(pages)
        slots = int(self.num_blocks()[row]) + torch.arange(len(pages))
        self._widen(int(slots[-1]) + 1 if len(slots) else 0)
        self.pages[row, slots], self.served[row, slots] = pages, served
        self.version += 1

    @bookkeeping
    def truncate(self, blocks: Tensor) -> None:
        """Free the blocks of row `i` beyond the first `blocks[i]`."""
        beyond = (torch.arange(self.pages.shape[1]) >= blocks[:, None]) & (self.pages >= 0)
        self._free_entries(beyond)

    @bookkeeping
    def release(self) -> None:
        """Free every block and keep the rows."""
        self._free_entries(self.pages >= 0)
        self.pages, self.served = self.pages[:, :0], self.served[:, :0]
        self.scales = None

    @bookkeeping
    def select(self, rows: Tensor) -> None:
        """Make row `i` what row `rows[i]` was; rows may repeat (beams) or go."""
        old, self.pages, self.served = self.pages, self.pages[rows], self.served[rows]
        self.pool.share(self.pages[self.pages >= 0])
        self.pool.free(old[old >= 0])
        if self.scales is not None:
            self.scales = self.scales[:, :, rows]
        self.version += 1

    @bookkeeping
    def adopt(self, pages: Tensor, served: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
        """Make copies of `pages` (-1: none), flags and scales the content of this empty table; adds the references."""
        self.pool.share(pages[pages >= 0])
        self.pages, self.served = pages.clone(), served.clone()
        self.scales = _both(k_scale, v_scale)
        self.version += 1

    def scaled(self, rows: Tensor, slots: Tensor) -> Tensor:
        """Which of the named blocks read their page with a scale other than 1, bool `[n]`."""
        scales = self._scales_at(rows, slots)
        return torch.zeros(len(rows), dtype=torch.bool) if scales is None else (scales != 1).flatten(0, 1).any(0)

    def adopt_copy(self, other: BlockTable) -> None:
        """Make this empty table read what `other` reads."""
        self.adopt(other.pages, other.served, other.k_scale, other.v_scale)

    def adopt_rows(self, others: Sequence[BlockTable]) -> None:
        """Make this empty table read what `others`, of one pool, read: their rows, one below the other."""
        width = max(other.pages.shape[1] for other in others)
        pad, missing = torch.nn.functional.pad, [width - other.pages.shape[1] for other in others]
        pages = torch.cat([pad(o.pages, (0, m), value=NO_PAGE) for o, m in zip(others, missing, strict=True)])
        served = torch.cat([pad(o.served, (0, m)) for o, m in zip(others, missing, strict=True)])
        scales = None
        if any(other.scales is not None for other in others):
            scales = torch.ones(2, self.pool.kv.num_layers, *pages.shape)
            rows = 0
            for other in others:
                rows += other.num_rows
                if other.scales is not None:
                    scales[:, :, rows - other.num_rows : rows, : other.pages.shape[1]] = other.scales
        self.adopt(pages, served, *((None, None) if scales is None else scales))

    def count_shared(self, rows: Tensor, slots: Tensor) -> int:
        """How many of the named blocks `make_writable` would copy."""
        return int(self._needs_copy(rows, slots).sum())

    @bookkeeping
    def make_writable(self, rows: Tensor, slots: Tensor) -> Tensor:
        """Copy on write: after this, each named block has a page of its own, unscaled, which is returned.

        Raises:
            PoolFull: nothing was changed.
        """
        pages = self.pages[rows, slots]
        copy = self._needs_copy(rows, slots)
        if copy.any():
            rows, slots, source = rows[copy], slots[copy], pages[copy]
            target = self.pool.allocate(len(source))
            self.pool.copy_pages(source, target, self._scales_at(rows, slots))
            self._replace(rows, slots, target)
            self.pool.free(source)
            pages = pages.masked_scatter(copy, target)
        return pages

    @bookkeeping
    def apply(self, plan: FusionPlan) -> int:
        """Carry out `plan`: write its directions, point its members to their pages, free what nobody reads.

        Returns:
            The number of pages that became free.

        Raises:
            StalePlan: an entry has changed since the plan was made; nothing was changed. A page that was freed and
                handed out again meanwhile cannot be told from the old one: apply a plan before the pool changes.
        """
        if not len(plan):
            return 0
        limits = ((plan.row, self.num_rows), (plan.slot, self.pages.shape[1]), (plan.page, len(self.pool.references)))
        inside = all(bool(((part >= 0) & (part < limit)).all()) for part, limit in limits)
        if not inside or not torch.equal(self.pages[plan.row, plan.slot], plan.old_page):
            raise StalePlan("the block table has changed since the plan was made")
        if self.scaled(plan.row, plan.slot).any():
            raise StalePlan("a member reads a shared direction already; plans are made on what pages hold")
        if (self.pool.references[plan.page] <= 0).any():
            raise StalePlan("a representative's page has been freed since the plan was made")
        self._write_directions(plan)
        moved = plan.page != plan.old_page
        self.pool.share(plan.page[moved])
        self._replace(plan.row, plan.slot, plan.page, _both(plan.k_scale, plan.v_scale))
        self.served[plan.row, plan.slot] = (plan.key_error > 0) | (plan.value_error > 0) | (plan.token_error > 0)
        return self.pool.free(plan.old_page[moved])

    def ref(self, row: int, slot: int, layer: int = 0) -> BlockRef:
        """What one logical block reads, for layer `layer` of the group."""
        key, value = (1.0, 1.0) if self.scales is None else self.scales[:, layer, row, slot].tolist()
        return BlockRef(int(self.pages[row, slot]), key, value, count=self.pool.block_size)

    def check_integrity(self) -> None:
        """Raises IntegrityError when a row has a hole, or the scales' shape differs from the table's."""
        present = self.pages >= 0
        if (present[:, 1:] & ~present[:, :-1]).any():
            raise IntegrityError("a block table row has a hole")
        if self.served.shape != self.pages.shape or (self.served & ~present).any():
            raise IntegrityError("flags and block table differ")
        if self.scales is not None and self.scales.shape[2:] != self.pages.shape:
            raise IntegrityError("scales and block table differ in shape")

    def _write_directions(self, plan: FusionPlan) -> None:
        if plan.direction_page is None or plan.key_direction is None or plan.value_direction is None:
            return
        if (self.pool.references[plan.direction_page] != 1).any():
            raise StalePlan("a page to be overwritten with a direction is read by others")
        kv = self.pool.kv
        pages = plan.direction_page.to(kv.device)
        for index in range(kv.num_layers):
            kv.keys[index][pages] = plan.key_direction[index].to(kv.device)
            kv.values[index][pages] = plan.value_direction[index].to(kv.device)

    def _replace(self, rows: Tensor, slots: Tensor, pages: Tensor, scales: Tensor | None = None) -> None:
        self.pages[rows, slots] = pages
        if scales is not None and self.scales is None:
            self.scales = torch.ones(2, self.pool.kv.num_layers, *self.pages.shape)
        if self.scales is not None:
            self.scales[:, :, rows, slots] = 1.0 if scales is None else scales
        self.version += 1

    def _needs_copy(self, rows: Tensor, slots: Tensor) -> Tensor:
        return (self.pool.references[self.pages[rows, slots]] > 1) | self.scaled(rows, slots)

    def _scales_at(self, rows: Tensor, slots: Tensor) -> Tensor | None:
        return None if self.scales is None else self.scales[:, :, rows, slots]

    def _free_entries(self, entries: Tensor) -> None:
        if not entries.any():
            return
        freed = self.pages[entries]
        self.pages = self.pages.masked_fill(entries, NO_PAGE)
        self.served = self.served & ~entries
        if self.scales is not None:
            self.scales = self.scales.masked_fill(entries, 1.0)
        self.pool.free(freed)
        self.version += 1

    def _widen(self, width: int) -> None:
        extra = width - self.pages.shape[1]
        if extra <= 0:
            return
        # Room for as much again: a decoding sequence would otherwise copy its table at every new block.
        extra = max(extra, self.pages.shape[1])
        pad = torch.nn.functional.pad
        self.pages, self.served = pad(self.pages, (0, extra), value=NO_PAGE), pad(self.served, (0, extra))
        if self.scales is not None:
            self.scales = pad(self.scales, (0, extra), value=1.0)


def _both(k_scale: Tensor | None, v_scale: Tensor | None) -> Tensor | None:
    return None if k_scale is None or v_scale is None else torch.stack((k_scale, v_scale))
