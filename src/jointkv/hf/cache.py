"""`JointCache`: a cache for `model.generate(past_key_values=...)` whose pages come from a shared pool."""

from __future__ import annotations

import copy
import functools
import time
import weakref
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from jointkv.attention.tokens import token_scales, token_slots, write_tokens
from jointkv.core.bookkeeping import bookkeeping
from jointkv.core.table import BlockTable
from jointkv.errors import LayoutError, PoolFull
from jointkv.fusion.fuser import NewBlocks
from jointkv.fusion.signature import token_hashes
from jointkv.hf.attention import PagedLayer, attach_pages, watch
from jointkv.hf.pool import JointPool


class PagedCacheLayer(CacheLayerMixin):
    """A full-attention layer of a `JointCache`; its K and V live in the cache's pages."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: JointCache, index: int) -> None:
        super().__init__()
        # Weak, so that pages return to the pool as soon as the cache is dropped.
        self._cache = weakref.ref(cache)
        self._index = index
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states `[rows, h, n, d]`; returns what attention needs: pages, or dense K and V."""
        cache = self._cache()
        assert cache is not None
        return cache.write_layer(self, self._index, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class JointCache(Cache):
    """KV cache of one batch of sequences, on pages of a `JointPool`.

    Blocks are fused when a forward pass has filled them: those of a prompt after its (chunk of) prefill, generated
    ones as they fill. Left padding is not stored. Sliding-window layers keep transformers' own cache layer.

    Args:
        pool: shared pages and policy.
        isolation_key: tenant: blocks are compared only inside one key. Any hashable value for all rows, or a list with
            one per row.

    Raises:
        LayoutError: the number of isolation keys differs from the rows of the batch (at the first forward pass).
        PoolFull: from a forward pass that needs more pages than the pool can give; the cache is as before.
    """

    def __init__(self, pool: JointPool, isolation_key: Hashable | list[Hashable] = "") -> None:
        stock = DynamicCache(config=pool.config).layers
        self.pool = pool
        self._given_key = self.isolation_key = isolation_key
        self._paged = {layer: index for index, layer in enumerate(pool.full_layers)}
        super().__init__(
            layers=[
                PagedCacheLayer(self, self._paged[index]) if index in self._paged else layer
                for index, layer in enumerate(stock)
            ]
        )
        self.tables: list[BlockTable] = []
        self._clear()

    def _clear(self) -> None:
        self.length = 0
        self.padding = torch.zeros(0, dtype=torch.long)
        self._considered = torch.zeros(0, dtype=torch.long)
        self.fusable = torch.zeros(0, dtype=torch.bool)
        self._sequence = torch.zeros(0, dtype=torch.long)
        self.tokens: Tensor | None = None
        self._announced: tuple[Tensor | None, Tensor | None] = (None, None)
        self._slots: list[Tensor] = []
        self._sliding_before: list[tuple[Any, dict[str, Any]]] = []
        self._fresh = False
        self._reads_prompt = True
        self._padded_step: Tensor | None = None

    @property
    def paged_layers(self) -> list[PagedCacheLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedCacheLayer)]

    @property
    def other_layers(self) -> list[Any]:
        """The layers that keep transformers' own cache."""
        return [layer for layer in self.layers if not isinstance(layer, PagedCacheLayer)]

    @property
    def batch_size(self) -> int:
        return len(self.padding) if self.tables else -1

    # One forward pass: begin_step, write_layer once per layer, end_step.

    @bookkeeping
    def begin_step(self, attention_mask: Tensor | None, input_ids: Tensor | None) -> None:
        """Note the padding and the text of the coming forward pass (called by the pool's forward hook)."""
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            attention_mask = None
        written = min(layer.length for layer in self.paged_layers)
        if written < self.length:  # the last forward pass broke off between two layers
            self._roll_back(written)
        self._sliding_before = [(layer, copy.copy(layer.__dict__)) for layer in self.other_layers]
        self._announced = (attention_mask, input_ids)

    @bookkeeping
    def write_layer(
        self, layer: PagedCacheLayer, index: int, key_states: Tensor, value_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new states; called by `PagedCacheLayer.update`."""
        if layer.length == self.length:
            self._advance(key_states, value_states)
        layer.length, layer.is_initialized = self.length, True
        group, member = divmod(index, self.pool.groups.layers)
        blocks = self.pool.prepare(key_states, value_states)
        keys, values = blocks.kv.keys[member], blocks.kv.values[member]
        slots = self._slots[group]
        new = slots[:, -key_states.shape[2] :].flatten()
        for pages, states in ((keys, key_states), (values, value_states)):
            states = states.transpose(1, 2).flatten(0, 1)
            if self._padded_step is not None:
                states = states[self._padded_step]
            write_tokens(pages, new if self._padded_step is None else new[self._padded_step], states)
        if self._fresh:
            return self._whole(index, key_states, value_states)
        paged = PagedLayer(keys, values, slots, *self._scales(group, member))
        if self.pool.reads_pages and index in self.pool.page_readers:
            return attach_pages(key_states, paged), value_states
        dense_keys, dense_values = paged.read()
        return self._whole(index, dense_keys.contiguous(), dense_values.contiguous())

    def _whole(self, index: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Whole K and V, right wherever they go; a layer that hands them on untouched is given pages from then on."""
        if self.pool.reads_pages:
            watch(key_states, value_states, functools.partial(self.pool.page_readers.add, index))
        return key_states, value_states

    @bookkeeping
    def end_step(self) -> None:
        """Fuse the blocks that the forward pass has filled (called by the pool's forward hook)."""
        self._announced = (None, None)
        if not self.tables or any(layer.length != self.length for layer in self.paged_layers):
            return
        start = time.perf_counter()
        try:
            self._fuse()
        except Exception as error:
            self.pool.disable_fusion(error)
        self.pool.seconds_fusing += time.perf_counter() - start

    def _advance(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for the new tokens in every group, or raise PoolFull with nothing changed."""
        rows, _, new, _ = key_states.shape
        blocks = self.pool.prepare(key_states, value_states)
        mask, input_ids = self._announced
        if not self.tables:
            self._start(rows)
        if rows != len(self.padding):
            raise LayoutError(f"{rows} sequences for a cache of {len(self.padding)}")
        length = self.length + new
        padding = self._extended_padding(mask, new)
        tail = self.length - self.padding
        partial = (tail % self.pool.block_size > 0).nonzero().squeeze(1)
        slot = tail[partial] // self.pool.block_size
        needed = -(-(length - padding) // self.pool.block_size)
        count = sum(table.missing_blocks(needed) + table.count_shared(partial, slot) for table in self.tables)
        missing = blocks.missing(count)
        if missing:
            self._roll_back(self.length)
            raise PoolFull(missing, count, blocks.max_pages or 0)
        for table in self.tables:
            if len(partial):
                pages = table.make_writable(partial, slot)
                for fuser in self.pool.fusers.values():
                    fuser.forget(pages)
            table.extend(needed)
        self.padding = padding
        self._note_text(mask, input_ids, new)
        self._fresh = self.length == 0
        self._reads_prompt = new > 1
        self.length = length
        device = key_states.device
        self._slots = [
            token_slots(table.pages, self.pool.block_size, self.padding, length).to(device) for table in self.tables
        ]
        inside = torch.arange(length - new, length) >= self.padding[:, None]
        self._padded_step = None if inside.all() else inside.flatten().nonzero().squeeze(1).to(device)

    def _roll_back(self, length: int) -> None:
        """Undo a forward pass that was refused or broke off; `length` tokens were there before it."""
        for layer, before in self._sliding_before:
            layer.__dict__.update(before)
        self._truncate(length)
        if not length:
            self.tables = []
            self._clear()

    def _truncate(self, length: int) -> None:
        """Keep the first `length` tokens in the paged layers."""
        self.length = length
        self.padding = self.padding.clamp(max=length)
        left = length - self.padding
        for table in self.tables:
            table.truncate(-(-left // self.pool.block_size))
        self._considered = torch.minimum(self._considered, left // self.pool.block_size)
        self.tokens = None if self.tokens is None else self.tokens[:, :length]
        for layer in self.paged_layers:
            layer.length = length

    def _extended_padding(self, mask: Tensor | None, new: int) -> Tensor:
        """Left padding per row after this step: a row that has no token yet may go on with padding."""
        if mask is None or mask.shape != (len(self.padding), self.length + new):
            return self.padding
        leading = (mask[:, self.length :].cpu().long().cumsum(1) == 0).sum(1)
        return self.padding + leading * (self.padding == self.length)

    def _start(self, rows: int) -> None:
        assert self.pool.blocks is not None
        self.tables = [BlockTable(self.pool.blocks, rows) for _ in range(self.pool.groups.count)]
        self.padding = torch.zeros(rows, dtype=torch.long)
        self._considered = torch.zeros(rows, dtype=torch.long)
        self.fusable = torch.ones(rows, dtype=torch.bool)
        self._sequence = self.pool.new_sequences(rows)
        keys = self.isolation_key
        if isinstance(keys, list) and len(keys) != rows:
            self.tables = []
            raise LayoutError(f"{len(keys)} isolation keys for {rows} sequences")

    def _note_text(self, mask: Tensor | None, input_ids: Tensor | None, new: int) -> None:
        """Keep the token ids while they are known; rows with masked tokens after their start are never fused."""
        if mask is not None and mask.shape[1] >= new:
            seen = mask[:, -new:].cpu().bool()
            begun = torch.arange(self.length, self.length + new) >= self.padding[:, None]
            self.fusable &= (seen | ~begun).all(1)
        if self.pool.policy.candidates == "signature" or not self.pool.policy.enabled:
            return
        known = input_ids is not None and input_ids.shape == (len(self.padding), new)
        if not known or (self.tokens is None and self.length > 0):
            self.tokens = None
        else:
            assert input_ids is not None
            past = [] if self.tokens is None else [self.tokens]
            self.tokens = torch.cat([*past, input_ids.cpu()], 1)

    def _scales(self, group: int, member: int) -> tuple[Tensor | None, Tensor | None]:
        table = self.tables[group]
        if table.k_scale is None or table.v_scale is None:
            return None, None
        device = self._slots[group].device
        k, v = (
            token_scales(scale[member], self.pool.block_size, self.padding, self.length).to(device)
            for scale in (table.k_scale, table.v_scale)
        )
        return k, v

    # Fusion of the blocks that have filled since the last step.

    def _fuse(self) -> None:
        full = (self.length - self.padding) // self.pool.block_size
        first, self._considered = self._considered, full
        if not self.pool.fusers or not (full > first).any():
            return
        slots = torch.arange(int(full.max()))
        filled = (slots >= first[:, None]) & (slots < full[:, None]) & self.fusable[:, None]
        row, slot = filled.nonzero(as_tuple=True)
        tokens = self._hashes(row, slot)
        for scope, fuser in self.pool.fusers.items():
            for group, table in enumerate(self.tables):
                if self.pool.groups.fused[group]:
                    keys, which = self._buckets(scope, group, row, slot)
                    plan = fuser.fuse(table, NewBlocks(row, slot, keys, which, tokens), group)
                    if self._reads_prompt:
                        self.pool.observe(group, len(row), plan)

    def _buckets(self, scope: str, group: int, row: Tensor, slot: Tensor) -> tuple[list[Hashable], Tensor]:
        """Buckets of blocks: equal positions of one tenant, or equal places in the chunks of one request."""
        names: list[tuple[Hashable, ...]]
        if scope == "chunk":
            slot = slot % (self.pool.policy.chunk_tokens // self.pool.block_size)
            owner, names = row, [("chunk", self._tenant(i), number) for i, number in enumerate(self._sequence.tolist())]
        else:
            tenants = [self._tenant(i) for i in range(len(self.padding))]
            place = {tenant: index for index, tenant in enumerate(dict.fromkeys(tenants))}
            owner, names = torch.tensor([place[tenant] for tenant in tenants])[row], [("batch", t) for t in place]
        pairs, which = torch.stack((owner, slot), 1).unique(dim=0, return_inverse=True)
        return [(*names[i], group, place) for i, place in pairs.tolist()], which

    def _tenant(self, row: int) -> Hashable:
        keys = self.isolation_key
        return keys[row] if isinstance(keys, list) else keys  # type: ignore[return-value]

    def _hashes(self, row: Tensor, slot: Tensor) -> Tensor | None:
        if self.tokens is None:
            return None
        size = self.pool.block_size
        column = self.padding[row, None] + slot[:, None] * size + torch.arange(size)
        return token_hashes(self.tokens[row[:, None], column], size).squeeze(-1)

    # Operations on the whole cache.

    @bookkeeping
    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens: `-n` drops `n`; a positive number is the length to keep (as in transformers)."""
        keep = self.length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, self.length)
        keep = max(0, keep)
        for layer in self.other_layers:
            layer.crop(keep - self.length)
        if keep < self.length:
            self._truncate(keep)

    def reset(self) -> None:
        """Give every page back and start empty."""
        for layer in self.other_layers:
            layer.reset()
        for layer in self.paged_layers:
            layer.length, layer.is_initialized = 0, False
        self.isolation_key = self._given_key
        self.tables = []
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes what row `beam_idx[i]` was; shared pages are copied when somebody writes to them."""
        self._select(beam_idx, "reorder_cache", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` only."""
        rows = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        self._select(rows, "batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies share their pages."""
        rows = torch.arange(len(self.padding)).repeat_interleave(repeats)
        self._select(rows, "batch_repeat_interleave", repeats)

    @bookkeeping
    def _select(self, rows: Tensor, method: str, argument: Any) -> None:
        for layer in self.other_layers:
            getattr(layer, method)(argument)
        if not self.tables:
            return
        rows = rows.cpu()
        for table in self.tables:
            table.select(rows)
        self.padding, self._considered = self.padding[rows], self._considered[rows]
        self.fusable = self.fusable[rows]
        self.tokens = None if self.tokens is None else self.tokens[rows]
        self._sequence = self.pool.new_sequences(len(rows))
        if isinstance(self.isolation_key, list):
            self.isolation_key = [self.isolation_key[row] for row in rows.tolist()]

    def __deepcopy__(self, memo: dict[int, Any]) -> JointCache:
        """A cache that reads the same pages; either one copies a page before it writes to it."""
        twin = JointCache(self.pool, self._given_key)
        twin.isolation_key = copy.copy(self.isolation_key)
        for name in ("length", "padding", "_considered", "fusable", "tokens"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        twin._sequence = self.pool.new_sequences(len(self.padding))
        for table in self.tables:
            twin.tables.append(BlockTable(table.pool, table.num_rows))
            twin.tables[-1].adopt_copy(table)
        for mine, theirs in zip(self.paged_layers, twin.paged_layers, strict=True):
            theirs.length, theirs.is_initialized = mine.length, mine.is_initialized
        for mine, theirs in zip(self.other_layers, twin.other_layers, strict=True):
            theirs.__dict__.update(copy.deepcopy(mine.__dict__, memo))
        return twin

    # What it holds.

    @property
    def references(self) -> int:
        """Blocks held, counted once per (row, slot) and layer group: the pages an unfused cache would need."""
        return sum(len(table.held()) for table in self.tables)

    @property
    def pages(self) -> int:
        """Distinct pages that hold them; other caches may read the same ones."""
        held = [table.held() for table in self.tables]
        return len(torch.cat(held).unique()) if held else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct pages."""
        return self.pages * self.pool.blocks.kv.page_nbytes if self.pool.blocks else 0

    def stats(self) -> dict[str, Any]:
        """Sequences, tokens, references, pages and bytes of this cache; `pool.stats()` has the whole memory's."""
        tokens = int((self.length - self.padding).sum())
        return {
            "sequences": max(0, self.batch_size),
            "tokens": tokens,
            "references": self.references,
            "pages": self.pages,
            "bytes": self.nbytes,
            "ratio": self.references / self.pages if self.pages else 1.0,
        }

    def save(self, path: Path | str) -> None:
        """Write pages, tables and scales to a safetensors file."""
        from jointkv.hf.saving import save_cache

        save_cache(self, path)

    @classmethod
    def load(cls, path: Path | str, pool: JointPool, isolation_key: Hashable | list[Hashable] = "") -> JointCache:
        """Read what `save` wrote into pages of `pool`.

        Raises:
            BadInput: no saved cache, or a damaged one.
            ModelMismatch: it belongs to another model, or to another block size or layer grouping.
            PoolFull: too few pages are free; nothing was taken.
        """
        from jointkv.hf.saving import load_cache

        return load_cache(cls(pool, isolation_key), path)

    @bookkeeping
    def restore(self, length: int, tensors: dict[str, Tensor]) -> None:
        """Take over a saved cache (see `jointkv.hf.saving`), then fuse its blocks into what is resident.

        Raises:
            PoolFull: too few pages are free; the cache stays empty.
        """
        states = (tensors[name].transpose(1, 2)[:1, :, :0].to(self.pool.device) for name in ("key.0", "value.0"))
        blocks = self.pool.prepare(*states)
        self._start(len(tensors["padding"]))
        try:
            pages = blocks.allocate(len(tensors["key.0"]))
        except PoolFull:
            self.tables = []
            raise
        for index in range(self.pool.groups.layers):
            blocks.kv.keys[index][pages] = tensors[f"key.{index}"].to(blocks.kv.device)
            blocks.kv.values[index][pages] = tensors[f"value.{index}"].to(blocks.kv.device)
        self.length, self.padding, self.fusable = length, tensors["padding"], tensors["fusable"]
        if self.pool.policy.enabled and self.pool.policy.candidates != "signature":
            self.tokens = tensors.get("tokens")
        for group, table in enumerate(self.tables):
            local = tensors[f"table.{group}"]
            adopted = local.clone()
            adopted[local >= 0] = pages[local[local >= 0]]
            scales = (tensors.get(f"{side}_scale.{group}") for side in "kv")
            table.adopt(adopted, tensors[f"served.{group}"], *scales)
        blocks.free(pages)
        for layer in self.paged_layers:
            layer.length, layer.is_initialized = length, True
        self.end_step()

    def check_integrity(self) -> None:
        """Raises IntegrityError when a table, the pool or an index is inconsistent."""
        for table in self.tables:
            table.check_integrity()
        self.pool.check_integrity()
