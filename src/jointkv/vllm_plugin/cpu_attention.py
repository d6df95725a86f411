"""vLLM's CPU attention, with pages that several requests read taken once for all of them where that is faster.

Registered over `CPU_ATTN` while a worker of this plugin loads its model, see `registered`. Until `share_pages` has made
sure of the page layout, and after any error, it is vLLM's own attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.logger import init_logger
from vllm.v1.attention import selector
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from jointkv import native
from jointkv.attention.cpu import SOURCE, paged_attention
from jointkv.attention.grouping import group_pages
from jointkv.attention.layouts import LayerPages
from jointkv.attention.switch import Switch, measure
from jointkv.attention.work import WorkList
from jointkv.errors import LayoutError
from jointkv.vllm_plugin.pages import PROBED_PAGE

logger = init_logger(f"vllm.{__name__}")


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


class SharedReading:
    """What the layers of one KV-cache group have in common.

    Args:
        switch: when to do it; None for always.
        block_size: tokens per page.
        group: query heads per KV head.

    Attributes:
        steps, shared_steps: built, and those of them that shared-page attention does.
        fault: why it is off, if it is.
    """

    def __init__(self, switch: Switch | None, block_size: int, group: int) -> None:
        self.switch, self.block_size, self.group = switch, block_size, group
        self.steps = self.shared_steps = 0
        self.fault: str | None = None
        self._work: WorkList | None = None
        self._tables = torch.zeros(0, 0, dtype=torch.int32)

    def work(self, common: CommonAttentionMetadata) -> WorkList | None:
        """The work of this step; None where the engine's attention is to do it."""
        if self.fault is not None:
            return None
        self.steps += 1
        try:
            work = self._grown(common) or self._grouped(common)
        except Exception as error:
            self.switch_off(error)
            return None
        if self.switch is not None and not self.switch.pays(work):
            return None
        self.shared_steps += 1
        return work

    def switch_off(self, error: Exception) -> None:
        """Leave attention to the engine from now on. Logged once."""
        if self.fault is None:
            self.fault = f"{type(error).__name__}: {error}"
            logger.error("shared-page attention is off until the engine is restarted: %s", self.fault)
            logger.debug("where it happened", exc_info=True)

    def _grown(self, common: CommonAttentionMetadata) -> WorkList | None:
        """The last work list, if only the last blocks of its sequences have grown."""
        tables = common.block_table_tensor
        if self._work is None or common.max_query_len > 1 or not torch.equal(tables, self._tables):
            return None
        try:
            self._work.grow(common.seq_lens)
        except LayoutError:
            return None
        return self._work

    def _grouped(self, common: CommonAttentionMetadata) -> WorkList:
        used = -(-common.max_seq_len // self.block_size)
        self._work = None
        starts = common.query_start_loc_cpu
        self._work = group_pages(
            common.block_table_tensor[:, :used],
            common.seq_lens,
            self.block_size,
            query_lengths=starts[1:] - starts[:-1],
            heads_per_kv_head=self.group,
        )
        self._tables = common.block_table_tensor.clone()
        return self._work


@dataclass
class JointMetadata(CPUAttentionMetadata):
    """vLLM's, and the work of the step where shared-page attention does it."""

    work: WorkList | None = None


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
        known = {field.name: getattr(stock, field.name) for field in fields(stock)}
        return JointMetadata(**known, work=reading.work(common_attn_metadata))


class JointAttention(CPUAttentionBackendImpl):
    """vLLM's, and shared-page attention for the steps that come with a work list.

    Attributes:
        pages: of this layer, once their layout is known.
        reading: of its KV-cache group.
    """

    pages: LayerPages
    reading: SharedReading

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
        if isinstance(attn_metadata, JointMetadata) and attn_metadata.work is not None and self.reading.fault is None:
            try:
                count = attn_metadata.num_actual_tokens
                answer = paged_attention(query[:count], self.pages, attn_metadata.work, scale=self.scale)[0]
                output[:count] = answer.view_as(output[:count])
                return output
            except Exception as error:
                self.reading.switch_off(error)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **options)


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


def share_pages(layers: list[Any], block_size: int, longest: int, measured: bool) -> SharedReading:
    """Let `layers` of one KV-cache group, whose caches are bound and unused, read shared pages once.

    Args:
        layers: vLLM `Attention` modules.
        longest: tokens of a sequence at the most.
        measured: do it only where a measurement, taken here, says that it is faster.

    Raises:
        LayoutError: a layer's attention has something that the kernel was not written for; nothing has changed.
        NativeUnavailable: no compiler, and so no kernel.
    """
    native.load(SOURCE)
    found = [_pages(layer) for layer in layers]
    impl = layers[0].impl
    group = impl.num_heads // impl.num_kv_heads
    switch = _measured(layers[0], found[0], block_size, longest) if measured else None
    reading = SharedReading(switch, block_size, group)
    for layer, pages in zip(layers, found, strict=True):
        layer.impl.pages, layer.impl.reading = pages, reading
    logger.info("shared pages are read once for all requests%s", "" if switch is None else f" where it pays: {switch}")
    return reading


def _pages(layer: Any) -> LayerPages:
    """Raises `LayoutError` unless the kernel computes what `layer` asks for, from pages as it believes them to be."""
    impl = layer.impl
    if not isinstance(impl, JointAttention):
        raise LayoutError(f"{type(impl).__name__} is not the attention of this plugin")
    special = {
        "a sliding window": impl.sliding_window != -1,
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap": impl.logits_soft_cap != 0,
        "attention sinks": impl.sinks is not None,
        "fp8 pages": impl.is_fp8_kv_cache,
    }
    for name, there in special.items():
        if there:
            raise LayoutError(f"shared-page attention was not written for {name}")
    pages = LayerPages.of_engine(layer.kv_cache, layer.isa)
    pages.confirm(
        lambda *written: impl.do_kv_cache_update(layer, *written[:2], layer.kv_cache, written[2]), PROBED_PAGE
    )
    return pages


def _measured(layer: Any, pages: LayerPages, block_size: int, longest: int) -> Switch:
    """Times vLLM's op and the shared kernel on the layer's own pages."""
    impl = layer.impl

    def queries(count: int) -> Tensor:
        return torch.zeros(count, impl.num_heads, impl.head_size, dtype=pages.dtype)

    def engine(tables: Tensor, lengths: Tensor, asked: Tensor) -> Callable[[], object]:
        starts = torch.cat((torch.zeros(1, dtype=torch.int32), asked.cumsum(0, dtype=torch.int32)))
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(asked),
            num_heads=impl.num_heads,
            num_kv_heads=impl.num_kv_heads,
            head_dim=impl.head_size,
            seq_lens=lengths,
            dtype=pages.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        query = queries(int(asked.sum()))
        metadata = CPUAttentionMetadata(
            num_actual_tokens=len(query),
            max_query_len=int(asked.max()),
            query_start_loc=starts,
            max_seq_len=int(lengths.max()),
            seq_lens=lengths,
            block_table=tables,
            slot_mapping=lengths,
            scheduler_metadata=plan,
        )
        return lambda: impl.forward(layer, query, query, query, layer.kv_cache, metadata, torch.empty_like(query))

    def shared(work: WorkList) -> object:
        return paged_attention(queries(work.num_queries), pages, work, scale=impl.scale)

    return measure(pages.num_pages, block_size, longest, engine, shared, impl.num_heads // impl.num_kv_heads)
