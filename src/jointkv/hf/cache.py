"""`JointCache`: a cache for `model.generate(past_key_values=...)` whose pages come from a shared pool."""

from __future__ import annotations

import copy
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from jointkv.core.bookkeeping import bookkeeping
from jointkv.core.table import BlockTable
from jointkv.errors import BadInput, LayoutError, PoolFull
from jointkv.hf import saving
from jointkv.hf.batch import Batch
from jointkv.hf.fusing import fuse_filled
from jointkv.hf.layer import PagedCacheLayer
from jointkv.hf.pool import JointPool
from jointkv.hf.prefill import PrefillResult, prefill_rows, prompts_of
from jointkv.hf.step import Step


class JointCache(Cache):
    """KV cache of one batch of sequences, on pages of a `JointPool`.

    Blocks are fused when a forward pass has filled them: those of a prompt after its (chunk of) prefill, generated
    ones as they fill. Left padding is not stored. Sliding-window layers keep transformers' own cache layer.

    Args:
        pool: shared pages and policy.
        isolation_key: tenant: blocks are compared only inside one key. Any hashable value for all rows, or a list with
            one per row.

    Attributes:
        batch: block tables, and what else is known of the sequences.

    Raises:
        LayoutError: the number of isolation keys differs from the rows of the batch (at the first forward pass).
        PoolFull: from a forward pass that needs more pages than the pool can give; the cache is as before.
    """

    def __init__(self, pool: JointPool, isolation_key: Hashable | list[Hashable] = "") -> None:
        self.pool, self.isolation_key = pool, isolation_key
        paged = {layer: index for index, layer in enumerate(pool.full_layers)}
        stock = DynamicCache(config=pool.config).layers
        layers = [PagedCacheLayer(self.write_layer, paged[i]) if i in paged else layer for i, layer in enumerate(stock)]
        super().__init__(layers=layers)
        self._waits = False
        self._clear()

    def _clear(self) -> None:
        self.batch = Batch(self.pool)
        self._step = Step()

    @property
    def paged_layers(self) -> list[PagedCacheLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedCacheLayer)]

    @property
    def other_layers(self) -> list[Any]:
        """The layers that keep transformers' own cache."""
        return [layer for layer in self.layers if not isinstance(layer, PagedCacheLayer)]

    @property
    def batch_size(self) -> int:
        return len(self.batch) if self.tables else -1

    @property
    def tables(self) -> list[BlockTable]:
        """The block table of each layer group; none before the first forward pass."""
        return self.batch.tables

    @property
    def length(self) -> int:
        """Tokens per row, left padding included."""
        return self.batch.length

    @property
    def padding(self) -> Tensor:
        """Tokens of left padding, `[rows]`."""
        return self.batch.padding

    # One forward pass: begin_step, write_layer once per layer, end_step.

    @bookkeeping
    def begin_step(self, attention_mask: Tensor | None, input_ids: Tensor | None) -> None:
        """Note the padding and the text of the coming forward pass (called by the pool's forward hook)."""
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            attention_mask = None
        written = min(layer.length for layer in self.paged_layers)
        if written < self.length:  # the last forward pass broke off between two layers
            self._roll_back(written)
        others = [(layer, copy.copy(layer.__dict__)) for layer in self.other_layers]
        self._step = Step(attention_mask, input_ids, others)

    @bookkeeping
    def write_layer(self, layer: PagedCacheLayer, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new states; called by `PagedCacheLayer.update`."""
        if layer.length == self.length:
            self._advance(key_states, value_states)
        whole = self._step.write(self.batch, layer.index, key_states, value_states)
        layer.length, layer.is_initialized = self.length, True
        return whole

    @bookkeeping
    def end_step(self) -> None:
        """Fuse the blocks that the forward pass has filled (called by the pool's forward hook)."""
        self._step.mask = self._step.input_ids = None
        if not self._waits and self.tables and all(layer.length == self.length for layer in self.paged_layers):
            self.fuse(self._step.prompt)

    @bookkeeping
    def fuse(self, observe: bool = False) -> None:
        """Fuse the blocks that became full since the last time; see `fuse_filled`."""
        start = time.perf_counter()
        try:
            fuse_filled(self.batch, observe)
        except Exception as error:
            self.pool.disable_fusion(error)
        self.pool.seconds_fusing += time.perf_counter() - start

    def _begin(self, rows: int) -> None:
        self.batch = Batch(self.pool, self._tenants(rows))

    def _tenants(self, rows: int) -> list[Hashable]:
        given = self.isolation_key
        tenants = given if isinstance(given, list) else [given] * rows
        if len(tenants) != rows:
            raise LayoutError(f"{len(tenants)} isolation keys for {rows} sequences")
        return tenants

    def _advance(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for the new tokens in every group, or raise PoolFull with nothing changed."""
        rows, _, new, _ = key_states.shape
        self.pool.prepare(key_states, value_states)
        if not self.tables:
            self._begin(rows)
        if rows != len(self.batch):
            raise LayoutError(f"{rows} sequences for a cache of {len(self.batch)}")
        try:
            self._step.advance(self.batch, new, key_states.device)
        except PoolFull:
            self._roll_back(self.length)
            raise

    def _roll_back(self, length: int) -> None:
        """Undo a forward pass that was refused or broke off; `length` tokens were there before it."""
        for layer, before in self._step.other_layers:
            layer.__dict__.update(before)
        self._truncate(length)
        if not length:
            self._clear()

    def _truncate(self, length: int) -> None:
        """Keep the first `length` tokens in the paged layers."""
        self.batch.truncate(length)
        for layer in self.paged_layers:
            layer.length = length

    def _set_length(self, length: int) -> None:
        for layer in self.paged_layers:
            layer.length, layer.is_initialized = length, True

    # Reading what is resident before it is computed.

    @bookkeeping
    def prefill(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> PrefillResult:
        """Prefill this empty cache, reading what is resident instead of computing it, as the pool's `reuse` allows.

        `model.generate(input_ids=..., attention_mask=..., past_key_values=cache)` then goes on as ever: all but the
        last token of each row are there. Rows are prefilled one after another, and reuse those before them. In a pool
        without reuse nothing is done, and `generate` computes all.

        Args:
            input_ids, attention_mask: `[rows, length]`, padded on the left.

        Raises:
            BadInput: the cache is not empty, or a row has no token.
            LayoutError: other shapes, or padding elsewhere.
            PoolFull: the cache stays empty.
        """
        if self.length:
            raise BadInput(f"prefill: the cache holds {self.length} tokens already")
        prompts = prompts_of(input_ids, attention_mask)
        return prefill_rows(self, model, prompts, self._tenants(len(prompts)), input_ids.shape[1] - 1)

    def row(self, tenant: Hashable) -> JointCache:
        """An empty cache of one sequence on the same pool, which fuses when it is told to."""
        row = JointCache(self.pool, [tenant])
        row._waits = True
        return row

    @bookkeeping
    def adopt(self, pages: Tensor, tokens: Tensor, exact: bool) -> None:
        """Let the only sequence, which ends with a full block, go on with resident `pages [n]`.

        Args:
            tokens: what they hold, `[n * block_size]`.
            exact: whether its own K and V would be those of the pages.
        """
        if not self.tables:
            self._begin(1)
        self.batch.adopt(pages, tokens, exact)
        self._set_length(self.batch.length)

    @bookkeeping
    def join(self, rows: Sequence[JointCache], length: int) -> None:
        """Make the sequences of `rows`, padded on the left to `length` tokens, the content of this empty cache."""
        for row in rows:
            if not row.tables:
                row._begin(1)
        self.batch = Batch.join([row.batch for row in rows], length)
        self._set_length(length)

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
        self._select(torch.arange(len(self.batch)).repeat_interleave(repeats), "batch_repeat_interleave", repeats)

    @bookkeeping
    def _select(self, rows: Tensor, method: str, argument: Any) -> None:
        for layer in self.other_layers:
            getattr(layer, method)(argument)
        if self.tables:
            self.batch.select(rows.cpu())

    def __deepcopy__(self, memo: dict[int, Any]) -> JointCache:
        """A cache that reads the same pages; either one copies a page before it writes to it."""
        twin = JointCache(self.pool, self.isolation_key)
        twin.batch = self.batch.copy()
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
        return {
            "sequences": max(0, self.batch_size),
            "tokens": int((self.length - self.padding).sum()),
            "references": self.references,
            "pages": self.pages,
            "bytes": self.nbytes,
            "ratio": self.references / self.pages if self.pages else 1.0,
        }

    def check_integrity(self) -> None:
        """Raises IntegrityError when a table, the pool or an index is inconsistent."""
        for table in self.tables:
            table.check_integrity()
        self.pool.check_integrity()

    # Leaving the pool and coming back.

    def save(self, path: Path | str) -> None:
        """Write pages, tables and scales to a safetensors file. Raises BadInput: empty, or it cannot be written."""
        if not self.tables:
            raise BadInput(f"{path}: an empty cache cannot be saved")
        saving.write(path, self._layout(), self.length, self.state())

    @classmethod
    def load(cls, path: Path | str, pool: JointPool, isolation_key: Hashable | list[Hashable] = "") -> JointCache:
        """Read what `save` wrote into pages of `pool`.

        Raises:
            BadInput: no saved cache, or a damaged one.
            ModelMismatch: it belongs to another model, or to another block size or layer grouping.
            PoolFull: too few pages are free; nothing was taken.
        """
        cache = cls(pool, isolation_key)
        cache.restore(*saving.read(path, cache._layout()))
        return cache

    def state(self) -> saving.State:
        """What a cache that is not empty holds."""
        state = self.batch.state()
        for index, layer in self._sliding():
            state[f"sliding.{index}.keys"], state[f"sliding.{index}.values"] = layer.keys, layer.values
        return state

    @bookkeeping
    def restore(self, length: int, state: saving.State) -> None:
        """Make `state`, of sequences of `length` tokens, the content of this empty cache, and fuse it.

        Raises:
            PoolFull: too few pages are free; the cache stays empty.
        """
        self.pool.prepare(*(state[name].transpose(1, 2)[:1].to(self.pool.device) for name in ("key.0", "value.0")))
        self._begin(len(state["padding"]))
        try:
            self.batch.restore(length, state)
        except PoolFull:
            self._clear()
            raise
        self._set_length(length)
        for index, layer in self._sliding():
            keys, values = state[f"sliding.{index}.keys"], state[f"sliding.{index}.values"]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values, layer.cumulative_length = keys, values, length
        self.end_step()

    def _sliding(self) -> list[tuple[int, DynamicSlidingWindowLayer]]:
        return [(i, layer) for i, layer in enumerate(self.layers) if isinstance(layer, DynamicSlidingWindowLayer)]

    def _layout(self) -> saving.Layout:
        pool = self.pool
        return saving.Layout(
            model=pool.fingerprint,
            block_size=pool.block_size,
            layers_per_group=pool.groups.layers,
            layer_groups=pool.groups.count,
            dtype=str(pool.blocks.kv.dtype if pool.blocks else pool.dtype),
            sliding=tuple(index for index, _ in self._sliding()),
        )
