"""What every cache on pages of a pool does: one forward pass after another, and pages that are there already."""

from __future__ import annotations

import copy
import time
from collections.abc import Hashable, Sequence
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from jointkv.core.blocks import PagedKV
from jointkv.core.bookkeeping import bookkeeping
from jointkv.core.table import BlockTable
from jointkv.errors import BadInput, LayoutError, PoolFull, UnsupportedUse
from jointkv.hf.batch import Batch
from jointkv.hf.fusing import fuse_filled
from jointkv.hf.gradients import attach_gradients
from jointkv.hf.layer import PagedCacheLayer
from jointkv.hf.pool import JointPool
from jointkv.hf.step import Step


class PagedCache(Cache):
    """The layers of a `JointCache`, which see; each forward pass writes to pages, and fuses what it has filled.

    Attributes:
        waits: whether blocks are fused when `fuse` is called only.
    """

    def __init__(self, pool: JointPool, isolation_key: Hashable | list[Hashable] = "") -> None:
        if not isinstance(pool, JointPool):
            raise UnsupportedUse(
                f"a cache needs a JointPool, not a {type(pool).__name__}: JointCache(JointPool(model))"
            )
        for key in isolation_key if isinstance(isolation_key, list) else [isolation_key]:
            try:
                hash(key)
            except TypeError as error:
                raise BadInput(f"an isolation key must be hashable, such as text: {error}") from None
        self.pool, self.isolation_key = pool, isolation_key
        paged = {layer: index for index, layer in enumerate(pool.full_layers)}
        stock = DynamicCache(config=pool.config).layers
        layers = [PagedCacheLayer(self, paged[i]) if i in paged else layer for i, layer in enumerate(stock)]
        super().__init__(layers=layers)
        self.waits = False
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
        self.pool.attention.on()

    # A compiled model reads and writes pages between its graphs: inside, each table would ask for a graph of its own.
    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return key, value

    def write_layer(self, layer: PagedCacheLayer, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new states; called by `PagedCacheLayer.update`. Gradients flow to these states alone."""
        states = key_states, value_states
        new = any(side.requires_grad for side in states)
        if not torch.is_grad_enabled() or not (new or self.batch.differentiable_from is not None):
            return self._write(layer, *states)
        whole = self._write(layer, *states, dense=True)
        if new and self.batch.differentiable_from is None:
            self.batch.differentiable_from = self._step.start
        if self._step.fresh:
            return states
        lost = self.batch.differentiable_from is not None and self.batch.differentiable_from < self._step.start
        key, value = (attach_gradients(*sides, lost) for sides in zip(whole, states, strict=True))
        return key, value

    @bookkeeping
    def _write(
        self, layer: PagedCacheLayer, key_states: Tensor, value_states: Tensor, dense: bool = False
    ) -> tuple[Tensor, Tensor]:
        if layer.length == self.length:
            self._advance(key_states, value_states)
        whole = self._step.write(self.batch, layer.index, key_states, value_states, dense)
        layer.length, layer.is_initialized = self.length, True
        return whole

    @bookkeeping
    def read_layer(self, layer: PagedCacheLayer) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """A copy of one layer's K and V `[rows, h, length, d]`; None before there are any."""
        if not self.tables:
            return None, None
        keys, values = (side[:, :, : layer.length] for side in self.batch.read(layer.index))
        return keys, values

    @bookkeeping
    def end_step(self) -> None:
        """Fuse the blocks that the forward pass has filled (called by the pool's forward hook, also if it failed)."""
        self.pool.attention.off()
        self._step.mask = self._step.input_ids = None
        if not self.waits and self.tables and all(layer.length == self.length for layer in self.paged_layers):
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
        self.pool.notice_weights()
        self.batch = Batch(self.pool, self.tenants(rows))

    def tenants(self, rows: int) -> list[Hashable]:
        """The isolation key of each of `rows` sequences. Raises LayoutError: there are others."""
        given = self.isolation_key
        tenants = given if isinstance(given, list) else [given] * rows
        if len(tenants) != rows:
            raise LayoutError(
                f"{len(tenants)} isolation keys for {rows} sequences: one key for all, or one for each; num_beams and "
                "num_return_sequences repeat each prompt, one copy beside the other, and its key as often"
            )
        return tenants

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise UnsupportedUse(
            "a JointCache cannot be pickled, because other caches read its pages: JointCache.save and JointCache.load "
            "write and read a file, copy.deepcopy makes a second cache on the same pages"
        )

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

    # Pages that are there already.

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
    def write(self, blocks: PagedKV, tokens: Tensor) -> None:
        """Let the only sequence go on with copies of `blocks`; arguments and errors as of `Batch.write`."""
        if not self.tables:
            self._begin(1)
        self.batch.write(blocks, tokens)
        self._set_length(self.batch.length)

    @bookkeeping
    def join(self, rows: Sequence[PagedCache], length: int) -> None:
        """Make the sequences of `rows`, padded on the left to `length` tokens, the content of this empty cache."""
        for row in rows:
            if not row.tables:
                row._begin(1)
        self.batch = Batch.join([row.batch for row in rows], length)
        self._set_length(length)
