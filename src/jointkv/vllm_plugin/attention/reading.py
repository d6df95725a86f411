"""Which steps of an engine are done by attention that reads shared pages once, and what it needs to know for them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from jointkv.attention.grouping import group_pages
from jointkv.attention.layouts import LayerPages
from jointkv.attention.switch import Switch
from jointkv.attention.work import WorkList
from jointkv.errors import IntegrityError, LayoutError
from jointkv.vllm_plugin.attention.norms import OwnNorms
from jointkv.vllm_plugin.engine.runners.base import WorkerTables

logger = init_logger(f"vllm.{__name__}")


class SharedReading:
    """What the layers of one KV-cache group have in common.

    Args:
        batch: the worker's tables, which are asked who is in which row.
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
        batch: WorkerTables,
        group: int,
        pages: LayerPages,
        heads_per_kv_head: int,
        threads: int | None = None,
        switch: Switch | None = None,
        norms: OwnNorms | None = None,
    ) -> None:
        self._batch, self.group, self.block_size, self._device = batch, group, pages.block_size, pages.device
        self.heads_per_kv_head, self.threads, self.switch, self.norms = heads_per_kv_head, threads, switch, norms
        self.steps = self.shared_steps = 0
        self.fault: str | None = None
        self._work: WorkList | None = None
        self._tables = torch.zeros(0, 0, dtype=torch.int32)
        self._factors: tuple[Tensor, Tensor] | None = None

    def step(self, common: CommonAttentionMetadata) -> tuple[WorkList | None, Tensor | None]:
        """The work of a step, None where the engine's attention is to do it, and the factors of its tables.

        Tables and lengths are vLLM's on the host, from which it makes those on the device: taking them waits for
        nothing. The lengths are exact: `check_engine` refuses drafts that are accepted on the device alone.

        Raises:
            IntegrityError: nobody knows which blocks of the step have factors, or factors are lost.
        """
        requests, rows = self._batch.batch(self.group)
        used = -(-common.max_seq_len // self.block_size)
        if len(requests) != common.num_reqs:  # a warm-up, or a part of the batch
            return self.pass_over("the rows of the step are not those of the batch")
        tables = torch.from_numpy(rows)
        known = None if self.norms is None else self.norms.table(self.group, requests, tables[:, :used])
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

    @property
    def counts(self) -> Counter[str]:
        """What there is to report: some of `metrics.WORKER_COUNTERS`."""
        return Counter(
            attention_steps=self.steps,
            attention_shared_steps=self.shared_steps,
            attention_faults=int(self.fault is not None),
        )

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
