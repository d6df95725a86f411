"""One forward pass over a batch: what was announced of it, where its tokens go, and what attention reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jointkv.attention.tokens import token_slots, write_tokens
from jointkv.hf.attention import PagedLayer, attach_pages, watch
from jointkv.hf.batch import Batch


@dataclass
class Step:
    """A forward pass.

    Attributes:
        mask, input_ids: as the model was given them, where that is known.
        other_layers: layers with transformers' own cache, and what they held before.
        slots: where all tokens lie, `[rows, length]` by layer group.
        written: which of the new tokens, `[rows * new]` flattened, are no padding.
        start: tokens of each row that were there before.
        prompt: whether more than one token a row is read.
    """

    mask: Tensor | None = None
    input_ids: Tensor | None = None
    other_layers: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    slots: list[Tensor] = field(default_factory=list)
    written: Tensor | slice = field(default_factory=lambda: slice(None))
    start: int = 0
    prompt: bool = True

    @property
    def fresh(self) -> bool:
        """Whether nothing was there before."""
        return self.start == 0

    def advance(self, batch: Batch, new: int, device: torch.device) -> None:
        """Give `batch` pages for `new` more tokens a row. Raises PoolFull: it is as before."""
        start = batch.length
        batch.extend(new, self.mask, self.input_ids)
        self.start, self.prompt = start, new > 1
        size, padding, length = batch.pool.block_size, batch.padding, batch.length
        self.slots = [token_slots(table.pages, size, padding, length).to(device) for table in batch.tables]
        inside = torch.arange(length - new, length) >= padding[:, None]
        self.written = slice(None) if inside.all() else inside.flatten().nonzero().squeeze(1).to(device)

    def write(
        self, batch: Batch, index: int, key_states: Tensor, value_states: Tensor, dense: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Write the new states `[rows, h, n, d]` of a full-attention layer; returns what attention is to be given.

        Once a layer is known to hand them on untouched, pages ride on its keys; until then, and where `dense` asks for
        it, K and V are dense. They have the dtypes of the states, whatever the pages have.
        """
        pool = batch.pool
        group, member = divmod(index, pool.groups.layers)
        kv, slots = pool.prepare(key_states, value_states).kv, self.slots[group]
        keys, values = kv.keys[member], kv.values[member]
        new = slots[:, -key_states.shape[2] :].flatten()[self.written]
        for pages, states in ((keys, key_states), (values, value_states)):
            write_tokens(pages, new, states.transpose(1, 2).flatten(0, 1)[self.written].to(pages.dtype))
        if not self.fresh:
            paged = PagedLayer(keys, values, slots, *batch.scales(group, member))
            if pool.reads_pages and index in pool.page_readers and not dense:
                return attach_pages(key_states, paged), value_states
            whole = zip(paged.read(), (key_states, value_states), strict=True)
            key_states, value_states = (side.to(states.dtype).contiguous() for side, states in whole)
        if pool.reads_pages and not dense:
            watch(key_states, value_states, functools.partial(pool.page_readers.add, index))
        return key_states, value_states
