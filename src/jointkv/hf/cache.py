"""`JointCache`: a cache for `model.generate(past_key_values=...)` whose pages come from a shared pool."""

from __future__ import annotations

import copy
import operator
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from jointkv.errors import BadInput, LayoutError, PoolFull, UnsupportedUse
from jointkv.hf import saving
from jointkv.hf.paged_cache import PagedCache
from jointkv.hf.pool import JointPool
from jointkv.hf.prefill import prefill_rows, prompts_of
from jointkv.hf.prefill_result import PrefillResult
from jointkv.hf.row_steps import Forward
from jointkv.hf.saving import FromFile
from jointkv.hf.threads import alone
from jointkv.system.values import check_whole


class JointCache(PagedCache):
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

    @property
    def batch_size(self) -> int:
        return len(self.batch) if self.tables else -1

    # Reading what is resident before it is computed.

    def prefill(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> PrefillResult:
        """Prefill this empty cache, reading what is resident instead of computing it, as the pool's `reuse` allows.

        `model.generate(input_ids=..., attention_mask=..., past_key_values=cache)` then goes on as ever: all but the
        last token of each row are there. Rows are prefilled one after another, and reuse those before them. In a pool
        without reuse, and with a model in training mode, nothing is done, and `generate` computes all. What is computed
        is so under the autocast that is on, which reads nothing that was computed under another, and never with
        gradients.

        Args:
            input_ids, attention_mask: `[rows, length]`, padded on the left.

        Raises:
            BadInput: the cache is not empty, or a row has no token.
            LayoutError: no tensors of token ids, other shapes, or padding elsewhere.
            UnsupportedUse: `model` is not the one whose pages these are, or keeps nothing in its cache.
            PoolFull: the cache stays empty.
        """
        self._undo_what_broke_off()
        if self.length:
            raise BadInput(f"prefill: the cache holds {self.length} tokens already")
        if not isinstance(model, nn.Module):
            raise UnsupportedUse(f"prefill needs the model of the pool, not a {type(model).__name__}")
        prompts = prompts_of(input_ids, attention_mask)
        return prefill_rows(self, Forward(model), prompts, self.tenants(len(prompts)), input_ids.shape[1] - 1)

    # Operations on the whole cache.

    @alone
    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens: `-n` drops `n`; a positive number is the length to keep (as in transformers).

        Raises BadInput for what is no whole number.
        """
        try:
            tokens_to_remove = operator.index(tokens_to_remove)  # transformers 5.16 gives a tensor
        except TypeError:
            raise BadInput(f"crop: {tokens_to_remove!r} is not a whole number of tokens") from None
        self._undo_what_broke_off()
        keep = self.length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, self.length)
        keep = max(0, keep)
        if keep == self.length:
            return
        for layer in self.other_layers:
            layer.crop(keep - self.length)
        self._truncate(keep)

    def reset(self) -> None:
        """Give every page back and start empty."""
        for layer in self.other_layers:
            layer.reset()
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes what row `beam_idx[i]` was; shared pages are copied when somebody writes to them.

        Raises LayoutError for what does not name rows, as do the two below. The cache is as before.
        """
        self._select(beam_idx, "reorder_cache", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` only."""
        chosen = isinstance(indices, Tensor) and indices.dtype == torch.bool and len(indices) == len(self.batch)
        self._select(indices.nonzero().squeeze(1) if chosen else indices, "batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies share their pages."""
        check_whole("repeats", repeats, 0, LayoutError)
        self._select(torch.arange(len(self.batch)).repeat_interleave(repeats), "batch_repeat_interleave", repeats)

    @alone
    def _select(self, rows: Tensor, method: str, argument: Any) -> None:
        self._undo_what_broke_off()
        rows = self._rows(method, rows)
        for layer in self.other_layers:
            getattr(layer, method)(argument)
        if self.tables:
            self.batch.select(rows)

    def _rows(self, method: str, rows: Tensor) -> Tensor:
        """`rows` on the CPU. Raises LayoutError unless there are such."""
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.long, torch.int) or rows.dim() != 1:
            raise LayoutError(f"{method}: a tensor with numbers of rows is needed, not {rows!r}")
        rows, count = rows.cpu(), len(self.batch)
        if self.tables and ((rows < 0) | (rows >= count)).any():
            raise LayoutError(f"{method}: rows are numbered from 0 to {count - 1}, got {rows.tolist()}")
        return rows

    def __deepcopy__(self, memo: dict[int, Any]) -> JointCache:
        """A cache that reads the same pages; either one copies a page before it writes to it."""
        with self.lock:
            self._undo_what_broke_off()
            twin = JointCache(self.pool, self.isolation_key)
            twin.batch = self.batch.copy()
        twin._set_length(self.length)
        for mine, theirs in zip(self.other_layers, twin.other_layers, strict=True):
            # Tensors with gradients cannot be copied deeply.
            for name, value in vars(mine).items():
                vars(theirs)[name] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value, memo)
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
        """Write pages, tables, scales and isolation keys to a safetensors file.

        Raises:
            BadInput: the cache is empty, it cannot be written, or a key is not text, a whole number, None or a tuple.
        """
        self._undo_what_broke_off()
        if not self.tables:
            raise BadInput(f"{path}: an empty cache cannot be saved")
        saving.write(path, self._layout(), self.batch.tenants, self.length, self.state())

    @classmethod
    def load(
        cls, path: Path | str, pool: JointPool, isolation_key: Hashable | list[Hashable] = FromFile.KEY
    ) -> JointCache:
        """Read what `save` wrote into pages of `pool`, under the isolation key it was saved with or another one.

        Raises:
            BadInput: no saved cache, or a damaged one, or one that an older release saved without its key.
            ModelMismatch: it belongs to another model, or to another block size or layer grouping.
            UnsupportedUse: `pool` is something else.
            PoolFull: too few pages are free; nothing was taken.
        """
        if isinstance(pool, JointPool):  # anything else is refused next
            pool.notice_weights()
        cache = cls(pool, isolation_key)
        keys, length, state = saving.read(path, cache._layout())
        if isolation_key is FromFile.KEY:
            if keys is None:
                raise BadInput(f"{path}: saved without its isolation key: say load(path, pool, isolation_key=...)")
            cache.isolation_key = keys[0] if len(set(keys)) == 1 else keys
        cache.restore(length, state)
        return cache

    def state(self) -> saving.State:
        """What a cache that is not empty holds."""
        self._undo_what_broke_off()
        state = self.batch.state()
        for index, layer in self._sliding():
            state[f"sliding.{index}.keys"], state[f"sliding.{index}.values"] = layer.keys, layer.values
        return state

    @alone
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
            model=self.batch.weights.fingerprint,
            block_size=pool.block_size,
            layers_per_group=pool.groups.layers,
            layer_groups=pool.groups.count,
            dtype=str(pool.blocks.kv.dtype if pool.blocks else pool.dtype),
            sliding=tuple(index for index, _ in self._sliding()),
        )
