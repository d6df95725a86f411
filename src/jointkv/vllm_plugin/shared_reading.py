"""Which steps of an engine are done by attention that reads shared pages once, and what it needs to know for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig

from jointkv import native
from jointkv.attention.cpu import SOURCE, paged_attention
from jointkv.attention.grouping import group_pages
from jointkv.attention.layouts import LayerPages
from jointkv.attention.switch import Switch, measure
from jointkv.attention.work import WorkList
from jointkv.errors import IntegrityError, LayoutError
from jointkv.vllm_plugin.cpu_attention import JointAttention
from jointkv.vllm_plugin.norms import OwnNorms
from jointkv.vllm_plugin.pages import PROBED_PAGE
from jointkv.vllm_plugin.settings import PluginSettings

logger = init_logger(f"vllm.{__name__}")


class SharedReading:
    """What the layers of one KV-cache group have in common.

    Args:
        runner: vLLM's model runner, whose batch is asked for who is in which row.
        group: number of the KV-cache group.
        block_size: tokens per page.
        heads_per_kv_head: query heads that share a KV head.
        switch: when it is faster; None for always.
        norms: of blocks that keep their own.

    Attributes:
        steps, shared_steps: built, and those of them that shared-page attention does.
        fault: why it is off, if it is.
    """

    def __init__(
        self,
        runner: Any,
        group: int,
        block_size: int,
        heads_per_kv_head: int,
        switch: Switch | None = None,
        norms: OwnNorms | None = None,
    ) -> None:
        self.runner, self.group, self.block_size = runner, group, block_size
        self.heads_per_kv_head, self.switch, self.norms = heads_per_kv_head, switch, norms
        self.steps = self.shared_steps = 0
        self.fault: str | None = None
        self._work: WorkList | None = None
        self._tables = torch.zeros(0, 0, dtype=torch.int32)

    def step(self, common: CommonAttentionMetadata) -> tuple[WorkList | None, Tensor | None]:
        """The work of a step, None where the engine's attention is to do it, and the factors of its tables."""
        used = -(-common.max_seq_len // self.block_size)
        factors = None
        if self.norms is not None:
            names = self.runner.input_batch.req_ids[: common.num_reqs]
            if len(names) != len(common.block_table_tensor):
                raise IntegrityError("the rows of the step are not those of the batch, and so nobody's norms are known")
            factors = self.norms.table(self.group, names, common.block_table_tensor[:, :used])
        if self.fault is not None:
            return None, factors
        self.steps += 1
        try:
            work = self._grown(common) or self._grouped(common, used)
        except Exception as error:
            self.switch_off(error)
            return None, factors
        if factors is None and self.switch is not None and not self.switch.pays(work):
            return None, None
        self.shared_steps += 1
        return work, factors

    def switch_off(self, error: Exception) -> None:
        """Leave attention to the engine from now on, but for requests that need their factors. Logged once."""
        if self.fault is None:
            self.fault = f"{type(error).__name__}: {error}"
            if self.norms is not None:
                self.norms.enabled = False
            logger.error("shared-page attention is off until the engine is restarted: %s", self.fault)
            logger.debug("where it happened", exc_info=True)

    def _grown(self, common: CommonAttentionMetadata) -> WorkList | None:
        """The last work list, if only the last blocks of its sequences have grown."""
        if self._work is None or common.max_query_len > 1 or not torch.equal(common.block_table_tensor, self._tables):
            return None
        try:
            self._work.grow(common.seq_lens)
        except LayoutError:
            return None
        return self._work

    def _grouped(self, common: CommonAttentionMetadata, used: int) -> WorkList:
        self._work = None
        starts = common.query_start_loc_cpu
        self._work = group_pages(
            common.block_table_tensor[:, :used],
            common.seq_lens,
            self.block_size,
            query_lengths=starts[1:] - starts[:-1],
            heads_per_kv_head=self.heads_per_kv_head,
        )
        self._tables = common.block_table_tensor.clone()
        return self._work


def share_reading(
    runner: Any, config: KVCacheConfig, groups: Sequence[int], settings: PluginSettings
) -> tuple[dict[int, SharedReading], OwnNorms | None]:
    """Let the layers of KV-cache `groups`, whose caches are bound and unused, read shared pages once.

    Args:
        runner: vLLM's model runner; attention of its layers is changed.
        config: of the KV cache, as the connector was given it.
        groups: by number.

    Returns:
        What the layers of each group share, and the norms of blocks where the settings ask for them.

    Raises:
        LayoutError: a layer's attention has something that the kernel was not written for.
        NativeUnavailable: no compiler, and so no kernel. Nothing has changed after either.
    """
    native.load(SOURCE)
    layers = {number: _layers(runner, config, number) for number in groups}
    pages = {number: [_pages(layer) for layer in held] for number, held in layers.items()}
    norms = OwnNorms(max(map(len, layers.values()))) if settings.own_norms else None
    measured = settings.attention == "auto" and not settings.own_norms
    readings = {}
    for number, held in layers.items():
        impl, size = held[0].impl, config.kv_cache_groups[number].kv_cache_spec.block_size
        switch = _measured(held[0], pages[number][0], size, runner.max_model_len) if measured else None
        readings[number] = SharedReading(runner, number, size, impl.num_heads // impl.num_kv_heads, switch, norms)
        logger.info(
            "shared pages are read once for all requests%s", "" if switch is None else f" where it pays: {switch}"
        )
    for number, held in layers.items():
        for place, layer in enumerate(held):
            layer.impl.pages, layer.impl.place, layer.impl.reading = pages[number][place], place, readings[number]
    return readings, norms


def _layers(runner: Any, config: KVCacheConfig, number: int) -> list[Any]:
    """The layers of a group. Raises `LayoutError` where others read its pages too, or not all of its tokens."""
    group = config.kv_cache_groups[number]
    if runner.kv_cache_config.kv_cache_groups[number].layer_names != group.layer_names:
        raise LayoutError("other layers read the K and V of this group as well")
    if getattr(group.kv_cache_spec, "attention_chunk_size", None) is not None:
        raise LayoutError("shared-page attention was not written for chunked local attention")
    known = runner.compilation_config.static_forward_context
    return [known[name] for name in group.layer_names]


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
