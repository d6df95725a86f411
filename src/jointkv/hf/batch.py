"""The sequences of one cache: their block tables, and what is known of each row besides."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from jointkv.attention.tokens import read_tokens, token_scales, token_slots
from jointkv.core.blocks import PagedKV
from jointkv.core.bookkeeping import bookkeeping
from jointkv.core.table import BlockTable
from jointkv.errors import PoolFull
from jointkv.hf import saving
from jointkv.hf.pool import JointPool


@dataclass
class Room:
    """Pages that the rows of a batch have to themselves, one for each row and layer group, and go on in.

    Attributes:
        pages: `[groups * rows]`.
        versions: of the tables, when the pages were found there.
        left: tokens that each of them has room for.
    """

    pages: Tensor
    versions: list[int]
    left: int


class Batch:
    """Rows of equal length with their pages in `pool`.

    Args:
        tenants: the isolation key of each row; None before there are rows.

    Attributes:
        tables: the block table of each layer group.
        weights: those of the model when the batch began; under others nothing of it is fused.
        sequence: a number for each row, unique in the pool.
        length: tokens of each row, left padding included.
        padding: tokens of left padding, `[rows]`.
        considered: blocks that fusion has seen, `[rows]`.
        fusable: whether it may see more, `[rows]`; rows with masked tokens after their start are never fused.
        differentiable_from: the first token that was computed with gradients, which pages do not keep; None without.
        tokens: ids `[rows, length]`; None where they are not known, or nobody asks for them.
        slots: where all tokens lay after the last `extend`, `[rows, length]` by layer group, on the pages' device.
    """

    def __init__(self, pool: JointPool, tenants: Sequence[Hashable] | None = None) -> None:
        self.pool, self.tenants = pool, tenants or ()
        self.weights = pool.weights
        rows = len(self.tenants)
        self.sequence = pool.new_sequences(rows)
        self.length = 0
        self.padding = torch.zeros(rows, dtype=torch.long)
        self.considered = torch.zeros(rows, dtype=torch.long)
        self.fusable = torch.ones(rows, dtype=torch.bool)
        self.differentiable_from: int | None = None
        self.tokens: Tensor | None = None
        self.slots: list[Tensor] = []
        self._room: Room | None = None
        self._filled = True  # whether there may be blocks that are full and not considered
        self.tables: list[BlockTable] = []
        if tenants is not None:
            assert pool.blocks is not None
            self.tables = [BlockTable(pool.blocks, rows) for _ in range(pool.groups.count)]

    def __len__(self) -> int:
        return len(self.sequence)

    def extend(self, new: int, mask: Tensor | None, input_ids: Tensor | None) -> Tensor | None:
        """Give each row the places for `new` more tokens, and note their padding and holes, and their text.

        Args:
            mask: attention mask of all tokens, `[rows, length + new]`, where it is known.
            input_ids: `[rows, new]`; the text is kept while it is known without a gap.

        Returns:
            Which of the new tokens, `[rows * new]` flattened, are no padding; None for all.

        Raises:
            PoolFull: nothing was changed.
        """
        if mask is not None and (mask.shape[1] < new or mask[:, -new:].all()):  # as in most steps of decoding
            mask = None
        padding = self._extended_padding(new, mask)
        fits = self._has_room(new)
        if not fits:
            self._make_room(new, padding)
        self.padding = padding
        begun = None
        if not fits and (padding > self.length).any():
            begun = torch.arange(self.length, self.length + new) >= padding[:, None]
        if mask is not None:
            seen = mask[:, -new:].cpu().bool()
            self.fusable = self.fusable & (seen if begun is None else seen | ~begun).all(1)
        if self.pool.reads_text:
            past = self.tokens if self.length else torch.zeros(len(self), 0, dtype=torch.long)
            if past is None or input_ids is None or input_ids.shape != (len(self), new):
                self.tokens = None
            else:
                self.tokens = torch.cat((past, input_ids.cpu()), 1)
        self.length += new
        self._place(new, fits)
        return None if begun is None else begun.flatten().nonzero().squeeze(1)

    def _place(self, new: int, fits: bool) -> None:
        """Note where tokens lie; if the `new` ones fit in the page of those before them, they come next to them."""
        if fits:
            ahead = torch.arange(1, new + 1, device=self.slots[0].device)
            self.slots = [torch.cat((slots, slots[:, -1:] + ahead), 1) for slots in self.slots]
            return
        self.slots = []
        for table in self.tables:
            slots = token_slots(table.pages, self.pool.block_size, self.padding, self.length)
            # Of one layout, whatever the length: torch's compiler would compile for each.
            self.slots.append(slots.to(table.pool.kv.device).contiguous())

    def _extended_padding(self, new: int, mask: Tensor | None) -> Tensor:
        """A row that has no token yet may go on with padding."""
        if mask is None or mask.shape != (len(self), self.length + new):
            return self.padding
        leading = (mask[:, self.length :].cpu().long().cumsum(1) == 0).sum(1)
        return self.padding + leading * (self.padding == self.length)

    def _has_room(self, new: int) -> bool:
        """Whether `new` more tokens of each row fit in the pages that the last ones were written to."""
        room = self._room
        if room is None or room.left < new or room.versions != [table.version for table in self.tables]:
            return False
        if self.tables[0].pool.references[room.pages].max() > 1:  # a copy of the batch reads them as well
            return False
        room.left -= new
        self._filled = self._filled or not room.left
        return True

    def _make_room(self, new: int, padding: Tensor) -> None:
        """Pages for `new` more tokens, and one of its own for the block that a row goes on in."""
        blocks, size = self.pool.blocks, self.pool.block_size
        assert blocks is not None
        blocks.collect_dropped()  # before what is shared is counted: who shared it may be gone
        self._filled = True
        tail = self.length - self.padding
        partial = (tail % size > 0).nonzero().squeeze(1)
        slot = tail[partial] // size
        needed = -(-(self.length + new - padding) // size)
        count = sum(table.missing_blocks(needed) + table.count_shared(partial, slot) for table in self.tables)
        missing = blocks.missing(count)
        if missing:
            raise PoolFull(missing, count, blocks.max_pages or 0)
        for table in self.tables:
            if len(partial):
                pages = table.make_writable(partial, slot)
                self.pool.forget(pages)
            table.extend(needed)
        left = needed * size - (self.length + new - padding)
        self._room = None
        if needed.all():  # every row has begun
            last = (torch.arange(len(self)), needed - 1)
            pages = torch.cat([table.pages[last] for table in self.tables])
            self._room = Room(pages, [table.version for table in self.tables], int(left.min()))

    def adopt(self, pages: Tensor, tokens: Tensor, exact: bool) -> None:
        """Let the only row, which ends with a full block, go on with what resident `pages [n]` hold.

        Args:
            tokens: ids of that, `[n * block_size]`.
            exact: whether blocks of its own would hold the same.
        """
        for table in self.tables:
            table.append(0, pages, served=not exact)
        self._follow(tokens)

    def write(self, blocks: PagedKV, tokens: Tensor) -> None:
        """Let the only row, which ends with a full block, go on with copies of `blocks`, which it has not computed.

        Args:
            blocks: in order, as pages.
            tokens: ids of them, `[n * block_size]`.

        Raises:
            PoolFull: nothing was changed.
        """
        for table in self.tables:
            have = int(table.num_blocks()[0])
            table.extend(torch.tensor([have + blocks.num_pages]))
            pages, kv = table.pages[0, have : have + blocks.num_pages].to(table.pool.kv.device), table.pool.kv
            table.served[0, have : have + blocks.num_pages] = True
            for layers, written in ((kv.keys, blocks.keys), (kv.values, blocks.values)):
                for layer, content in zip(layers, written, strict=True):
                    layer[pages] = content
        self._follow(tokens)

    def _follow(self, tokens: Tensor) -> None:
        if self.pool.reads_text:
            past = tokens[None, :0] if self.tokens is None else self.tokens
            self.tokens = torch.cat((past, tokens[None]), 1)
        self.length, self._filled = self.length + len(tokens), True

    @classmethod
    def join(cls, rows: Sequence[Batch], length: int) -> Batch:
        """The sequences of batches of one row each, padded on the left to `length` tokens; reads the same pages."""
        joined = cls(rows[0].pool, [row.tenants[0] for row in rows])
        joined.sequence = torch.cat([row.sequence for row in rows])
        joined.length = length
        joined.padding = length - torch.tensor([row.length for row in rows])
        joined.considered = torch.cat([row.considered for row in rows])
        joined.fusable = torch.cat([row.fusable for row in rows])
        if all(row.tokens is not None for row in rows):
            texts = [row.tokens for row in rows if row.tokens is not None]
            joined.tokens = torch.cat([pad(text, (length - text.shape[1], 0)) for text in texts])
        for group, table in enumerate(joined.tables):
            table.adopt_rows([row.tables[group] for row in rows])
        return joined

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        size = self.pool.block_size
        self.length, self._room = length, None  # blocks that were full may be in an index
        self.padding = self.padding.clamp(max=length)
        left = length - self.padding
        for table in self.tables:
            table.truncate(-(-left // size))
        self.considered = torch.minimum(self.considered, left // size)
        if self.differentiable_from is not None and length <= self.differentiable_from:
            self.differentiable_from = None
        self.tokens = None if self.tokens is None else self.tokens[:, :length]

    def select(self, rows: Tensor) -> None:
        """Make row `i` what row `rows[i]` was, under a new number."""
        for table in self.tables:
            table.select(rows)
        self._know(self, rows)

    @bookkeeping
    def copy(self) -> Batch:
        """A batch that reads the same pages, under new numbers; either one copies a page before it writes to it."""
        twin = Batch(self.pool)
        for table in self.tables:
            twin.tables.append(BlockTable(table.pool, table.num_rows))
            twin.tables[-1].adopt_copy(table)
        twin._know(self, torch.arange(len(self)))
        return twin

    def _know(self, other: Batch, rows: Tensor) -> None:
        """Take over what is known of `rows` of another batch, or of this one."""
        self.tenants, self.weights = [other.tenants[row] for row in rows.tolist()], other.weights
        self.sequence = self.pool.new_sequences(len(rows))
        self.length = other.length
        self.padding, self.considered = other.padding[rows], other.considered[rows]
        self.fusable = other.fusable[rows]
        self.differentiable_from = other.differentiable_from
        self.tokens = None if other.tokens is None else other.tokens[rows]

    def newly_full(self) -> tuple[Tensor, Tensor]:
        """Row and slot of the blocks that may be fused and were not full before; from now on they were."""
        if not self._filled:  # as in most steps of decoding
            return self.considered[:0], self.considered[:0]
        full = (self.length - self.padding) // self.pool.block_size
        first, self.considered, self._filled = self.considered, full, False
        if self.weights is not self.pool.weights or not (full > first).any():
            return full[:0], full[:0]
        slots = torch.arange(int(full.max()))
        filled = (slots >= first[:, None]) & (slots < full[:, None]) & self.fusable[:, None]
        row, slot = filled.nonzero(as_tuple=True)
        return row, slot

    def scales(self, group: int, member: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Factors on K and V of one layer by token, `[rows, length]` on the pages' device, where blocks have any."""
        table = self.tables[group]
        if table.k_scale is None or table.v_scale is None:
            return None, None
        k, v = (
            token_scales(scale[member], self.pool.block_size, self.padding, self.length).to(table.pool.kv.device)
            for scale in (table.k_scale, table.v_scale)
        )
        return k, v

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """A copy of K and V `[rows, h, length, d]` of a full-attention layer, scales applied."""
        group, member = divmod(index, self.pool.groups.layers)
        kv = self.tables[group].pool.kv
        slots = token_slots(self.tables[group].pages, self.pool.block_size, self.padding, self.length).to(kv.device)
        keys, values = (
            read_tokens(layers[member], slots, scale).contiguous()
            for layers, scale in zip((kv.keys, kv.values), self.scales(group, member), strict=True)
        )
        return keys, values

    def state(self) -> saving.State:
        """Pages, tables and what is known of the rows, for `restore`; see `saving.pack`."""
        known = {} if self.tokens is None else {"tokens": self.tokens}
        return {**saving.pack(self.tables), "padding": self.padding, "fusable": self.fusable, **known}

    def restore(self, length: int, state: saving.State) -> None:
        """Make `state`, of as many rows with `length` tokens each, the content of this batch without tokens.

        Raises:
            PoolFull: too few pages are free; nothing was changed.
        """
        saving.unpack(self.tables, state)
        self.length, self.padding, self.fusable = length, state["padding"], state["fusable"]
        self.tokens = state.get("tokens") if self.pool.reads_text else None
