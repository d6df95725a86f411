"""One forward pass over a batch: what was announced of it, where its tokens go, and what attention reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from jointkv.attention.tokens import write_tokens
from jointkv.core.blocks import PagedKV
from jointkv.hf.attention import PagedLayer, attach_pages, watch
from jointkv.hf.batch import Batch
from jointkv.hf.gradients import refusal
from jointkv.hf.states import check_states


@dataclass
class Step:
    """A forward pass.

    All that depends on tables is in tensors once `advance` has returned, so that a compiler can follow `write`, and
    finds nothing in its graph that differs between two steps of decoding.

    Attributes:
        start: tokens of each row that were there before.
        mask, input_ids: as the model was given them, where that is known.
        other_layers: layers with transformers' own cache, and what they held before.
        new: tokens of each row that have places; 0 before `advance`.
        layers: pages of each full-attention layer, and where all tokens lie in them.
        places: where the new tokens go that are no padding, `[n]` by layer group.
        written: which of the new tokens, `[rows * new]` flattened, these are; None for all.
        fresh: whether nothing was there before.
        lost: refuses gradients to what was there before; None where they are not lost.
        differentiable: whether the new tokens were computed with gradients.
    """

    start: int = 0
    mask: Tensor | None = None
    input_ids: Tensor | None = None
    other_layers: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    new: int = 0
    layers: list[PagedLayer] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    written: Tensor | None = None
    fresh: bool = True
    lost: Tensor | None = None
    differentiable: bool = False

    @property
    def prompt(self) -> bool:
        """Whether more than one token a row is read."""
        return self.new > 1

    @property
    def length(self) -> int:
        """Tokens of each row, the new ones included; of a tensor, because compilers let sizes of tensors vary."""
        return self.layers[0].slots.shape[1] if self.layers else self.start

    @property
    def past(self) -> int:
        """Tokens of each row without the new ones."""
        return 0 if self.fresh else self.length - self.new

    def takes(self, states: Tensor) -> bool:
        """Whether there are places for the tokens of `states [rows, h, n, d]`."""
        return self.new == states.shape[2] and self.layers[0].slots.shape[0] == states.shape[0]

    def advance(self, batch: Batch, new: int) -> None:
        """Give `batch` pages for `new` more tokens a row. Raises PoolFull: it is as before."""
        assert batch.pool.blocks is not None
        self.lost = None if batch.differentiable_from is None else refusal()
        written = batch.extend(new, self.mask, self.input_ids)
        self.new, self.fresh = new, self.start == 0
        kv = batch.pool.blocks.kv
        _expect_other_sizes(kv)
        self.written = None if written is None else written.to(kv.device)
        self.layers, self.places = [], []
        for group, slots in enumerate(batch.slots):
            torch._dynamo.maybe_mark_dynamic(slots, 1)
            places = slots[:, batch.length - new :].flatten()
            self.places.append(places.contiguous() if self.written is None else places[self.written])
            for member, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
                self.layers.append(PagedLayer(keys, values, slots, *batch.scales(group, member)))

    def follow(self, kv: PagedKV) -> None:
        """Write to `kv` from here on: another forward pass inside of this one may have made the pool grow."""
        if self.layers[0].keys is not kv.keys[0]:
            pages = list(zip(kv.keys, kv.values, strict=True))
            for index, layer in enumerate(self.layers):
                keys, values = pages[index % len(pages)]
                self.layers[index] = replace(layer, keys=keys, values=values)

    def carry(self, kv: PagedKV) -> None:
        """Bring to `kv` what was written where pages were before the pool grew: a compiled model cannot `follow`.

        To be called once, when all layers have written.
        """
        if self.places and self.layers[0].keys is not kv.keys[0]:
            for index, layer in enumerate(self.layers):
                group, member = divmod(index, len(kv.keys))
                for old, new in ((layer.keys, kv.keys[member]), (layer.values, kv.values[member])):
                    new.flatten(0, 1)[self.places[group]] = old.flatten(0, 1)[self.places[group]]
        self.places = []

    def write(
        self, batch: Batch, index: int, key_states: Tensor, value_states: Tensor, dense: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Write the new states `[rows, h, n, d]` of a full-attention layer; returns what attention is to be given.

        Once a layer is known to hand them on untouched, pages ride on its keys; until then, and where `dense` asks for
        it, K and V are dense. They have the dtypes of the states, whatever the pages have.
        """
        pool, paged = batch.pool, self.layers[index]
        check_states(paged.keys, paged.values, key_states, value_states)
        places = self.places[index // pool.groups.layers]
        for pages, states in ((paged.keys, key_states), (paged.values, value_states)):
            tokens = states.transpose(1, 2).flatten(0, 1)
            tokens = tokens if self.written is None else tokens[self.written]
            write_tokens(pages, places, tokens.to(pages.dtype))
        if not self.fresh:
            if not dense and pool.reads_pages and index in pool.page_readers:
                return attach_pages(key_states, paged), value_states
            whole = zip(paged.read(), (key_states, value_states), strict=True)
            key_states, value_states = (side.to(states.dtype).contiguous() for side, states in whole)
        if not dense and pool.reads_pages:
            watch(key_states, value_states, functools.partial(pool.page_readers.add, index))
        return key_states, value_states


def _expect_other_sizes(kv: PagedKV) -> None:
    """Tell torch's compiler that there may be other numbers of pages, so that it does not compile for each."""
    if not hasattr(kv.keys[0], "_dynamo_weak_dynamic_indices"):
        for layer in (*kv.keys, *kv.values):
            torch._dynamo.maybe_mark_dynamic(layer, 0)
