"""vLLM's scheduler, with requests of the plugin's own in its line that nobody sees.

Thin: what is decided, the plugin's side at the connector decides. `JointScheduler` is what `--scheduler-cls` names;
where vLLM schedules asynchronously it becomes `JointAsyncScheduler`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from jointkv.errors import UnsupportedEngine
from jointkv.vllm_plugin.engine.line import line_before
from jointkv.vllm_plugin.engine.others import ours


class JointScheduler(Scheduler):
    """See the module. Raises `UnsupportedEngine` where the plugin's connector is missing."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Self:
        asynchronous = vllm_config.scheduler_config.async_scheduling
        return super().__new__(JointAsyncScheduler if asynchronous and cls is JointScheduler else cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        connector = ours(self.connector)
        if connector is None:
            raise UnsupportedEngine(
                "jointkv's scheduler runs without its connector; start with `jointkv serve`, or drop --scheduler-cls"
            )
        if connector is not self.connector:
            connector.stand_beside_others()
        self._side: Any = connector.scheduler
        self._side.tables.kept = self.deferred_frees

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Send helpers ahead, then schedule as vLLM does."""
        with line_before(self, self._side.prepare(self)):
            output = super().schedule(throttle_prefills)
        self._count_as_one(output)
        return output

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """End requests, and their helpers with them."""
        if request_ids is not None:
            names = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            request_ids = [*names, *self._side.helpers_of(names)]
        ended = super().finish_requests(request_ids, finished_status)
        return [request for request in ended if request.request_id not in self._side.helpers]

    def reset_prefix_cache(self, reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> bool:
        """Empty the prefix cache, which vLLM does while no page is in use: the plugin keeps none back."""
        self._side.let_go(reset_running_requests)
        return super().reset_prefix_cache(reset_running_requests, *args, **kwargs)

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """What goes to the clients: nothing of helpers."""
        outputs = super().update_from_output(*args, **kwargs)
        helpers = self._side.helpers
        if helpers:
            for client in outputs.values():
                client.outputs = [output for output in client.outputs if output.request_id not in helpers]
                if client.finished_requests:
                    client.finished_requests = client.finished_requests - helpers.keys()
            self._side.follow_up(self)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's gauges of requests, without helpers."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self._side.helpers:
            helpers = {self.requests[name] for name in self._side.helpers if name in self.requests}
            running = sum(helper.status == RequestStatus.RUNNING for helper in helpers)
            deferred = sum(helper in self.deferred_waiting for helper in helpers)
            stats.num_running_reqs -= running
            stats.num_skipped_waiting_reqs -= deferred
            stats.num_waiting_reqs -= len(helpers) - running - deferred
        return stats

    def _count_as_one(self, output: SchedulerOutput) -> None:
        """What a helper has computed or loaded counts for the request that it helps, in vLLM's own statistics."""
        cache = self.kv_cache_manager.prefix_cache_stats
        found = list(self._side.take_loading())
        for new in output.scheduled_new_reqs:
            helper = self._side.helpers.get(new.req_id)
            if helper is not None and not helper.loads:  # who loads was looked up in an earlier step
                found.append((helper.request, new.num_computed_tokens))
        if cache is not None:
            for request, hits in found:
                cache.requests -= 1
                cache.queries -= request.num_prompt_tokens
                cache.hits -= hits
        for name, computed, loaded in self._side.take_helped():
            request = self.requests[name]
            if request.num_preemptions:
                continue
            if cache is not None:
                cache.hits -= computed + loaded
            prefill = request.prefill_stats
            if prefill is not None:
                local = prefill.num_local_cached_tokens - computed - loaded
                prefill.set(prefill.num_prompt_tokens, local, prefill.num_external_cached_tokens + loaded)


class JointAsyncScheduler(JointScheduler, AsyncScheduler):
    """The same where vLLM schedules a step ahead."""
