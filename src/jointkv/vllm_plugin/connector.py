"""The KV connector: vLLM's official channel between scheduler and workers, used here to share pages.

Nothing is transferred. The connector asks workers which pages are alike and, one step later, tells them which block
table entries to replace. Any error inside the plugin switches fusion off, see `Recovery`, and leaves serving as it is.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from jointkv.errors import IntegrityError, LayoutError
from jointkv.vllm_plugin.attention.norms import OwnNorms
from jointkv.vllm_plugin.engine.check import check_engine
from jointkv.vllm_plugin.engine.groups import register
from jointkv.vllm_plugin.engine.pages import packed_pages
from jointkv.vllm_plugin.messages import Inquiry, Verdict
from jointkv.vllm_plugin.metrics import REPORT_EVERY, JointPromMetrics, JointStats, WorkerStatistics
from jointkv.vllm_plugin.scheduler.fusion import FusionScheduler
from jointkv.vllm_plugin.scheduler.recovery import Recovery
from jointkv.vllm_plugin.settings import PluginSettings
from jointkv.vllm_plugin.worker.comparer import PageComparer, apply_remaps, check_tables

logger = init_logger(f"vllm.{__name__}")

R = TypeVar("R")


def fail_safe(hook: Callable[..., R]) -> Callable[..., R | None]:
    """An error inside `hook` switches fusion off; the engine goes on."""

    @functools.wraps(hook)
    def guarded(self: JointConnector, *args: Any, **kwargs: Any) -> R | None:
        start = time.perf_counter()
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            self._switch_off(f"{hook.__name__}: {type(error).__name__}: {error}", isinstance(error, IntegrityError))
            return None
        finally:
            if self.scheduler is not None:
                self.scheduler.statistics.add("schedule_seconds", time.perf_counter() - start)

    return guarded


class JointConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. One instance lives with the scheduler, one with every worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.settings = PluginSettings.parse(self._kv_transfer_config.kv_connector_extra_config)
        self.groups = check_engine(vllm_config, kv_cache_config, self.settings)
        register()  # vLLM makes its block tables after this
        self.scheduler: FusionScheduler | None = None
        self.recovery = Recovery(self.settings.retry_after, self.settings.max_faults)
        self._ranks = vllm_config.parallel_config.world_size
        self._reports = 0
        self._runner: Any = None
        self._comparer: PageComparer | None = None
        self._last_step = 0
        self._apply_seconds = 0.0
        self.readings: dict[int, Any] = {}
        self._attention = WorkerStatistics()
        self.norms: OwnNorms | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        """No KV leaves the engine."""
        return False

    # With the scheduler.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Take hold of the block tables, and say once that fusion is live."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler = FusionScheduler(self.settings, kv_cache_manager, self.groups)
        pool = kv_cache_manager.block_pool
        logger.info(
            "jointkv is %s: %s; %d layer group(s) with tables of their own, pool of %d pages of %d tokens x %d layers",
            "live" if self.settings.enabled else "attached but off",
            self.settings.policy().to_json(),
            len(self.groups),
            pool.num_gpu_blocks - 1,
            kv_cache_manager.coordinator.single_type_managers[self.groups[0]].block_size,
            len(kv_cache_manager.kv_cache_config.kv_cache_groups[self.groups[0]].layer_names),
        )

    def on_new_request(self, request: Request) -> None:
        """Take note of a request."""
        self._admit(request)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Inquiry:
        """What the workers shall do in this step.

        Only the asking is fail-safe: table entries that are already replaced here must reach the workers, or else the
        engine must end.
        """
        assert self.scheduler is not None
        inquiry = self.scheduler.next_inquiry()
        self._ask(inquiry, scheduler_output)
        return inquiry

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Carry out the workers' verdict."""
        verdict = connector_output.kv_connector_worker_meta
        if isinstance(verdict, Verdict):
            self._settle(verdict)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request. Its blocks are vLLM's to free."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request. Its blocks are vLLM's to free."""
        self._dismiss(request.request_id)
        return False, None

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Nothing is ever loaded from elsewhere."""
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Nothing to load."""

    def reset_cache(self) -> bool:
        """Forget all resident pages. An error makes fusion forget them as well."""
        self._reset()
        return True

    def statistics(self) -> dict[str, Any]:
        """Totals since the start, with `state`."""
        assert self.scheduler is not None
        return {**self.scheduler.statistics.totals(), "state": self.state}

    @property
    def fault(self) -> str | None:
        """The last error that switched fusion off, if one did."""
        return self.recovery.cause

    @property
    def state(self) -> str:
        """One of `metrics.STATES`."""
        if self.recovery.off:
            return "disabled" if self.recovery.for_good else "recovering"
        if not self.settings.enabled:
            return "off"
        assert self.scheduler is not None
        return "active" if self.scheduler.statistics.totals()["blocks_considered"] else "inert"

    def _switch_off(self, fault: str, for_good: bool) -> None:
        """Fuse nothing for now. Logged and counted, unless it was off already; requests go on."""
        assert self.scheduler is not None
        self.scheduler.disable()
        if self.recovery.fault(fault, for_good):
            self.scheduler.statistics.add("faults")
            logger.error("jointkv has switched itself off %s, requests go on unfused: %s", self.recovery.outlook, fault)
        logger.debug("where it happened", exc_info=True)

    def get_kv_connector_stats(self) -> JointStats | None:
        """What is new since the last step, for vLLM's log and `/metrics`."""
        return self._attention.take(self.readings.values()) if self.scheduler is None else self._report()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> JointStats:
        """Statistics as they arrive from another process."""
        return JointStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> JointPromMetrics:
        """The metrics in vLLM's own `/metrics`."""
        return JointPromMetrics(*args)

    @fail_safe
    def _admit(self, request: Request) -> None:
        assert self.scheduler is not None
        if self.recovery.resume():
            self.scheduler.enable()
            logger.info("jointkv is on again, for requests that arrive from now on")
        self.scheduler.admit(request)

    @fail_safe
    def _ask(self, inquiry: Inquiry, output: SchedulerOutput) -> None:
        assert self.scheduler is not None
        self.scheduler.ask(inquiry, output)

    @fail_safe
    def _settle(self, verdict: Verdict) -> None:
        assert self.scheduler is not None
        if verdict.fault is not None:
            raise (IntegrityError if verdict.broken else RuntimeError)(f"a worker gave up: {verdict.fault}")
        if verdict.ranks != self._ranks:
            raise RuntimeError(f"{verdict.ranks} of {self._ranks} workers answered step {verdict.step}")
        self.scheduler.settle(verdict)
        if self.settings.check_integrity:
            self.scheduler.check_integrity()

    @fail_safe
    def _dismiss(self, request_id: str) -> None:
        assert self.scheduler is not None
        self.scheduler.dismiss(request_id)

    @fail_safe
    def _reset(self) -> None:
        assert self.scheduler is not None
        self.scheduler.reset()

    @fail_safe
    def _report(self) -> JointStats | None:
        assert self.scheduler is not None
        self._reports += 1
        regular = self._reports % REPORT_EVERY == 1  # the count of shared pages looks at the whole pool
        if not regular and not self.scheduler.statistics.has_news(self.state):
            return None
        return self.scheduler.statistics.take(self.state, self.scheduler.tables.shared_pages() if regular else None)

    # With every worker.

    def attach(self, runner: Any) -> None:
        """Read the layout of the engine's pages, once they are allocated.

        Raises:
            LayoutError: the pages are laid out in a way that was never seen.
        """
        self._runner = runner
        if not self.settings.enabled:
            return
        layers = self._vllm_config.compilation_config.static_forward_context
        pages = {}
        for number in self.groups:
            group = self._kv_cache_config.kv_cache_groups[number]
            if runner.input_batch.block_table[number].block_size != group.kv_cache_spec.block_size:
                raise LayoutError("the attention kernel splits pages into smaller blocks; set --block-size to its size")
            chosen = [layers[name] for name in group.layer_names]
            pages[number] = packed_pages(chosen, self._kv_cache_config.num_blocks, group.kv_cache_spec.block_size)
        if self.settings.shares_reading:
            self._share_reading()
        self._comparer = PageComparer(self.settings.policy(), pages, self.norms)

    def _share_reading(self) -> None:
        """Let attention read shared pages once; where that cannot be, the engine's own attention stays."""
        try:
            from jointkv.vllm_plugin.attention.reading import share_reading

            self.readings, self.norms = share_reading(self._runner, self._kv_cache_config, self.groups, self.settings)
        except Exception as error:  # whatever it is, vLLM's attention does without
            without = " and as they stand" if self.settings.own_norms else ""
            logger.warning("every request reads its pages for itself%s, by vLLM's attention: %s", without, error)
            logger.debug("where it happened", exc_info=True)

    def apply(self, inquiry: Inquiry) -> None:
        """Replace the block table entries that the scheduler has committed, before the step is prepared.

        Not fail-safe: a worker that cannot follow the scheduler must not go on with pages that are no longer its own.
        An inquiry that comes again is passed over, because tables may have changed since.

        Raises:
            IntegrityError: an inquiry before this one never came. vLLM ends the engine, before a page is written.
        """
        start = time.perf_counter()
        if inquiry.step > self._last_step + 1:
            raise IntegrityError(f"the inquiry of step {self._last_step + 1} is lost, and table entries with it")
        if inquiry.step > self._last_step:
            self._last_step = inquiry.step
            apply_remaps(self._runner, inquiry.remaps)
            if self.norms is not None:
                self.norms.commit(inquiry.remaps)
        self._apply_seconds += time.perf_counter() - start

    def follow(self, output: SchedulerOutput) -> None:
        """Forget the norms of blocks that are gone, before the step is prepared."""
        if self.norms is not None:
            self.norms.follow(output, {number: reading.block_size for number, reading in self.readings.items()})

    def build_connector_worker_meta(self) -> Verdict | None:
        """Compare what the scheduler asked for, after the step has been computed.

        A worker that cannot says so and is ready for the next inquiry: only the scheduler stops asking.
        """
        inquiry = self._get_connector_metadata()
        assert isinstance(inquiry, Inquiry)
        try:
            if inquiry.tables is not None:
                check_tables(self._runner, inquiry.tables)
            if self._comparer is None or not len(inquiry.group):
                return None
            verdict = self._comparer.answer(inquiry)
        except Exception as error:
            logger.debug("comparing pages failed", exc_info=True)  # the scheduler says it once for all ranks
            return Verdict.failed(inquiry.step, error)
        verdict.apply_seconds, self._apply_seconds = self._apply_seconds, 0.0
        return verdict

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to load."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save."""

    def wait_for_save(self) -> None:
        """Nothing to save."""
