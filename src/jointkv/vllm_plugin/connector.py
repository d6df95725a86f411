"""The KV connector: vLLM's official channel between scheduler and workers, used here to share pages.

Nothing is transferred, but to and from a store where there is one. Every hook goes to the plugin's side at the
scheduler or at a worker; what vLLM does not need to hear about either is answered here.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from jointkv.errors import UnsupportedEngine
from jointkv.vllm_plugin import CONNECTOR, CONNECTOR_MODULE
from jointkv.vllm_plugin.engine.check import BESIDE_OTHERS, ReuseObstacle, check_engine, reuse_obstacle
from jointkv.vllm_plugin.engine.groups import LayerGroupManager, LayerGroupSpec, register
from jointkv.vllm_plugin.engine.opt_out import RequestCheck
from jointkv.vllm_plugin.engine.runners import RUNNERS, runner_of
from jointkv.vllm_plugin.engine.scheduler import JointAsyncScheduler, JointScheduler
from jointkv.vllm_plugin.engine.stored import stored_model
from jointkv.vllm_plugin.messages import Inquiry, Verdict
from jointkv.vllm_plugin.metrics import JointStats
from jointkv.vllm_plugin.prometheus import JointPromMetrics
from jointkv.vllm_plugin.scheduler.side import SchedulerSide
from jointkv.vllm_plugin.settings import PluginSettings
from jointkv.vllm_plugin.worker.mixin import RemappingWorker
from jointkv.vllm_plugin.worker.side import WorkerSide

logger = init_logger(f"vllm.{__name__}")


class JointConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. One instance lives with the scheduler, one with every worker.

    Attributes:
        scheduler: the scheduler's side, from `bind_kv_cache_manager` on; at a worker there is none.
        worker: a worker's side, from `attach` on; at the scheduler there is none.
    """

    scheduler: SchedulerSide
    worker: WorkerSide

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._asked = settings = PluginSettings.parse(self._kv_transfer_config.kv_connector_extra_config)
        self.groups = check_engine(vllm_config, kv_cache_config, settings, PARTS)
        self._decide_on_reuse(reuse_obstacle(vllm_config, kv_cache_config) if settings.reuse == "auto" else None)
        register()  # vLLM makes its block tables after this
        self._at_scheduler = role == KVConnectorRole.SCHEDULER

    @property
    def requires_kv_delivery(self) -> bool:
        """No KV leaves the engine."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> JointStats:
        """Statistics as they arrive from another process."""
        return JointStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> JointPromMetrics:
        """The metrics in vLLM's own `/metrics`."""
        return JointPromMetrics(*args)

    def get_kv_connector_stats(self) -> JointStats | None:
        """What is new since the last step, for vLLM's log and `/metrics`."""
        return self.scheduler.report() if self._at_scheduler else self.worker.report()

    # With the scheduler.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Take hold of the block tables."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._manager = kv_cache_manager
        ranks = self._vllm_config.parallel_config.world_size
        batches = self._vllm_config.max_concurrent_batches
        stored = None if self.settings.store is None else stored_model(self._vllm_config, self._kv_cache_config)
        self.scheduler = SchedulerSide(self.settings, kv_cache_manager, self.groups, ranks, batches, stored)
        if self._no_reuse is not None:
            logger.info("jointkv serves without reuse: %s", self._no_reuse.why)
            self.scheduler.statistics.no_reuse = self._no_reuse.reason

    def stand_beside_others(self) -> None:
        """Other connectors store and load pages too, see `engine.others`. Before the first request.

        Raises:
            UnsupportedEngine: reuse or a store was asked for.
        """
        if self.settings.store is not None:
            raise UnsupportedEngine(
                "jointkv's store does not work beside other connectors, which store too; drop store"
            )
        if self.settings.reuses:
            if self._asked.reuse != "auto":
                raise UnsupportedEngine(f"jointkv does not reuse here: {BESIDE_OTHERS.why}; set reuse=off")
            self._decide_on_reuse(BESIDE_OTHERS)
            self.bind_kv_cache_manager(self._manager)
        self.scheduler.beside_others = True

    def _decide_on_reuse(self, obstacle: ReuseObstacle | None) -> None:
        self._no_reuse, self.settings = obstacle, self._asked.with_reuse_decided(obstacle is None)

    def on_new_request(self, request: Request) -> None:
        """See `SchedulerSide.admit`."""
        self.scheduler.admit(request)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Inquiry:
        """See `SchedulerSide.next_inquiry`."""
        return self.scheduler.next_inquiry(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See `SchedulerSide.settle`."""
        self.scheduler.hear(connector_output.kv_connector_stats)
        self.scheduler.note_loaded(connector_output.finished_recving or ())
        verdict = connector_output.kv_connector_worker_meta
        if isinstance(verdict, Verdict):
            self.scheduler.settle(verdict)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See `SchedulerSide.dismiss`. The blocks are vLLM's to free."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `SchedulerSide.dismiss`. The blocks are vLLM's to free."""
        self.scheduler.dismiss(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """See `SchedulerSide.reset`. An error makes fusion forget all resident pages as well."""
        self.scheduler.reset()
        return True

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """What the store has is loaded beside the steps; None keeps a request waiting. See `SchedulerSide.matched`."""
        found = self.scheduler.matched(request, num_computed_tokens)
        return found, bool(found)

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """See `SchedulerSide.allocate`. Among several connectors what others load is told here too, as nothing."""
        self.scheduler.allocate(request, blocks.get_block_ids(), num_external_tokens)

    # With every worker.

    def attach(self, runner: Any) -> None:
        """Take hold of the worker's model runner, once its pages are allocated.

        Raises:
            UnsupportedEngine: it is another engine's: vLLM has one connector per process, that of the first engine.
            LayoutError: see `WorkerSide`.
        """
        # Of several connectors each has a copy of the engine's configuration with the same parts.
        if runner.vllm_config.parallel_config is not self._vllm_config.parallel_config:
            raise UnsupportedEngine(
                "another engine of this process has jointkv, and vLLM would let both read its pages; end it first, or "
                "leave VLLM_ENABLE_V1_MULTIPROCESSING on, so that each engine has a process of its own"
            )
        tables = RUNNERS[runner_of(self._vllm_config)](runner)
        layers = self._vllm_config.compilation_config.static_forward_context
        parallel = self._vllm_config.parallel_config
        self.worker = WorkerSide(
            self.settings, tables, layers, self._kv_cache_config, self.groups, parallel.rank, parallel.world_size
        )

    def build_connector_worker_meta(self) -> Verdict | None:
        """See `WorkerSide.answer`."""
        inquiry = self._get_connector_metadata()
        assert isinstance(inquiry, Inquiry)
        return self.worker.answer(inquiry)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins. An exception that its caller is handling is none of the step's."""
        super().bind_connector_metadata(connector_metadata)
        self._handled = sys.exc_info()[1]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads begin when the step is done, see `wait_for_save`."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """See `StoredPages.finished`."""
        stored = self.worker.stored
        return None, None if stored is None else stored.finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See `StoredPages.lost`."""
        stored = self.worker.stored
        return set() if stored is None else stored.lost()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to load."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save."""

    def wait_for_save(self) -> None:
        """See `WorkerSide.exchange`. vLLM comes here also from a step that has failed, whose pages hold anything."""
        if sys.exc_info()[1] is not self._handled:
            return
        inquiry = self._get_connector_metadata()
        assert isinstance(inquiry, Inquiry)
        self.worker.exchange(inquiry)

    def shutdown(self) -> None:
        """The process ends: what waits for the store is written."""
        for side in ("scheduler", "worker"):
            if hasattr(self, side):
                getattr(self, side).close()


with suppress(ValueError):  # it is registered already
    # Statistics of several connectors name their class, which the process with `/metrics` looks up.
    KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, JointConnector.__name__)

PARTS: dict[str, type] = {
    "connector": JointConnector,
    "scheduler": JointScheduler,
    "scheduler a step ahead": JointAsyncScheduler,
    "worker": RemappingWorker,
    "check of requests": RequestCheck,
    "verdict": Verdict,
    "statistics": JointStats,
    "metrics": JointPromMetrics,
    "layer group": LayerGroupSpec,
    "layer group's tables": LayerGroupManager,
}
"""What vLLM calls of the plugin, by its name in `engine.uses`."""
