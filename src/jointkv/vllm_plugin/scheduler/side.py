"""The scheduler's side of the plugin: it owns the truth, asks the workers, decides, and reports.

Any error inside switches fusion off, see `FailSafe`, and leaves serving as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from jointkv.errors import IntegrityError
from jointkv.policy.reuse import ReuseRule
from jointkv.store.folder import Store
from jointkv.vllm_plugin.engine.opt_out import left_alone
from jointkv.vllm_plugin.engine.steps import started
from jointkv.vllm_plugin.engine.tables import BlockTables
from jointkv.vllm_plugin.messages import Inquiry, Verdict, patience
from jointkv.vllm_plugin.metrics import JointStats
from jointkv.vllm_plugin.scheduler.arrivals import Arrivals
from jointkv.vllm_plugin.scheduler.audits import Audits
from jointkv.vllm_plugin.scheduler.bounds import Bounds
from jointkv.vllm_plugin.scheduler.candidates import Candidates
from jointkv.vllm_plugin.scheduler.evidence import Audit
from jointkv.vllm_plugin.scheduler.fail_safe import FailSafe, fail_safe
from jointkv.vllm_plugin.scheduler.fusion import Fusion
from jointkv.vllm_plugin.scheduler.intake import Helped, Helper
from jointkv.vllm_plugin.scheduler.left_alone import LeftAlone
from jointkv.vllm_plugin.scheduler.licences import Licences, audits_of_profile, first_licences
from jointkv.vllm_plugin.scheduler.page_readers import PageReaders
from jointkv.vllm_plugin.scheduler.questions import Questions
from jointkv.vllm_plugin.scheduler.requests import Requests
from jointkv.vllm_plugin.scheduler.reuse import Reuse
from jointkv.vllm_plugin.scheduler.sharing import Sharing
from jointkv.vllm_plugin.scheduler.stored import StoredText
from jointkv.vllm_plugin.settings import PluginSettings

logger = init_logger(f"vllm.{__name__}")

UNBOUNDED = (
    "%s, accepted by accept_unbounded=true: requests of one isolation key read K and V of each other's text wherever "
    "they are alike enough, with no bound on the error; answers differ from those without jointkv, may be wrong, and "
    "may hold words of other requests"
)


class SchedulerSide(FailSafe):
    """What the connector's hooks at the scheduler do.

    Args:
        settings: see `PluginSettings`.
        manager: vLLM's; its block tables and pool are what is changed.
        groups: KV-cache groups that take part, by number.
        ranks: workers that answer.
        batches: steps in flight at a time.
        stored_model: what a store knows the engine's pages by, where there is a store.

    Attributes:
        beside_others: whether other connectors load pages, and may overwrite what a request found in the prefix cache.
    """

    def __init__(
        self,
        settings: PluginSettings,
        manager: KVCacheManager,
        groups: tuple[int, ...],
        ranks: int = 1,
        batches: int = 1,
        stored_model: str | None = None,
    ) -> None:
        super().__init__(settings)
        self.tables = BlockTables(manager)
        self.readers = PageReaders(self.tables)
        block_size = self.tables.groups[groups[0]].block_size
        self.requests = Requests(block_size)
        self.left_alone = LeftAlone(settings, block_size, self.statistics)
        layers = len(manager.kv_cache_config.kv_cache_groups[groups[0]].layer_names)
        self.bounds = Bounds(settings, groups, self.statistics, settings.skip_first_layers // layers)
        self.candidates = Candidates(settings, self.tables, groups, self.requests, self.bounds, self.statistics)
        self.sharing = Sharing(self.tables, block_size)
        evidence, residents = audits_of_profile(settings), self.candidates.residents
        self.licences = Licences(first_licences(settings, evidence), self.statistics, settings.reuse != "probed")
        self.stored: StoredText | None = None
        if settings.store is not None and stored_model is not None:
            store, strict = Store(settings.store), settings.isolation == "strict"
            self.stored = StoredText(store, stored_model, self.tables, self.requests, self.statistics, strict)
        rule = ReuseRule() if evidence is None else evidence.rule
        self.reuse = Reuse(
            settings, rule, residents, self.requests, self.sharing, self.licences, self.statistics, self.stored
        )
        audits = Audits(rule, residents, self.licences)
        self.fusion = Fusion(
            self.candidates,
            self.bounds,
            self.sharing,
            audits,
            self.statistics,
            settings.signs,
            settings.writes_directions,
        )
        self.questions = Questions(self.bounds, self.statistics, patience(batches), settings.signature_size)
        self.beside_others = False
        self._helped: list[Helped] = []
        self._loading: list[tuple[Request, int]] = []
        self._arrivals = Arrivals()
        self._groups, self._ranks = groups, ranks
        self._step = 0
        logger.info(
            "jointkv is %s: %s; %d layer group(s) with tables of their own, pool of %d pages of %d tokens x %d layers",
            "live" if settings.enabled else "attached but off",
            settings.fusion_policy().to_json(),
            len(groups),
            self.tables.pool.num_gpu_blocks - 1,
            block_size,
            layers,
        )
        if settings.unbounded:
            logger.warning(UNBOUNDED, settings.unbounded_by)

    def totals(self) -> dict[str, Any]:
        """What was counted since the start, with `state` and `licences`."""
        licences = self.licences.gauges(self.settings.reuse_miss_rate)
        return {**self.statistics.totals(), "state": self.state, "licences": licences}

    @fail_safe
    def admit(self, request: Request) -> None:
        """Take note of a new request."""
        if self.stored is not None:
            self.stored.admit(request)
        self.resume()
        if not self.enabled:
            return
        tracked = self.requests.admit(request)
        if tracked is not None and self.settings.reuses:
            tracked.audit = Audit()
        elif tracked is None and request.request_id not in self.helpers:
            self.left_alone.count(left_alone(request))

    @fail_safe
    def prepare(self, scheduler: Scheduler) -> Request | None:
        """Before vLLM schedules a step: see `Reuse.prepare`."""
        self._end_strays(scheduler)
        if not (self.enabled and self.settings.reuses):
            return None
        self._notice_reset()
        return self.reuse.prepare(scheduler)

    @fail_safe
    def follow_up(self, scheduler: Scheduler) -> None:
        """After the outputs of a step are made: helpers that nobody waits for end, and ended ones are forgotten."""
        self.reuse.sent.forget_ended()
        self._end_strays(scheduler)

    def matched(self, request: Request, computed: int) -> int | None:
        """Tokens behind the `computed` ones that can be loaded for `request`; None where it is to wait."""
        if self.holds(request, computed) or (self.tables.leads_to_none and not self._may_start(request, computed)):
            return None
        return 0 if self.stored is None else self.stored.matched(request, computed)

    @fail_safe
    def holds(self, request: Request, computed: int) -> bool:
        """Whether `request`, which would find `computed` tokens now, is to wait.

        Beside other connectors a request that comes back finds none of its private pages: others may read them.
        """
        self._arrivals.look_up(request.request_id, computed)
        if self.beside_others:
            tracked = self.requests.find(request.request_id)
            return tracked is not None and self.sharing.part(tracked, computed)
        return self.reuse.holds(request.request_id, computed)

    @fail_safe
    def _may_start(self, request: Request, computed: int) -> bool:
        """None, which keeps it waiting, after an error: it may have found no page, and nobody finds none after that."""
        return self.reuse.may_start(request, computed)

    @fail_safe
    def allocate(self, request: Request, pages: Sequence[Sequence[int]], loaded: int = 0) -> None:
        """`request` starts or comes back with `pages`, by group: those that it did not find will be written.

        By the workers or by a load: `loaded` tokens from the store, or what another connector has found.
        """
        found = self._arrivals.allocate(request)
        if self.stored is not None:
            self.stored.allocate(request, pages[0], found, loaded)
        helper = self.helpers.get(request.request_id)
        if helper is not None and loaded:
            helper.loads = True
            self._loading.append((request, found))
        self.candidates.forget_given(pages, found, self._step + 1)

    @property
    def helpers(self) -> dict[str, Helper]:
        """See `Reuse.helpers`."""
        return self.reuse.helpers

    def helpers_of(self, request_ids: Iterable[str]) -> list[str]:
        """See `Helpers.of`."""
        return self.reuse.sent.of(request_ids)

    def take_helped(self) -> list[Helped]:
        """What helpers have brought for requests that the last step starts; once."""
        helped, self._helped = self._helped, []
        return helped

    def take_loading(self) -> list[tuple[Request, int]]:
        """Helpers that begin to load, and tokens that each of them has found; once."""
        loading, self._loading = self._loading, []
        return loading

    def next_inquiry(self, output: SchedulerOutput) -> Inquiry:
        """What the workers shall do in the step that `output` describes.

        Only the asking is fail-safe: table entries that are already replaced here must reach the workers, or else the
        engine must end.
        """
        self._step += 1
        inquiry = Inquiry(self._step, self.sharing.take_remaps(), fills=self.reuse.fills.take())
        inquiry.in_place = self.reuse.fills.in_place.start(output)
        inquiry.found = self._arrivals.take_loaded(output)
        self._write_directions(inquiry)
        self._ask(inquiry, output)
        if self.stored is not None:
            inquiry.loads, inquiry.save = self.stored.take_loads(), self.stored.offers(output)
            inquiry.emptied = self.stored.take_emptied()
        return inquiry

    @fail_safe
    def settle(self, verdict: Verdict) -> None:
        """Carry out the workers' verdict."""
        self.reuse.fills.in_place.possible = verdict.in_place
        if verdict.fault is not None:
            raise (IntegrityError if verdict.broken else RuntimeError)(f"a worker gave up: {verdict.fault}")
        if verdict.ranks != self._ranks:
            raise RuntimeError(f"{verdict.ranks} of {self._ranks} workers answered step {verdict.step}")
        self._notice_reset()
        self.questions.settle(verdict)
        if self.settings.check_integrity:
            self.check_integrity()

    @fail_safe
    def note_loaded(self, request_ids: Iterable[str]) -> None:
        """The loads of requests have ended, well or not."""
        if self.stored is not None:
            self.stored.note_loaded(request_ids)

    def hear(self, report: Any) -> None:
        """Take note of a worker's report, where there is one: it may have given the store up."""
        counters = report.data.get("counters", {}) if isinstance(report, JointStats) else {}
        if self.stored is not None and counters.get("store_faults"):
            self.stored.worker_failed()

    @fail_safe
    def dismiss(self, request_id: str) -> None:
        """Forget a request that has finished or was aborted. Its pages stay resident until they are reused."""
        self.reuse.fills.in_place.end(request_id)
        if request_id in self.requests.active:
            self.left_alone.count_ended(self.requests.active[request_id])
        self._arrivals.dismiss(request_id)
        if self.stored is not None:
            self.stored.dismiss(request_id)
        self.reuse.ended(request_id)
        self.reuse.dismiss(request_id)
        tracked = self.requests.pop(request_id)
        if tracked is not None:
            self.sharing.forget(tracked)
            self.fusion.conclude([tracked])
        self.fusion.directions.dismiss(request_id)

    @fail_safe
    def let_go(self, preempted: bool) -> None:
        """Give back pages that are held for directions; they are planned anew for blocks that come together again.

        Args:
            preempted: all requests that run are about to be; then those that they read in place as well.
        """
        if preempted:
            self.reuse.fills.in_place.let_go()
        self.fusion.directions.start_anew()

    @fail_safe
    def reset(self) -> None:
        """Forget all resident pages, because their content is no longer what the model would compute."""
        if self.stored is not None:
            self.stored.reset()
        self._start_anew()

    def let_everybody_go(self) -> None:
        """See `FailSafe`. What is shared stays shared; remaps already committed are still sent."""
        self.requests.leave_alone()
        self._start_anew()

    @fail_safe
    def report(self) -> JointStats | None:
        """What is new since the last report; None where it can wait. vLLM publishes its events right after."""
        self.tables.events.withhold()
        shared = self.readers.after_step()
        if shared is None and not self.statistics.has_news(self.state):
            return None
        licences = self.licences.news(self.settings.reuse_miss_rate) if self.settings.reuses else None
        return self.statistics.take(self.state, shared, licences)

    def close(self) -> None:
        """The engine ends."""
        if self.stored is not None:
            self.stored.close()

    def check_integrity(self) -> None:
        """Raises IntegrityError when tables, reference counts, index or bounds are inconsistent."""
        self.tables.check_integrity()
        self.candidates.residents.check_integrity()
        self.licences.check_integrity()
        self.reuse.fills.check_integrity()
        self.bounds.check_integrity()
        self.fusion.directions.check_integrity()
        for request_id, tracked in self.requests.active.items():
            if tracked.epoch == tracked.request.num_preemptions:
                for group, slot in tracked.served:
                    if self.tables.block(request_id, group, slot) is None:
                        raise IntegrityError(f"{request_id} is served at slot {slot}, which it does not hold")

    @fail_safe
    def _write_directions(self, inquiry: Inquiry) -> None:
        if self.enabled:
            inquiry.directions = self.fusion.directions.take(inquiry.step)

    @fail_safe
    def _ask(self, inquiry: Inquiry, output: SchedulerOutput) -> None:
        if self.settings.check_integrity:
            tables = self.tables.of(output.num_scheduled_tokens)
            inquiry.tables = {name: {group: held[group] for group in self._groups} for name, held in tables.items()}
        for request_id, _ in started(output):
            tracked = self.requests.find(request_id)
            if tracked is not None:
                self.sharing.started(tracked)
        self._helped = list(self.reuse.begin(output))
        if not self.enabled:
            return
        self._notice_reset()
        self.fusion.conclude(self.requests.among(output.num_scheduled_tokens))
        self.candidates.note_written(self.reuse.fills.sent, inquiry.step)
        self.candidates.forget_written(output, inquiry.step)
        questions = [
            *self.reuse.fills.questions(),
            *self.reuse.entry_blocks.questions(output),
            *self.fusion.questions(output),
        ]
        self.questions.ask(inquiry, questions, self.fusion.signing(), self.fusion.gatherings())

    def _end_strays(self, scheduler: Scheduler) -> None:
        stray = self.reuse.stray()
        if stray:
            scheduler.finish_requests(stray, RequestStatus.FINISHED_ABORTED)
            for name in stray:  # after an error vLLM may not have known it
                self.reuse.ended(name)

    def _notice_reset(self) -> None:
        if self.candidates.cache_was_reset():
            self._start_anew()

    def _start_anew(self) -> None:
        self.candidates.start_anew()
        self.reuse.start_anew()
        self.questions.start_anew()
        self.fusion.start_anew()
        for tracked in self.requests.active.values():
            tracked.audit = None
