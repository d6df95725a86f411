"""vLLM's CPU attention, with pages that several requests read taken once for all of them where that is faster.

Registered over `CPU_ATTN` while a worker of this plugin loads its model: the CPU platform knows no other backend.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from jointkv.attention.cpu import SOURCE
from jointkv.attention.layouts import LayerPages
from jointkv.attention.paged import paged_attention
from jointkv.attention.switch import Switch, measure
from jointkv.attention.work import WorkList
from jointkv.system import native
from jointkv.vllm_plugin.attention.backend import JointAttention, JointBuilder, JointMetadata
from jointkv.vllm_plugin.attention.install import override


def registered() -> AbstractContextManager[None]:
    """Let models that are loaded meanwhile use this backend."""
    return override("CPU_ATTN", JointCPUBackend)


@dataclass
class JointCPUMetadata(JointMetadata, CPUAttentionMetadata):
    """vLLM's, and what reads what."""


class JointCPUBuilder(JointBuilder, CPUAttentionMetadataBuilder):
    """vLLM's, and what reads what."""

    metadata = JointCPUMetadata


class JointCPUAttention(JointAttention, CPUAttentionBackendImpl):
    """vLLM's, and the compiled kernel of `jointkv.attention.cpu`."""

    kernel = staticmethod(paged_attention)

    def layout(self, layer: Any) -> LayerPages:
        """See `LayerPages.of_engine`."""
        return LayerPages.of_engine(layer.kv_cache, layer.isa)

    def special(self, layer: Any) -> dict[str, bool]:
        """Fp8 pages have scales of their own."""
        return {"fp8 pages": self.is_fp8_kv_cache}

    def prepare(self, pages: LayerPages) -> None:
        """Raises `NativeUnavailable`: no compiler, and so no kernel."""
        native.load(SOURCE)

    def threads(self, pages: LayerPages) -> None:
        """Torch's number of them."""

    def measured(self, layer: Any, pages: LayerPages, longest: int) -> Switch:
        """Times vLLM's op and the shared kernel on the layer's own pages."""

        def queries(count: int) -> Tensor:
            return torch.zeros(count, self.num_heads, self.head_size, dtype=pages.dtype)

        def engine(tables: Tensor, lengths: Tensor, asked: Tensor) -> Callable[[], object]:
            query, metadata = queries(int(asked.sum())), self._metadata(layer, tables, lengths, asked)
            return lambda: self.forward(layer, query, query, query, layer.kv_cache, metadata, torch.empty_like(query))

        def shared(work: WorkList) -> object:
            return self.attend(queries(work.num_queries), pages, work)

        return measure(pages.num_pages, pages.block_size, longest, engine, shared, self.num_heads // self.num_kv_heads)

    def _metadata(self, layer: Any, tables: Tensor, lengths: Tensor, asked: Tensor) -> CPUAttentionMetadata:
        """vLLM's, for block tables `[rows, slots]`, lengths `[rows]` and query lengths `[rows]`."""
        starts = torch.cat((torch.zeros(1, dtype=torch.int32), asked.cumsum(0, dtype=torch.int32)))
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(asked),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            seq_lens=lengths,
            dtype=layer.kv_cache.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        return CPUAttentionMetadata(
            num_actual_tokens=int(asked.sum()),
            max_query_len=int(asked.max()),
            query_start_loc=starts,
            max_seq_len=int(lengths.max()),
            seq_lens=lengths,
            block_table=tables,
            slot_mapping=lengths,
            scheduler_metadata=plan,
        )


class JointCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend with the parts above."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """See `AttentionBackend`."""
        return JointCPUAttention

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """See `AttentionBackend`."""
        return JointCPUBuilder
