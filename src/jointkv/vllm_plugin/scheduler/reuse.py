"""Reuse before compute: of a request whose text is resident, only what is not is computed.

A request with a run of resident text waits while a *helper*, an ordinary request that nobody sees, computes all up to
the run's entry block. The workers compare that block with those of the sources. Then hashes that only the request has
lead to the pages of the nearest source, further helpers compute the gaps, and the request itself finds everything in
vLLM's prefix cache: workers, kernels and tables know nothing of it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from jointkv.core.reuse import ReusePlan, Run, Runs
from jointkv.policy.reuse import ReuseRule
from jointkv.vllm_plugin.engine.line import helper_of, next_in_line, seats, send_ahead
from jointkv.vllm_plugin.engine.steps import started
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.evidence import Audit
from jointkv.vllm_plugin.scheduler.licences import Licences, RunClass
from jointkv.vllm_plugin.scheduler.questions import Answer, Question
from jointkv.vllm_plugin.scheduler.requests import OPT_OUT, Requests, TrackedRequest
from jointkv.vllm_plugin.scheduler.residents import Residents
from jointkv.vllm_plugin.scheduler.sharing import Sharing
from jointkv.vllm_plugin.settings import PluginSettings

GROUP = 0
"""The one KV-cache group there is."""


@dataclass
class Helper:
    """A request of the plugin's own, which computes up to a gap's end.

    Attributes:
        request: vLLM's.
        owner: name of the request that it helps.
        end: the slot behind the last that it computes.
        stray: nobody waits for it.
        ended: no longer known to vLLM.
    """

    request: Request
    owner: str
    end: int
    stray: bool = False
    ended: bool = False


@dataclass
class Intake:
    """A request that waits until what it need not compute is decided.

    Attributes:
        found: blocks that vLLM's prefix cache had for it.
        end: the slot behind the last one that may be reused; one token at least is computed.
        plan: what is decided so far.
        at: slots before are decided.
        entry: slot of the next run's entry block; None when all is decided.
        sources: of that run.
        helpers: names of those it waits for.
        covered: blocks that were found or that helpers have computed.
        asked: whether its entry block is being compared.
        helped: tokens that helpers have computed.
    """

    tracked: TrackedRequest
    runs: Runs
    found: int
    end: int
    plan: ReusePlan
    at: int
    entry: int | None = None
    sources: list[Run] = field(default_factory=list)
    helpers: set[str] = field(default_factory=set)
    covered: int = 0
    asked: bool = False
    helped: int = 0

    @property
    def needs(self) -> int:
        """Blocks that the request is to find when it starts."""
        return max((stretch.stop for stretch in self.plan.reused), default=0)


class Reuse:
    """Decides what requests need not compute, and has their gaps computed.

    Args:
        settings: how.
        rule: which blocks.
        residents: what there is.
        requests: those that take part.
        sharing: carries out.
        licences: whether.
        statistics: counts.

    Attributes:
        intakes: requests on their way in, by name.
        helpers: by name. Ended ones stay until the next step is prepared.
    """

    def __init__(
        self,
        settings: PluginSettings,
        rule: ReuseRule,
        residents: Residents,
        requests: Requests,
        sharing: Sharing,
        licences: Licences,
        statistics: Statistics,
    ) -> None:
        self.settings, self.rule, self.residents, self.requests = settings, rule, residents, requests
        self.sharing, self.licences, self.statistics = sharing, licences, statistics
        self.intakes: dict[str, Intake] = {}
        self.helpers: dict[str, Helper] = {}
        self._number = 0
        self._draw = random.Random(os.urandom(16)).random

    def prepare(self, scheduler: Scheduler) -> None:
        """Look up those who may start in the step to come, and send helpers ahead of them."""
        self.helpers = {name: helper for name, helper in self.helpers.items() if not helper.ended}
        if not scheduler.waiting or not len(self.residents.index):
            return
        start, budget = time.perf_counter(), scheduler.max_num_scheduled_tokens
        sent: dict[str, list[Request]] = {}
        for request in next_in_line(scheduler, seats(scheduler)):
            if budget <= 0:
                break
            intake = self._intake(request)
            if intake is None:
                budget -= 0 if request.request_id in self.helpers else request.num_tokens
            elif not intake.asked and not intake.helpers:
                helpers = list(self._new_helpers(intake))
                budget -= sum(helper.num_tokens for helper in helpers)
                if helpers:
                    sent[request.request_id] = helpers
        if sent:
            send_ahead(scheduler, sent)
        self.statistics.add("reuse_plan_seconds", time.perf_counter() - start)

    def holds(self, request_id: str, computed: int) -> bool:
        """Whether a request that would find `computed` tokens now is to wait."""
        intake = self.intakes.get(request_id)
        if intake is None:
            return False
        if intake.entry is not None:
            return True
        block_size = intake.tracked.block_size
        return bool(intake.helpers) and computed < intake.needs * block_size

    def begin(self, output: SchedulerOutput) -> Iterator[tuple[str, int]]:
        """Note who starts in the step that `output` describes. Must come before anything asks about its blocks.

        Yields:
            Requests that reuse, and how many of the tokens that they find helpers have computed for them.
        """
        for request_id, computed in started(output):
            helper = self.helpers.get(request_id)
            helped = None if helper is None else self.intakes.get(helper.owner)
            if helper is not None and helped is not None:
                helped.helped += helper.request.num_prompt_tokens - computed
            intake = self.intakes.pop(request_id, None)
            if intake is not None:
                self._start(intake, computed)
                yield request_id, min(intake.helped, computed)

    def questions(self, output: SchedulerOutput) -> Iterator[Question]:
        """Entry blocks that the step that `output` describes completes, and their sources' pages."""
        for name, helper in self.helpers.items():
            scheduled, intake = output.num_scheduled_tokens.get(name), self.intakes.get(helper.owner)
            if scheduled is None or intake is None or intake.entry is None or helper.end != intake.entry + 1:
                continue
            if helper.request.num_computed_tokens + scheduled < helper.request.num_prompt_tokens:
                continue
            held = self.sharing.tables.block(name, GROUP, intake.entry)
            assert held is not None
            intake.sources = [run for run in intake.sources if self.residents.still_holds(run)[0]]
            if intake.sources:
                intake.asked = True
                pairs = [(GROUP, held.block_id, int(run.pages[0])) for run in intake.sources]
                yield Question(pairs, partial(self._hear, helper.owner))
            else:
                intake.at = intake.entry + 1
                self._advance(intake)

    def ended(self, name: str) -> None:
        """A helper has ended, if it is one."""
        helper = self.helpers.get(name)
        if helper is None:
            return
        helper.ended = True
        intake = self.intakes.get(helper.owner)
        if intake is None:
            return
        intake.helpers.discard(name)
        if intake.entry is not None and helper.end == intake.entry + 1 and not intake.asked:
            self._let_go(helper.owner)  # it was stopped before its entry block could be compared

    def dismiss(self, request_id: str) -> None:
        """A request has ended."""
        self._let_go(request_id)

    def helpers_of(self, request_ids: Iterable[str]) -> list[str]:
        """Helpers that have not ended, of these requests."""
        owners = set(request_ids)
        return [name for name, helper in self.helpers.items() if helper.owner in owners and not helper.ended]

    def stray(self) -> list[str]:
        """Helpers that nobody waits for any more."""
        return [name for name, helper in self.helpers.items() if helper.stray and not helper.ended]

    def start_anew(self) -> None:
        """Let everybody go."""
        for request_id in list(self.intakes):
            self._let_go(request_id)

    def _let_go(self, request_id: str) -> None:
        """The request computes what it has not found."""
        intake = self.intakes.pop(request_id, None)
        for name in () if intake is None else intake.helpers:
            self.helpers[name].stray = True

    def _intake(self, request: Request) -> Intake | None:
        intake = self.intakes.get(request.request_id)
        tracked = self.requests.active.get(request.request_id)
        if intake is None and tracked is not None and self._may_reuse(tracked):
            intake = self._look_up(tracked)
            if intake is not None:
                self.intakes[request.request_id] = intake
        return intake

    def _may_reuse(self, tracked: TrackedRequest) -> bool:
        request = tracked.request
        strict = self.settings.isolation == "strict" and not request.cache_salt
        chosen = tracked.audit is not None and bool(tracked.audit.pages)
        text = request.sampling_params is not None and not request.mm_features
        return text and not strict and not chosen and not request.skip_reading_prefix_cache

    def _look_up(self, tracked: TrackedRequest) -> Intake | None:
        """Find runs; None where there is none, or an audit is due."""
        request, least = tracked.request, self.rule.least + 1
        end = (request.num_tokens - 1) // tracked.block_size
        found = self.sharing.tables.found(request) // tracked.block_size
        runs = self.residents.runs(tracked, found, end, GROUP)
        entry = runs.next_entry(found, end, least)
        if entry is None:
            return None
        intake = Intake(tracked, runs, found, end, ReusePlan.nothing(end), found, covered=found)
        sources = runs.through(entry, end, least, self.rule.sources)
        if not self._granted(tracked, sources):
            tracked.audit = Audit(self._pages(intake))
            return None
        if tracked.private_from is None and self._draw() < self.settings.reuse_audit_rate:
            tracked.audit = Audit(self._pages(intake), chosen=True)
            return None
        tracked.audit = None
        self._advance(intake)
        return intake

    def _granted(self, tracked: TrackedRequest, sources: list[Run]) -> bool:
        if self.settings.reuse == "probed":
            return True
        exact = bool(self.residents.exact[sources[0].pages[1:]].all())
        return self.licences.granted(RunClass(tracked.isolation, exact))

    def _pages(self, intake: Intake) -> dict[int, list[int]]:
        """By slot, the pages that would be compared or served."""
        pages: dict[int, list[int]] = {}
        at, least = intake.found, self.rule.least + 1
        while (entry := intake.runs.next_entry(at, intake.end, least)) is not None:
            sources = intake.runs.through(entry, intake.end, least, self.rule.sources)
            for run in sources:
                for slot, page in enumerate(run.pages.tolist(), run.first):
                    pages.setdefault(slot, []).append(page)
            at = max(run.end for run in sources)
        return pages

    def _advance(self, intake: Intake) -> None:
        """Turn to the next run; if there is none and nothing is reused, let the request go."""
        least = self.rule.least + 1
        intake.entry = intake.runs.next_entry(intake.at, intake.end, least)
        if intake.entry is not None:
            intake.sources = intake.runs.through(intake.entry, intake.end, least, self.rule.sources)
        elif not intake.plan.skipped:
            intake.tracked.audit = Audit()
            self._let_go(intake.tracked.request.request_id)

    def _new_helpers(self, intake: Intake) -> Iterator[Request]:
        """One for each gap that is not covered yet, one up to the next entry block."""
        ends = [gap.stop for gap in intake.plan.gaps if gap.stop > intake.covered]
        if intake.entry is not None and intake.entry + 1 > intake.covered:
            ends.append(intake.entry + 1)
        request, pool = intake.tracked.request, self.sharing.tables.pool
        for end in ends:
            self._number += 1
            name = f"{request.request_id}-gap-{self._number}"
            tokens = end * intake.tracked.block_size
            helper = helper_of(request, name, tokens, pool.hash_block_size, OPT_OUT)
            self.helpers[name], intake.covered = Helper(helper, request.request_id, end), end
            intake.helpers.add(name)
            yield helper
        self.statistics.add("reuse_helpers", len(ends))

    def _hear(self, request_id: str, answer: Answer) -> None:
        """The entry block has been compared: adopt what may be."""
        intake = self.intakes.get(request_id)
        if intake is None or not intake.asked:
            return
        intake.asked = False
        for run, ratio in zip(intake.sources, answer.ratio, strict=True):
            self.residents.testify(int(run.pages[0]), float(ratio))
        nearest = int(answer.ratio.argmin())
        self._adopt(intake, intake.sources[nearest], float(answer.ratio[nearest]))
        self._advance(intake)

    def _adopt(self, intake: Intake, run: Run, entry: float) -> None:
        behind = Run(run.first + 1, run.source, run.pages[1:])
        count, worst = self.residents.witnesses[behind.pages], self.residents.worst[behind.pages]
        usable = self.rule.usable(entry, count, worst) & self.residents.still_holds(behind)
        before, intake.plan = intake.plan, intake.plan.adopting(behind, usable, self.rule.least)
        intake.at = run.end
        stretches = [stretch for stretch in intake.plan.reused if stretch not in before.reused]
        for stretch in stretches:
            pages = intake.plan.pages[stretch.start : stretch.stop].tolist()
            self.sharing.adopt(intake.tracked, GROUP, stretch.start, pages)
        self.statistics.add("reuse_runs", bool(stretches))

    def _start(self, intake: Intake, computed: int) -> None:
        """The request starts and has found `computed` tokens."""
        tracked, blocks = intake.tracked, computed // intake.tracked.block_size
        adopted = [slot for stretch in intake.plan.reused for slot in stretch if slot < blocks]
        tracked.served |= {(GROUP, slot) for slot in adopted}
        self.statistics.add("prompt_tokens_skipped", len(adopted) * tracked.block_size)
        self.statistics.add("reuse_gaps", len(intake.plan.gaps))
