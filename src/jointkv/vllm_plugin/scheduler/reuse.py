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
from functools import partial

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from jointkv.core.reuse import ReusePlan, Run
from jointkv.policy.reuse import ReuseRule
from jointkv.vllm_plugin.engine.line import helper_of, next_in_line, seats, send_ahead
from jointkv.vllm_plugin.engine.steps import started
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.evidence import Audit
from jointkv.vllm_plugin.scheduler.followers import Followers
from jointkv.vllm_plugin.scheduler.intakes import Helper, Intake
from jointkv.vllm_plugin.scheduler.licences import Licences, RunClass
from jointkv.vllm_plugin.scheduler.questions import Answer, Question
from jointkv.vllm_plugin.scheduler.requests import OPT_OUT, Requests, TrackedRequest
from jointkv.vllm_plugin.scheduler.residents import Residents
from jointkv.vllm_plugin.scheduler.sharing import Sharing
from jointkv.vllm_plugin.settings import PluginSettings

GROUP = 0
"""The one KV-cache group there is."""


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
        followers: requests that wait for text that another one is computing.
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
        self.followers = Followers(requests)
        self._number = 0
        self._draw = random.Random(os.urandom(16)).random

    def prepare(self, scheduler: Scheduler) -> None:
        """Look up those who may start in the step to come, and send helpers ahead of them."""
        self.helpers = {name: helper for name, helper in self.helpers.items() if not helper.ended}
        self.followers.new_step()
        if not scheduler.waiting:
            return
        start, budget = time.perf_counter(), scheduler.max_num_scheduled_tokens
        sent: dict[str, list[Request]] = {}
        for request in next_in_line(scheduler, seats(scheduler)):
            if budget <= 0:
                break
            name = request.request_id
            intake = self.intakes.get(name) or self._take_in(request)
            if intake is not None:
                sent[name] = self._send(intake)
                budget -= sum(helper.num_tokens for helper in sent[name])
            elif name not in self.helpers and name not in self.followers.held:
                budget -= request.num_tokens
        if any(sent.values()):
            send_ahead(scheduler, sent)
        self.statistics.add("reuse_plan_seconds", time.perf_counter() - start)

    def holds(self, request_id: str, computed: int) -> bool:
        """Whether a request that would find `computed` tokens now is to wait."""
        intake = self.intakes.get(request_id)
        if intake is None:
            return request_id in self.followers.held
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
        self.followers.start_anew()
        for request_id in list(self.intakes):
            self._let_go(request_id)

    def _let_go(self, request_id: str) -> None:
        """The request computes what it has not found."""
        intake = self.intakes.pop(request_id, None)
        for name in () if intake is None else intake.helpers:
            self.helpers[name].stray = True

    def _take_in(self, request: Request) -> Intake | None:
        """Look up a request that has not been yet. None where it computes all, or waits for another's text."""
        tracked = self.requests.active.get(request.request_id)
        if tracked is None:
            return None
        intake = self._look_up(tracked) if self._may_reuse(tracked) else None
        if intake is not None:
            self.intakes[request.request_id] = intake
        elif request.request_id not in self.followers.held:
            self.followers.add_donor(tracked)
        return intake

    def _send(self, intake: Intake) -> list[Request]:
        """Helpers to send ahead, if any are due."""
        return [] if intake.asked or intake.helpers else list(self._new_helpers(intake))

    def _may_reuse(self, tracked: TrackedRequest) -> bool:
        request = tracked.request
        strict = self.settings.isolation == "strict" and not request.cache_salt
        chosen = tracked.audit is not None and bool(tracked.audit.pages)
        text = request.sampling_params is not None and not request.mm_features
        return text and not strict and not chosen and not request.skip_reading_prefix_cache

    def _look_up(self, tracked: TrackedRequest) -> Intake | None:
        """Find runs; None where there is none, an audit is due, or more is being computed right now."""
        request, least = tracked.request, self.rule.least + 1
        end = (request.num_tokens - 1) // tracked.block_size
        found = self.sharing.tables.found(request) // tracked.block_size
        runs = self.residents.runs(tracked, found, end, GROUP)
        entry = runs.next_entry(found, end, least)
        sources = [] if entry is None else runs.through(entry, end, least, self.rule.sources)
        resident = max((len(run.pages) for run in sources), default=0)
        if self._granted(RunClass(tracked.isolation, exact=True)) and self.followers.follows(tracked, end, resident):
            return None
        if not sources:
            return None
        intake = Intake(tracked, runs, found, end, ReusePlan.nothing(end), found, covered=found)
        exact = bool(self.residents.exact[sources[0].pages[1:]].all())
        if not self._granted(RunClass(tracked.isolation, exact)):
            tracked.audit = Audit(self._pages(intake))
            return None
        if tracked.private_from is None and self._draw() < self.settings.reuse_audit_rate:
            tracked.audit = Audit(self._pages(intake), chosen=True)
            return None
        tracked.audit = None
        self._advance(intake)
        return intake

    def _granted(self, run_class: RunClass) -> bool:
        return self.settings.reuse == "probed" or self.licences.granted(run_class)

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
        new = [stretch for stretch in intake.plan.reused if stretch not in before.reused]
        for stretch in new:
            pages = intake.plan.pages[stretch.start : stretch.stop].tolist()
            self.sharing.adopt(intake.tracked, GROUP, stretch.start, pages)
        self.statistics.add("reuse_runs", bool(new))

    def _start(self, intake: Intake, computed: int) -> None:
        """The request starts and has found `computed` tokens."""
        tracked, blocks = intake.tracked, computed // intake.tracked.block_size
        adopted = [slot for stretch in intake.plan.reused for slot in stretch if slot < blocks]
        tracked.served |= {(GROUP, slot) for slot in adopted}
        self.statistics.add("prompt_tokens_skipped", len(adopted) * tracked.block_size)
        self.statistics.add("reuse_gaps", len(intake.plan.gaps))
