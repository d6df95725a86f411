"""Which steps of an engine are done by attention that reads shared pages once, and what it needs to know for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig

from jointkv.attention.grouping import group_pages
from jointkv.attention.layouts import LayerPages
from jointkv.attention.switch import Switch
from jointkv.attention.work import WorkList
from jointkv.errors import IntegrityError, LayoutError
from jointkv.vllm_plugin.attention.backend import JointAttention
from jointkv.vllm_plugin.attention.norms import OwnNorms
from jointkv.vllm_plugin.engine.pages import PROBED_PAGE
from jointkv.vllm_plugin.settings import PluginSettings

logger = init_logger(f"vllm.{__name__}")


class SharedReading:
    """What the layers of one KV-cache group have in common.

    Args:
        runner: vLLM's model runner, whose batch is asked for who is in which row.
        group: number of the KV-cache group.
        pages: of its first layer.
        heads_per_kv_head: query heads that share a KV head.
        threads: what work is cut for; see `group_pages`.
        switch: when it is faster; None for always.
        norms: of blocks that keep their own.

    Attributes:
        block_size: tokens per page.
        steps, shared_steps: built, and those of them that shared-page attention does.
        fault: why it is off, if it is.
    """

    def __init__(
        self,
        runner: Any,
        group: int,
        pages: LayerPages,
        heads_per_kv_head: int,
        threads: int | None = None,
        switch: Switch | None = None,
        norms: OwnNorms | None = None,
    ) -> None:
        self.runner, self.group, self.block_size, self._device = runner, group, pages.block_size, pages.device
        self.heads_per_kv_head, self.threads, self.switch, self.norms = heads_per_kv_head, threads, switch, norms
        self.steps = self.shared_steps = 0
        self.fault: str | None = None
        self._work: WorkList | None = None
        self._tables = torch.zeros(0, 0, dtype=torch.int32)
        self._factors: tuple[Tensor, Tensor] | None = None

    def step(self, common: CommonAttentionMetadata) -> tuple[WorkList | None, Tensor | None]:
        """The work of a step, None where the engine's attention is to do it, and the factors of its tables.

        Tables and lengths are vLLM's on the host, from which it makes those on the device: taking them waits for
        nothing. The lengths are exact without speculative decoding, which `check_engine` refuses.

        Raises:
            IntegrityError: nobody knows which blocks of the step have factors, or factors are lost.
        """
        batch, used = self.runner.input_batch, -(-common.max_seq_len // self.block_size)
        if len(batch.req_ids) != common.num_reqs:  # a warm-up, or a part of the batch
            return self.pass_over("the rows of the step are not those of the batch")
        tables = torch.from_numpy(batch.block_table[self.group].block_table.np[: common.num_reqs])
        known = None if self.norms is None else self.norms.table(self.group, batch.req_ids, tables[:, :used])
        factors = None if known is None else self._at_pages(known)
        if self.fault is not None:
            return None, factors
        self.steps += 1
        try:
            lengths = common.seq_lens if (exact := common.seq_lens_cpu_upper_bound) is None else exact
            work = self._grown(tables, lengths, common) or self._grouped(tables, lengths, common, used)
        except Exception as error:
            self.switch_off(error)
            return None, factors
        if factors is None and self.switch is not None and not self.switch.pays(work):
            return None, None
        self.shared_steps += 1
        return work, factors

    def pass_over(self, why: str) -> tuple[None, None]:
        """Leave a step to the engine. Raises `IntegrityError` where it may read blocks that have factors."""
        if self.norms is not None and len(self.norms):
            raise IntegrityError(f"{why}, and so nobody's norms are known")
        return None, None

    def switch_off(self, error: Exception) -> None:
        """Leave attention to the engine from now on, but for requests that need their factors. Logged once."""
        if self.fault is None:
            self.fault = f"{type(error).__name__}: {error}"
            if self.norms is not None:
                self.norms.enabled = False
            logger.error("shared-page attention is off until the engine is restarted: %s", self.fault)
            logger.debug("where it happened", exc_info=True)

    def _at_pages(self, known: Tensor) -> Tensor:
        """Factors `[2, layers, rows, slots]` on the device: the same tensor while they are the same.

        Kernels check each version of a table once, which waits for the device; they cannot tell versions of tensors
        that were made in inference mode.
        """
        if self._factors is None or not torch.equal(known, self._factors[0]):
            with torch.inference_mode(False):
                self._factors = known, known.to(self._device, copy=True)
        return self._factors[1]

    def _grown(self, tables: Tensor, lengths: Tensor, common: CommonAttentionMetadata) -> WorkList | None:
        """The last work list, if only the last blocks of its sequences have grown."""
        if self._work is None or common.max_query_len > 1 or not torch.equal(tables, self._tables):
            return None
        try:
            self._work.grow(lengths)
        except LayoutError:
            return None
        return self._work

    def _grouped(self, tables: Tensor, lengths: Tensor, common: CommonAttentionMetadata, used: int) -> WorkList:
        self._work = None
        starts = common.query_start_loc_cpu
        self._work = group_pages(
            tables[:, :used],
            lengths,
            self.block_size,
            query_lengths=starts[1:] - starts[:-1],
            heads_per_kv_head=self.heads_per_kv_head,
            threads=self.threads,
        )
        self._tables = tables.clone()
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
        NativeUnavailable: there is no kernel: no compiler, or no Triton. Nothing has changed after either.
    """
    if runner.parallel_config.use_ubatching:
        raise LayoutError("shared-page attention was not written for batches that are cut in two")
    layers = {number: _layers(runner, config, number) for number in groups}
    pages = {number: [_pages(layer) for layer in held] for number, held in layers.items()}
    norms = OwnNorms(max(map(len, layers.values()))) if settings.own_norms else None
    timed = settings.attention == "auto" and not settings.own_norms
    readings = {}
    for number, held in layers.items():
        impl: JointAttention = held[0].impl
        first = pages[number][0]
        impl.prepare(first)
        switch = impl.measured(held[0], first, runner.max_model_len) if timed else None
        group = impl.num_heads // impl.num_kv_heads
        readings[number] = SharedReading(runner, number, first, group, impl.threads(first), switch, norms)
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
    layers = [known[name] for name in group.layer_names]
    if len({(layer.impl.num_heads, layer.impl.num_kv_heads) for layer in layers}) > 1:
        raise LayoutError("the layers of a group differ in their numbers of heads")
    return layers


def _pages(layer: Any) -> LayerPages:
    """Raises `LayoutError` unless the kernel computes what `layer` asks for, from pages as it believes them to be."""
    if not isinstance(layer.impl, JointAttention):
        raise LayoutError(f"{type(layer.impl).__name__} is not the attention of this plugin")
    impl: Any = layer.impl
    special = {
        "a sliding window": impl.sliding_window not in (-1, (-1, -1)),
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap": impl.logits_soft_cap != 0,
        "attention sinks": impl.sinks is not None,
        "attention that is not causal": impl.attn_type != AttentionType.DECODER,
        **impl.special(layer),
    }
    for name, there in special.items():
        if there:
            raise LayoutError(f"shared-page attention was not written for {name}")
    pages = impl.layout(layer)
    pages.confirm(
        lambda *written: impl.do_kv_cache_update(layer, *written[:2], layer.kv_cache, written[2]), PROBED_PAGE
    )
    return pages
