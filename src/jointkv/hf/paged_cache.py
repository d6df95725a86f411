"""What every cache on pages of a pool does: one forward pass after another, and pages that are there already."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Hashable, Sequence
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from jointkv.core.blocks import PagedKV
from jointkv.core.table import BlockTable
from jointkv.errors import BadInput, LayoutError, PoolFull, UnsupportedUse
from jointkv.hf.batch import Batch
from jointkv.hf.fusing import fuse_filled
from jointkv.hf.gradients import attach_gradients
from jointkv.hf.layer import PagedCacheLayer
from jointkv.hf.pool import JointPool
from jointkv.hf.states import check_place
from jointkv.hf.step import Step
from jointkv.hf.threads import alone


class PagedCache(Cache):
    """The layers of a `JointCache`, which see; each forward pass writes to pages, and fuses what it has filled.

    Attributes:
        paged_layers, other_layers: those whose K and V lie in pages, and those that keep transformers' own cache.
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
            # A tensor is found by its identity alone, and not-a-number never: whoever gives one means its content.
            if isinstance(key, Tensor) or key != key:
                raise BadInput(f"an isolation key must equal what is made of the same content; got {key!r}")
        self.pool, self.isolation_key = pool, isolation_key
        paged = {layer: index for index, layer in enumerate(pool.full_layers)}
        stock = DynamicCache(config=pool.config).layers
        layers = [PagedCacheLayer(self, paged[i]) if i in paged else layer for i, layer in enumerate(stock)]
        super().__init__(layers=layers)
        self.paged_layers = [layer for layer in layers if isinstance(layer, PagedCacheLayer)]
        self.other_layers = [layer for layer in layers if not isinstance(layer, PagedCacheLayer)]
        self.waits = False
        self._clear()

    def _clear(self) -> None:
        self.batch = Batch(self.pool)
        self._set_length(0)

    @property
    def lock(self) -> threading.RLock:
        """That of the pool."""
        return self.pool.lock

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

    @alone
    def begin_step(
        self,
        attention_mask: Tensor | None,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        """Note the padding and the text of the coming forward pass, and make room for its tokens where they are known.

        Called by the pool's forward hook. Tokens without room get it from the first layer that writes.

        Raises:
            LayoutError: mask or positions are not those of tokens behind the ones in the cache.
            PoolFull: nothing has changed.
            UnsupportedUse: the forward pass before this one was interrupted; the cache is as before that.
        """
        if self._undo_what_broke_off():
            # The first layers held more than the others, and whoever has asked them leaves out what these lack.
            raise UnsupportedUse(
                f"a forward pass was interrupted, and the cache holds {self.length} tokens again, as before it: go on "
                "behind those, or with a new cache"
            )
        inputs = inputs_embeds if input_ids is None else input_ids
        if inputs is not None:
            check_place(self.length, inputs.shape[1], attention_mask, position_ids)
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            attention_mask = None
        others = [(layer, copy.copy(layer.__dict__)) for layer in self.other_layers]
        self._step = Step(self.length, attention_mask, input_ids, others)
        if inputs is not None and self.pool.blocks is not None and len(inputs) == (len(self.batch) or len(inputs)):
            self._make_room(*inputs.shape[:2])
        self.pool.attention.on()

    def write_layer(self, layer: PagedCacheLayer, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new states; called by `PagedCacheLayer.update`. Gradients flow to these states alone."""
        if torch.compiler.is_compiling():  # a lock would end the graph; see `Step.carry`
            return self._write_layer(layer, key_states, value_states, True)
        with self.lock:
            return self._write_layer(layer, key_states, value_states, False)

    def _write_layer(
        self, layer: PagedCacheLayer, key_states: Tensor, value_states: Tensor, compiling: bool
    ) -> tuple[Tensor, Tensor]:
        if not layer.expecting or not self._step.takes(key_states):
            if compiling and not self.tables:
                # The pool's first forward pass, whose shapes nobody knows: it must not break the graph either.
                layer.pending = key_states, value_states
                return layer.pending
            self._advance(layer, key_states, value_states)
        step = self._step
        if not compiling and self.pool.blocks is not None:
            step.follow(self.pool.blocks.kv)
        new = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        differentiable = new or (torch.is_grad_enabled() and step.lost is not None)
        with torch.no_grad():
            key, value = step.write(self.batch, layer.index, key_states, value_states, compiling or differentiable)
        layer.expecting = False
        if not differentiable:
            return key, value
        step.differentiable = step.differentiable or new
        if step.fresh:
            return key_states, value_states
        return attach_gradients(key, key_states, step.lost), attach_gradients(value, value_states, step.lost)

    def length_of(self, layer: PagedCacheLayer) -> int:
        """Tokens that a layer holds."""
        return self._step.past if layer.expecting else self._step.length

    @alone
    def read_layer(self, layer: PagedCacheLayer) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """A copy of one layer's K and V `[rows, h, length, d]`; None before there are any."""
        if not self.tables:
            return None, None
        keys, values = (side[:, :, : layer.length] for side in self.batch.read(layer.index))
        return keys, values

    def end_step(self) -> None:
        """Fuse the blocks that the forward pass has filled (called by the pool's forward hook, also if it failed)."""
        pending = [(layer, layer.pending) for layer in self.paged_layers if layer.pending is not None]
        if len(pending) == len(self.paged_layers):
            for layer, states in pending:
                layer.pending = None
                self.write_layer(layer, *states)
        self._end_step()

    @alone
    def _end_step(self) -> None:
        self.pool.attention.off()
        self._undo_what_broke_off()
        if self.pool.blocks is not None:
            self._step.carry(self.pool.blocks.kv)
        self._note_gradients()
        self._step.mask = self._step.input_ids = None
        if not self.waits and self.tables:
            self.fuse(self._step.prompt)

    @alone
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

    @torch.compiler.disable
    @alone
    def _advance(self, layer: PagedCacheLayer, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for new tokens that were not announced, or not as they are, at the first layer that has them."""
        self.pool.prepare(key_states, value_states)
        step = self._step
        if layer.expecting:
            self._truncate(step.start)
            self._step = Step(step.start, step.mask, step.input_ids, step.other_layers)
        elif step.layers:
            self._note_gradients()
            self._step = Step(self.length)
        self._make_room(key_states.shape[0], key_states.shape[2])

    def _make_room(self, rows: int, new: int) -> None:
        """Give the new tokens pages in every group, or raise PoolFull with nothing changed."""
        if not self.tables:
            self._begin(rows)
        elif not self.length:  # it was cropped to nothing, and begins anew
            self.pool.notice_weights()
            self.batch.weights = self.pool.weights
        if rows != len(self.batch):
            raise LayoutError(f"{rows} sequences for a cache of {len(self.batch)}")
        try:
            self._step.advance(self.batch, new)
        except PoolFull:
            self._roll_back()
            raise
        for layer in self.paged_layers:
            layer.expecting = True

    def _note_gradients(self) -> None:
        if self._step.differentiable and self.batch.differentiable_from is None:
            self.batch.differentiable_from = self._step.start

    @alone
    def _undo_what_broke_off(self) -> bool:
        """Undo a forward pass that has not come to the last layer; whether there was one."""
        broke_off = any(layer.expecting or layer.pending for layer in self.paged_layers)
        if broke_off:
            self._roll_back()
        return broke_off

    def _roll_back(self) -> None:
        """Make the cache what it was before the forward pass."""
        step = self._step
        for layer, before in step.other_layers:
            layer.__dict__.update(before)
        self._truncate(step.start)
        if not step.start:
            self._clear()

    def _truncate(self, length: int) -> None:
        """Keep the first `length` tokens in the paged layers."""
        self.batch.truncate(length)
        self._set_length(length)

    def _set_length(self, length: int) -> None:
        self._step = Step(length, fresh=not length)
        for layer in self.paged_layers:
            layer.expecting, layer.pending = False, None

    # Pages that are there already.

    @alone
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

    @alone
    def write(self, blocks: PagedKV, tokens: Tensor) -> None:
        """Let the only sequence go on with copies of `blocks`; arguments and errors as of `Batch.write`."""
        if not self.tables:
            self._begin(1)
        self.batch.write(blocks, tokens)
        self._set_length(self.batch.length)

    @alone
    def join(self, rows: Sequence[PagedCache], length: int) -> None:
        """Make the sequences of `rows`, padded on the left to `length` tokens, the content of this empty cache."""
        for row in rows:
            if not row.tables:
                row._begin(1)
        self.batch = Batch.join([row.batch for row in rows], length)
        self._set_length(length)
