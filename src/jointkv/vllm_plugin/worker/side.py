"""A worker's side of the plugin: it follows the scheduler's tables and measures what the scheduler asks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig

from jointkv.errors import IntegrityError, LayoutError
from jointkv.fusion.packed_directions import write_direction
from jointkv.store.folder import Store
from jointkv.vllm_plugin.attention.in_place import InPlace
from jointkv.vllm_plugin.attention.install import share_reading
from jointkv.vllm_plugin.attention.norms import OwnNorms
from jointkv.vllm_plugin.attention.reading import SharedReading
from jointkv.vllm_plugin.engine.pages import number_order, packed_pages
from jointkv.vllm_plugin.engine.rotary import rotary_of
from jointkv.vllm_plugin.engine.runners.base import WorkerTables
from jointkv.vllm_plugin.engine.stored import sample_of_weights
from jointkv.vllm_plugin.messages import Inquiry, Verdict
from jointkv.vllm_plugin.metrics import JointStats, WorkerStatistics
from jointkv.vllm_plugin.settings import PluginSettings
from jointkv.vllm_plugin.worker.comparer import Comparison, PageComparer
from jointkv.vllm_plugin.worker.filler import NumberOrder, PageFiller
from jointkv.vllm_plugin.worker.signer import PageSigner
from jointkv.vllm_plugin.worker.stored import StoredPages

logger = init_logger(f"vllm.{__name__}")


class WorkerSide:
    """What the connector's hooks at a worker do.

    Args:
        settings: see `PluginSettings`.
        tables: of the worker's model runner, whose pages are allocated.
        layers: of the model, by name.
        kv_cache_config: of the KV cache.
        groups: KV-cache groups that take part, by number.
        rank, ranks: number of this worker, and how many there are.

    Attributes:
        comparer: None where the settings switch fusion off.
        readings: what the layers of each group share that read shared pages once, by group.
        norms: of blocks that keep their own.
        filler: writes pages of text that moved, where the settings ask for it.
        in_place: text that is read where it is instead, where attention can.
        stored: writes pages to a store and fills them from it, where the settings ask for it.

    Raises:
        UnsupportedEngine: see `rotary_of`.
        LayoutError: the pages are laid out in a way that was never seen.
        BadInput, StoreError: see `Store`.
    """

    def __init__(
        self,
        settings: PluginSettings,
        tables: WorkerTables,
        layers: Mapping[str, Any],
        kv_cache_config: KVCacheConfig,
        groups: tuple[int, ...],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.tables = tables
        self.comparer: PageComparer | None = None
        self.readings: dict[int, SharedReading] = {}
        self.norms: OwnNorms | None = None
        self.filler: PageFiller | None = None
        self.in_place: InPlace | None = None
        self.stored: StoredPages | None = None
        self._fault: Exception | None = None
        self._begun: Comparison | Verdict | None = None
        self._statistics = WorkerStatistics()
        self._last_step = 0
        self._apply_seconds = 0.0
        self._last_stored = 0
        if not settings.enabled and settings.store is None:
            return
        pages = {}
        for number in groups:
            group = kv_cache_config.kv_cache_groups[number]
            block_size = group.kv_cache_spec.block_size
            if tables.block_size(number) != block_size:
                raise LayoutError("the attention kernel splits pages into smaller blocks; set --block-size to its size")
            pages[number] = packed_pages(
                [layers[name] for name in group.layer_names], kv_cache_config.num_blocks, block_size
            )
        if settings.store is not None:
            store = Store(settings.store, max_bytes=settings.store_bytes)
            order = _number_order(layers, kv_cache_config, groups[0])
            weights = partial(sample_of_weights, tables.runner.get_model())
            self.stored = StoredPages(store, pages[groups[0]], order, weights)
        if not settings.enabled:
            return
        if settings.shares_reading:
            self._share_reading(kv_cache_config, groups, settings)
        signer = None
        if settings.signs:
            signer = PageSigner(pages, settings.signature_size, settings.similarity, rank, ranks)
        if settings.moves:
            (group,) = (kv_cache_config.kv_cache_groups[number] for number in groups)
            named = {name: layers[name] for name in group.layer_names}
            order = _number_order(layers, kv_cache_config, groups[0])
            rotary = rotary_of(tables.runner, named)
            self.filler = PageFiller(pages[groups[0]], order, rotary)
            if settings.reads_in_place and self.readings:
                (reading,) = self.readings.values()
                self.in_place = reading.in_place = InPlace(rotary, reading.block_size)
        self.comparer = PageComparer(settings.across_layers, pages, self.norms, signer, self.filler)

    def apply(self, inquiry: Inquiry) -> None:
        """Replace the block table entries that the scheduler has committed, and write pages, before the step.

        Replacing is not fail-safe: a worker that cannot follow the scheduler must not go on with pages that are no
        longer its own. An inquiry that comes again is passed over, because tables may have changed since.

        Raises:
            IntegrityError: an inquiry before this one never came. vLLM ends the engine, before a page is written.
        """
        start = time.perf_counter()
        if inquiry.step > self._last_step + 1:
            raise IntegrityError(f"the inquiry of step {self._last_step + 1} is lost, and table entries with it")
        if inquiry.step > self._last_step:
            self._last_step = inquiry.step
            self.tables.replace(inquiry.remaps)
            self._fill(inquiry)
            if self.norms is not None:
                self.norms.commit(inquiry.remaps)
        self._apply_seconds += time.perf_counter() - start

    def _fill(self, inquiry: Inquiry) -> None:
        """Write directions, and pages of text that moved. The scheduler hears of a fault before anybody reads them."""
        self._fault = None
        try:
            for group, page, members in inquiry.directions:
                assert self.comparer is not None
                with torch.inference_mode():
                    write_direction(self.comparer.groups[group], page, torch.tensor(members))
            for pages, fills in inquiry.fills:
                assert self.filler is not None
                self.filler.fill(pages, fills)
        except Exception as error:
            self._fault = error

    def follow(self, output: SchedulerOutput) -> None:
        """Take note of the rows of the step and of how they read, and forget what is gone, before it is prepared."""
        if self.readings:
            self.tables.begin(output)
        inquiry = Inquiry.among(output.kv_connector_metadata)
        if self.norms is not None:
            block_sizes = {number: reading.block_size for number, reading in self.readings.items()}
            self.norms.follow(output, block_sizes, inquiry.found)
        if self.in_place is not None:
            self.in_place.follow(output, inquiry.in_place)

    def answer(self, inquiry: Inquiry) -> Verdict | None:
        """Measure what the scheduler asked for, after the step has been computed.

        A worker that cannot says so and is ready for the next inquiry: only the scheduler stops asking. Where a device
        compares, no step waits for it: the answer, or that there is none, comes with the next step, on every rank.
        """
        begun = self._begin(inquiry)
        if self.comparer is not None and self.comparer.is_apart:
            begun, self._begun = self._begun, begun
        verdict = self._finish(begun) if isinstance(begun, Comparison) else begun
        if verdict is not None:
            verdict.apply_seconds, self._apply_seconds = self._apply_seconds, 0.0
            verdict.in_place = self.in_place is not None and all(each.fault is None for each in self.readings.values())
        return verdict

    def exchange(self, inquiry: Inquiry) -> None:
        """Have pages stored and filled that the scheduler names, once the step has written what it writes."""
        if self.stored is None or inquiry.step <= self._last_stored:
            return
        self._last_stored = inquiry.step
        if inquiry.emptied:
            self.stored.check_weights()
        if inquiry.save is not None:
            self.stored.save(inquiry.save)
        for load in inquiry.loads:
            self.stored.load(load)

    def report(self) -> JointStats | None:
        """What is new of attention and of the store since the last report; None where it can wait."""
        counts = [reading.counts for reading in self.readings.values()]
        return self._statistics.take(counts if self.stored is None else [*counts, self.stored.counts])

    def close(self) -> None:
        """The worker ends."""
        if self.stored is not None:
            self.stored.close()

    def _begin(self, inquiry: Inquiry) -> Comparison | Verdict | None:
        try:
            if self._fault is not None:
                raise self._fault
            if inquiry.tables is not None:
                self._check_tables(inquiry.tables)
            return None if self.comparer is None or not inquiry.asks else self.comparer.begin(inquiry)
        except Exception as error:
            return _failed(inquiry, error)

    def _finish(self, begun: Comparison) -> Verdict:
        assert self.comparer is not None
        try:
            return self.comparer.finish(begun)
        except Exception as error:
            return _failed(begun.inquiry, error)

    def _share_reading(self, config: KVCacheConfig, groups: tuple[int, ...], settings: PluginSettings) -> None:
        """Let attention read shared pages once; where that cannot be, the engine's own attention stays."""
        try:
            self.readings, self.norms = share_reading(self.tables, config, groups, settings)
        except Exception as error:  # whatever it is, vLLM's attention does without
            without = " and as they stand" if settings.own_norms else ""
            logger.warning("every request reads its pages for itself%s, by vLLM's attention: %s", without, error)
            logger.debug("where it happened", exc_info=True)

    def _check_tables(self, tables: dict[str, dict[int, list[int]]]) -> None:
        """Raises IntegrityError when a scheduled request's tables differ from the scheduler's."""
        for request_id, groups in tables.items():
            for group, pages in groups.items():
                if any(held != pages for held in self.tables.read(request_id, group, len(pages))):
                    raise IntegrityError(f"worker and scheduler disagree on the table of {request_id}, group {group}")


def _number_order(layers: Mapping[str, Any], config: KVCacheConfig, number: int) -> NumberOrder:
    group = config.kv_cache_groups[number]
    named = [layers[name] for name in group.layer_names]
    return NumberOrder(*number_order(named, config.num_blocks, group.kv_cache_spec.block_size))


def _failed(inquiry: Inquiry, error: Exception) -> Verdict:
    logger.debug("comparing pages failed", exc_info=True)  # the scheduler says it once for all ranks
    return Verdict.failed(inquiry.step, error)
