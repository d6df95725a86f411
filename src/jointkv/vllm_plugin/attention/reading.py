"""Which steps of an engine are done by attention that reads shared pages once, and what it needs to know for them."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from jointkv.attention.grouping import group_pages
from jointkv.attention.in_place import Ranges, in_ranges
from jointkv.attention.layouts import LayerPages
from jointkv.attention.rotary import Turning
from jointkv.attention.switch import Switch
from jointkv.attention.work import WorkList
from jointkv.core.moved import Fills
from jointkv.errors import IntegrityError, LayoutError
from jointkv.vllm_plugin.attention.in_place import InPlace
from jointkv.vllm_plugin.attention.norms import OwnNorms
from jointkv.vllm_plugin.engine.runners.base import WorkerTables

logger = init_logger(f"vllm.{__name__}")


class Reads(NamedTuple):
    """How a step reads its pages.

    Attributes:
        work: for shared-page attention; None where the engine's attention is to do it, or the definition, slowly.
        factors: of the tables `[2, layers, rows, slots]`, on the pages' device; None where all are 1.
        ranges: what is read where not every slot reads its page; then the engine's attention must not do it.
        turning: queries of `work` that are turned, by layer.
    """

    work: WorkList | None = None
    factors: Tensor | None = None
    ranges: Ranges | None = None
    turning: Turning | None = None


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
        in_place: text that is read where it is, at another position; None where none ever is.
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
        self.in_place: InPlace | None = None
        self._work: WorkList | None = None
        self._ranges: Ranges | None = None
        self._moved: dict[int, Fills] = {}
        self._turned: tuple[WorkList, Turning] | None = None
        self._tables = torch.zeros(0, 0, dtype=torch.int32)
        self._factors: tuple[Tensor, Tensor] | None = None

    def step(self, common: CommonAttentionMetadata) -> Reads:
        """How a step reads its pages.

        Tables and lengths are vLLM's on the host, from which it makes those on the device: taking them waits for
        nothing. The lengths are exact: `check_engine` refuses drafts that are accepted on the device alone.

        Raises:
            IntegrityError: nobody knows which blocks of the step have factors or are read elsewhere, or factors are
                lost.
        """
        requests, rows = self._batch.batch(self.group)
        used = -(-common.max_seq_len // self.block_size)
        if len(requests) != common.num_reqs:  # a warm-up, or a part of the batch
            return self.pass_over("the rows of the step are not those of the batch")
        tables = torch.from_numpy(rows)
        lengths = common.seq_lens if (exact := common.seq_lens_cpu_upper_bound) is None else exact
        known = None if self.norms is None else self.norms.table(self.group, requests, tables[:, :used])
        factors = None if known is None else self._at_pages(known)
        moved = {} if self.in_place is None else self.in_place.rows(requests, tables[:, :used], lengths)
        if self.fault is not None:
            return self._by_definition(tables, used, moved, factors)
        self.steps += 1
        try:
            work = self._grown(tables, lengths, moved, common) or self._grouped(tables, lengths, moved, common, used)
            turning = self._turning(work)
        except Exception as error:
            self.switch_off(error)
            return self._by_definition(tables, used, moved, factors)
        if factors is None and not moved and self.switch is not None and not self.switch.pays(work):
            return Reads()
        self.shared_steps += 1
        return Reads(work, factors, self._ranges, turning)

    @property
    def counts(self) -> Counter[str]:
        """What there is to report: some of `metrics.WORKER_COUNTERS`."""
        return Counter(
            attention_steps=self.steps,
            attention_shared_steps=self.shared_steps,
            attention_faults=int(self.fault is not None),
        )

    def pass_over(self, why: str) -> Reads:
        """Leave a step to the engine. Raises `IntegrityError` where it may read blocks that it would read wrongly."""
        if self.norms is not None and len(self.norms):
            raise IntegrityError(f"{why}, and so nobody's norms are known")
        if self.in_place is not None and len(self.in_place):
            raise IntegrityError(f"{why}, and so nobody knows who reads text at another position")
        return Reads()

    def switch_off(self, error: Exception) -> None:
        """Leave attention to the engine from now on, but for steps that it would read wrongly. Logged once."""
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

    def _by_definition(self, tables: Tensor, used: int, moved: dict[int, Fills], factors: Tensor | None) -> Reads:
        """Without a work list; where the engine's attention would read wrongly, with what is to be read."""
        ranges = in_ranges(tables[:, :used], self.block_size, moved) if moved else None
        return Reads(factors=factors, ranges=ranges)

    def _turning(self, work: WorkList) -> Turning | None:
        """Angles for the queries of `work` that are turned; the same while it stands."""
        if not len(work.turned):
            return None
        if self._turned is None or self._turned[0] is not work:
            assert self.in_place is not None
            self._turned = work, Turning(self.in_place.rotary, work.turning[1], self._device)
        return self._turned[1]

    def _grown(
        self, tables: Tensor, lengths: Tensor, moved: dict[int, Fills], common: CommonAttentionMetadata
    ) -> WorkList | None:
        """The last work list, if only the last blocks of its sequences have grown."""
        if self._work is None or common.max_query_len > 1 or not torch.equal(tables, self._tables):
            return None
        if moved.keys() != self._moved.keys() or any(moved[row] is not self._moved[row] for row in moved):
            return None
        try:
            self._work.grow(lengths)
        except LayoutError:
            return None
        return self._work

    def _grouped(
        self,
        tables: Tensor,
        lengths: Tensor,
        moved: dict[int, Fills],
        common: CommonAttentionMetadata,
        used: int,
    ) -> WorkList:
        self._work = None
        self._moved, self._ranges = moved, in_ranges(tables[:, :used], self.block_size, moved) if moved else None
        starts, ranges = common.query_start_loc_cpu, self._ranges
        self._work = group_pages(
            tables[:, :used] if ranges is None else ranges.pages,
            lengths,
            self.block_size,
            query_lengths=starts[1:] - starts[:-1],
            first=None if ranges is None else ranges.first,
            count=None if ranges is None else ranges.count,
            shift=None if ranges is None else ranges.shift,
            heads_per_kv_head=self.heads_per_kv_head,
            threads=self.threads,
        )
        self._tables = tables.clone()
        return self._work
