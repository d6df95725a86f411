"""Quantised pages, each page once: fusion combined with quantisation, and the same quantiser without fusion."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor

from jointkv.errors import BadInput
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.dense import LayerStates
from jointkv.evaluate.holding.held import HeldBatch, RebuiltBatch
from jointkv.evaluate.methods.base import Method
from jointkv.evaluate.methods.packing import BITS, Packed, pack
from jointkv.policy import FusionPolicy, Scope

BOUND = 0.2
"""Error bound of the fusion under `fused_quantized`: that of the preset `safe`."""

TOKENS, CHANNELS = 1, 3
"""Dimensions of a page `[pages, t, h, d]`."""


class QuantizedPages(Method):
    """Full blocks quantised as in KIVI (arXiv 2402.02750), one block per group; the last, partial block stays as it is.

    K has a scale and an offset per channel of each block, V one per token and head. Both are held as packed bytes and
    turned back into numbers whenever they are read.

    Args:
        name: name in tables.
        policy: what to fuse before quantising; representatives must be resident pages.
    """

    levels = tuple(float(bits) for bits in BITS)
    level_means = "bits"
    allowed = "8, 4, 2"

    def __init__(
        self,
        name: str = "quantized_pages",
        policy: FusionPolicy | None = None,
        description: str = "KIVI-like quantisation of blocks: K per channel, V per token and head, one block per group",
    ) -> None:
        self.name, self.description = name, description
        self._policy = policy or FusionPolicy.preset("off")
        self.shares_across_requests = self._policy.enabled
        if self._policy.enabled and self._policy.representative != "resident":
            raise BadInput(f"{name}: only resident representatives are quantised, not {self._policy.representative!r}")

    def in_scope(self, scope: Scope) -> QuantizedPages:
        twin = copy.copy(self)
        twin._policy = dataclasses.replace(self._policy, scope=scope)
        return twin

    def allows(self, level: float) -> bool:
        return level in BITS

    def compress(self, batch: Batch, level: float) -> HeldBatch:
        from jointkv.evaluate.holding.fused import FusedBatch

        fused = FusedBatch(batch.model, batch.prefilled, self._policy)
        return PackedBatch(batch, fused.cache.state(), int(level))


class FusedQuantized(QuantizedPages):
    """Fusion under the preset `safe`, then quantisation of the pages that are left."""

    def __init__(self) -> None:
        policy = FusionPolicy.preset("safe", max_relative_error=BOUND)
        description = f"fusion at relative error {BOUND:g}, then the quantisation of `quantized_pages`"
        super().__init__("fused_quantized", policy, description)


class PackedBatch(RebuiltBatch):
    """Distinct full pages as packed codes; the partial block of each request in the model's dtype."""

    counted = "tensors"

    def __init__(self, batch: Batch, state: dict[str, Tensor], bits: int) -> None:
        super().__init__(batch.model, batch.lengths)
        self._full = [length // batch.block_size for length in batch.lengths]
        groups = sum(name.startswith("table.") for name in state)
        members = sum(name.startswith("key.") for name in state)
        self._layers: list[tuple[Packed, Packed]] = []
        self._tables: list[Tensor] = []
        self._tails: list[LayerStates] = [[] for _ in batch.lengths]
        for group in range(groups):
            table = state[f"table.{group}"]
            full = torch.arange(table.shape[1]) < torch.tensor(self._full)[:, None]
            kept, local = table[full].unique(return_inverse=True)
            renumbered = torch.full_like(table, -1).masked_scatter(full, local)
            for member in range(members):
                keys, values = state[f"key.{member}"], state[f"value.{member}"]
                self._layers.append((pack(keys[kept], TOKENS, bits), pack(values[kept], CHANNELS, bits)))
                self._tables.append(renumbered)
                for row, length in enumerate(batch.lengths):
                    slot = min(self._full[row], table.shape[1] - 1)  # any page will do for a tail without tokens
                    page, tokens = table[row, slot, None], length % batch.block_size
                    tail = (_as_states(pages[page], tokens) for pages in (keys, values))
                    self._tails[row].append(tuple(tail))  # type: ignore[arg-type]
        self.nbytes_packed = sum(keys.nbytes + values.nbytes for keys, values in self._layers)
        self.nbytes = self.nbytes_packed + sum(k.nbytes + v.nbytes for tail in self._tails for k, v in tail)

    def rebuild(self, request: int) -> LayerStates:
        states = []
        for layers, table, tail in zip(self._layers, self._tables, self._tails[request], strict=True):
            pages = table[request, : self._full[request]]
            k, v = (_as_states(packed.select(pages).read(self.model.dtype)) for packed in layers)
            states.append((torch.cat((k, tail[0]), 2), torch.cat((v, tail[1]), 2)))
        return states


def _as_states(pages: Tensor, tokens: int | None = None) -> Tensor:
    """The first `tokens` tokens of pages `[n, t, h, d]` as states `[1, h, n * t, d]`; a copy."""
    return pages.flatten(0, 1)[:tokens].transpose(0, 1)[None].contiguous()
