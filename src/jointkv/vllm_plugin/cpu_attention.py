"""vLLM's CPU attention, with pages that several requests read taken once for all of them where that is faster.

Registered over `CPU_ATTN` while a worker of this plugin loads its model, see `registered`. Until `share_reading` has
made sure of the page layout, and after any error, it is vLLM's own attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.attention import selector
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from jointkv.attention import reference
from jointkv.attention.cpu import paged_attention
from jointkv.attention.layouts import LayerPages
from jointkv.attention.work import WorkList
from jointkv.plan import BlockRef

if TYPE_CHECKING:
    from jointkv.vllm_plugin.shared_reading import SharedReading


@contextmanager
def registered() -> Iterator[None]:
    """Let models that are loaded meanwhile use this backend. Other engines of the process are left alone."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{JointAttentionBackend.__qualname__}")
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        selector._cached_get_attn_backend.cache_clear()


@dataclass
class JointMetadata(CPUAttentionMetadata):
    """vLLM's, the work of the step where shared-page attention does it, and factors `[2, layers, rows, slots]`."""

    work: WorkList | None = None
    factors: Tensor | None = None


class JointMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's, and what reads what."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """See `CPUAttentionMetadataBuilder`."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        layers = self.vllm_config.compilation_config.static_forward_context
        reading = getattr(layers[self.layer_names[0]].impl, "reading", None)
        if reading is None or stock.causal is not True or stock.dynamic_causal is not None:
            return stock
        work, factors = reading.step(common_attn_metadata)
        known = {field.name: getattr(stock, field.name) for field in fields(stock)}
        return JointMetadata(**known, work=work, factors=factors)


class JointAttention(CPUAttentionBackendImpl):
    """vLLM's, and shared-page attention for the steps that come with a work list.

    Attributes:
        pages: of this layer, once their layout is known.
        reading: of its KV-cache group.
        place: of this layer in the group.
    """

    pages: LayerPages
    reading: SharedReading
    place: int

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        """See `CPUAttentionBackendImpl`."""
        if isinstance(attn_metadata, JointMetadata):
            count = attn_metadata.num_actual_tokens
            answer = self._shared(query[:count], attn_metadata)
            if answer is not None:
                output[:count] = answer.view_as(output[:count])
                return output
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **options)

    def _shared(self, query: Tensor, metadata: JointMetadata) -> Tensor | None:
        """Attention of `query [n, heads, d]`; None where the engine is to do it."""
        factors = (None, None) if metadata.factors is None else metadata.factors[:, self.place]
        if metadata.work is not None and self.reading.fault is None:
            try:
                k_scale, v_scale = factors
                return paged_attention(
                    query, self.pages, metadata.work, k_scale=k_scale, v_scale=v_scale, scale=self.scale
                )[0]
            except Exception as error:
                self.reading.switch_off(error)
        return (
            None if metadata.factors is None else self._by_definition(query, metadata, metadata.factors[:, self.place])
        )

    def _by_definition(self, query: Tensor, metadata: JointMetadata, factors: Tensor) -> Tensor:
        """Slow, and with nothing that may have failed: without its factors a block would be read as a wrong one."""
        size, tables = self.reading.block_size, []
        used = -(-metadata.max_seq_len // size)
        there = torch.arange(used) * size < metadata.seq_lens[:, None]
        pages, local = metadata.block_table[:, :used].masked_fill(~there, 0).long().unique(return_inverse=True)
        for row, length in enumerate(metadata.seq_lens.tolist()):
            k_scale, v_scale = factors[:, row].tolist()
            tables.append(
                [
                    BlockRef(int(local[row, slot]), k_scale[slot], v_scale[slot], count=min(size, length - slot * size))
                    for slot in range(-(-length // size))
                ]
            )
        asked = metadata.query_start_loc.diff().tolist()
        return reference.paged_attention(query, asked, *self.pages.read(pages), tables, scale=self.scale)[0]


class JointAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU backend with the parts above."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """See `AttentionBackend`."""
        return JointAttention

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """See `AttentionBackend`."""
        return JointMetadataBuilder
